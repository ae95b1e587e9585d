"""Every public name, its arguments, and the first line of what is said of it.

    python tests/names.py            # all of them, in the groups of `diffprog.__all__`
    python tests/names.py layers     # the groups whose title begins so

Names are chosen by reading them beside each other; `test_names.py` holds the rules that follow.
"""

import ast
import inspect
import re
import sys
from typing import NamedTuple

import diffprog as dp
from diffprog.core import notation


class Name(NamedTuple):
    """A public name; `group` is the comment above it in `__all__`."""

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
        bare = [p.replace(annotation=p.empty, default=_written(p.default))
                for p in self.arguments.values()]
        call = str(inspect.Signature(bare)) if callable(self.value) else ""
        return f"{self.path}{call}\n    {self.first}"


def groups(module):
    """Title -> names, as the comments in the module's `__all__` group them."""
    source = inspect.getsource(module)
    listed = next(node for node in ast.parse(source).body
                  if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    found, title = {}, "trees"
    for line in ast.get_source_segment(source, listed).splitlines():
        code, _, comment = line.partition("#")
        title = comment.strip() or title
        found.setdefault(title, []).extend(re.findall(r'"(\w+)"', code))
    return found


def public():
    """All public names, those of `dp.tree` and `dp.interop` last."""
    return [Name(title, prefix + name, getattr(module, name))
            for module, prefix in (
                (dp, "dp."), (dp.tree, "dp.tree."), (dp.interop, "dp.interop."))
            for title, names in groups(module).items() for name in names]


class _Code(str):
    """A default as the signature shows it, without quotes."""

    __repr__ = str.__str__


def _written(default):
    return default if default is inspect.Parameter.empty else _Code(notation.code(default))


def main(*titles):
    """Print the groups whose title begins with one of `titles`; all of them if there is none."""
    title = None
    for name in public():
        if name.group.startswith(titles or ""):
            print(*[] if name.group == title else [f"\n# {name.group}\n\n"], name, sep="")
            title = name.group


if __name__ == "__main__":
    main(*sys.argv[1:])
