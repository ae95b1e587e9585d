"""Every public name, its arguments, and the first line of what is said of it.

    python tests/names.py              # all of them, in the groups of their rooms
    python tests/names.py layers       # the groups whose title begins so
    python tests/names.py --write      # write the imports in `__init__.py` of the package and of
                                       # its namespaces anew; `test_structure.py` compares them

A name is public by the `__all__` of its module, the one place where it is written by hand. The room
of the module says whether it stands at the top, as `dp.linear`, or in a namespace.
"""

import ast
import functools
import importlib
import inspect
import pathlib
import re
import sys
import textwrap
from typing import NamedTuple

PACKAGE = pathlib.Path(__file__).parents[1] / "diffprog"

# Rooms that are namespaces of their own, and modules that are.
ROOMS = ["losses", "models", "data", "training", "runtime", "text", "diffusion", "gradients",
         "inspection", "interop"]
MODULES = {"metrics": "losses.metrics", "rope": "layers.positions.rope",
           "estimators": "layers.estimators", "tree": "tree"}
# What stands at the top from rooms that do not: the daily handful.
DAILY = {"batches", "check", "classification", "evaluate", "fit", "make_step", "predict",
         "regression", "summary"}
OF_TREE = {"core.nets", "core.paths", "core.patterns"}
LOADED = {"core", "wiring"}  # with the package itself; all else on first use
BEGIN, END = "# Written by tests/names.py --write.\n", "# To here.\n"


class Home(NamedTuple):
    """A module with public names; `space` is the namespace in which they stand, "" the top."""

    module: str
    names: list[str]

    @property
    def room(self):
        """The folder."""
        return self.module.partition(".")[0]

    def space(self, name):
        """The namespace of a name."""
        if self.module in OF_TREE:
            return "tree"
        own = next((space for space, module in MODULES.items() if module == self.module), None)
        return own or ("" if self.room not in ROOMS or name in DAILY else self.room)


@functools.cache
def homes():
    """All modules with an `__all__` of their own, read and not imported."""
    return list(_read())


def _read():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if path.name == "__init__.py" or module == "tree":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                yield Home(module, ast.literal_eval(node.value))


def spaces():
    """Namespace -> module -> the names that it gives to it."""
    found = {"": {}, **{space: {} for space in (*ROOMS, *MODULES)}}
    for home in homes():
        for name in home.names:
            found[home.space(name)].setdefault(home.module, []).append(name)
    return found


def imported(modules, indent=""):
    """The imports of these names."""
    lines = []
    for module, names in sorted(modules.items()):
        origin = f"diffprog.{module}" if module else "diffprog"
        line = f"{indent}from {origin} import {', '.join(sorted(names, key=_order))}"
        if len(line) > 100:
            line = (line.partition(" import ")[0] + " import (\n"
                    + "".join(f"{indent}    {name},\n" for name in sorted(names, key=_order))
                    + f"{indent})")
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def listed(title, brackets, entries):
    """A list or a dict of these entries, filled line by line."""
    body = textwrap.fill(", ".join(entry.replace(" ", "~") for entry in entries) + ",", 96,
                         break_long_words=False, break_on_hyphens=False).replace("~", " ")
    return f"{title} = {brackets[0]}\n{textwrap.indent(body, '    ')}\n{brackets[1]}\n"


def written():
    """Path -> source of each `__init__.py`, and of `tree.py`, with its imports as they shall be."""
    found = spaces()
    sources = {PACKAGE / room / "__init__.py": imported(found[room]) + "\n" + listed(
        "__all__", "[]", [f'"{name}"' for name in _names(found[room])]) for room in ROOMS}
    sources[PACKAGE / "tree.py"] = imported(found["tree"]) + "\n" + listed(
        "__all__", "[]", [f'"{name}"' for name in _names(found["tree"])])
    top = found[""]
    at_once = {module: names for module, names in top.items() if module.split(".")[0] in LOADED}
    later = {module: names for module, names in top.items() if module not in at_once}
    modules = {space: MODULES.get(space, space) for space in (*ROOMS, *MODULES) if space != "tree"}
    shown = {}
    for space, module in modules.items():
        parent, _, last = module.rpartition(".")
        shown.setdefault(parent, []).append(space if space == last else f"{last} as {space}")
    for module, names in later.items():
        shown.setdefault(module, []).extend(names)
    guarded = imported({k: v for k, v in shown.items() if k}, "    ")
    bare = imported({"": shown[""]}, "    ")
    entries = [f'"{name}": "{module}"' for module, names in sorted(later.items())
               for name in sorted(names, key=_order)]
    sources[PACKAGE / "__init__.py"] = "\n".join([
        "from diffprog import tree\n" + imported(at_once),
        "if TYPE_CHECKING:\n" + bare + guarded,
        "# The module of each namespace, and of each name, that is loaded on first use.",
        listed("_SPACES", "{}", [f'"{s}": "{m}"' for s, m in sorted(modules.items())]),
        listed("_HOMES", "{}", entries),
        listed("__all__", "[]", [f'"{name}"' for name in sorted(
            [*_names(top), *modules, "tree"], key=_order)])])
    return {path: _between(path.read_text(), source) for path, source in sources.items()}


def _names(modules):
    return sorted((name for names in modules.values() for name in names), key=_order)


def _order(name):
    """As isort has it: constants, classes, functions."""
    return (not name.isupper(), name.islower() or name[0].islower(), name)


def _between(text, source):
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{source}{END}{after}"


class Name(NamedTuple):
    """A public name; `group` is its room."""

    group: str
    path: str
    value: object

    @property
    def doc(self):
        """The docstring, without indentation."""
        return inspect.getdoc(self.value) or ""

    @property
    def first(self):
        """The first line of the docstring."""
        return self.doc.partition("\n")[0]

    @property
    def arguments(self):
        """Argument -> its `inspect.Parameter`, in order; what is private is none."""
        taken = inspect.signature(self.value).parameters if callable(self.value) else {}
        return {name: given for name, given in taken.items() if not name.startswith("_")}

    def documented(self, section):
        """The names that a section of the docstring, such as Args, speaks of, in its order."""
        text = re.search(rf"^{section}:\n(.*?)(?=^\S|\Z)", self.doc, re.M | re.S)
        entries = re.findall(r"^ {4}(\w+(?:,\s+\w+| and \w+)*)(?=:)", text[1] if text else "", re.M)
        return [name for entry in entries for name in re.split(r",\s+| and ", entry)]

    def __str__(self):
        """The call without annotations, and the first line of its docstring under it."""
        bare = [p.replace(annotation=p.empty, default=_shown(p.default))
                for p in self.arguments.values()]
        call = str(inspect.Signature(bare)) if callable(self.value) else ""
        return f"{self.path}{call}\n    {self.first}"


@functools.cache
def public():
    """All public names, room by room."""
    return [
        Name(home.room, ".".join(filter(None, ("dp", home.space(name), name))),
             getattr(importlib.import_module(f"diffprog.{home.module}"), name))
        for home in homes() for name in home.names]


def by_name():
    """Name -> what it stands for, of all namespaces."""
    return {name.path.rpartition(".")[2]: name.value for name in public()}


def makers():
    """The names of the factories whose layers show the call that made them, as models do not."""
    return {name.path.rpartition(".")[2] for name in public()
            if hasattr(name.value, "__wrapped__") and name.group not in ("models", "interop")}


class _Code(str):
    """A default as the signature shows it, without quotes."""

    __repr__ = str.__str__


def _shown(default):
    from diffprog.core import notation

    return default if default is inspect.Parameter.empty else _Code(notation.code(default))


def main(*titles):
    """Print the groups whose title begins with one of `titles`; all of them if there is none."""
    if titles == ("--write",):
        for path, source in written().items():
            path.write_text(source)
        return
    title = None
    for name in public():
        if name.group.startswith(titles or ""):
            print(*[] if name.group == title else [f"\n# {name.group}\n\n"], name, sep="")
            title = name.group


if __name__ == "__main__":
    main(*sys.argv[1:])
