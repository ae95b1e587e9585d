"""The shape of the code: floors, names, imports."""

import ast
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys
import types

import names
import pytest

import diffprog as dp

PACKAGE = pathlib.Path(dp.__file__).parent
TESTS = pathlib.Path(__file__).parent

# A folder is a topic: what each may import besides itself. A new folder fails the test below until
# it is given a row, here and in docs/design.md.

TABLE = {
    "core": "",
    "wiring": "core",
    "transforms": "wiring core",
    "losses": "core",
    "layers": "core wiring transforms",
    "data": "core",
    "runtime": "core",
    "training": "core losses data runtime",
    "models": "layers wiring transforms core",
    "text": "training losses transforms core",
    "diffusion": "training losses core",
    "gradients": "training losses data core",
    "inspection": "training runtime wiring transforms core",
    "laws": "gradients wiring core",
    "interop": "core",
    "tree": "core",  # the public face of paths, at the top
}
MAY_IMPORT = {room: {room, *others.split()} for room, others in TABLE.items()}


def room(module):
    """The folder of a module, at the top of the package."""
    return module.partition(".")[0]


def imports(source, modules):
    """The modules of the package that a source imports, also inside functions, and for types."""

    def found(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, "imports are written in full"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    is_module = whole.removeprefix("diffprog.") in modules
                    yield whole if is_module else node.module
            else:
                yield from found(ast.iter_child_nodes(node))

    ours = (name for name in found(ast.parse(source).body) if name.split(".")[0] == "diffprog")
    return {name.removeprefix("diffprog").removeprefix(".") or "__init__" for name in ours}


def graph():
    """module -> the modules of the package that it imports."""
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"
    }
    return {module: imports(source, files) for module, source in files.items()}


def faults(edges):
    """What is wrong with a graph of imports, in words."""
    wrong = [f"{module} has no room" for module in edges if room(module) not in MAY_IMPORT]
    for module, others in edges.items():
        for other in sorted(others):
            if other not in edges:
                wrong.append(f"{module} imports {other}, which is no file")
            elif room(other) not in MAY_IMPORT.get(room(module), {room(other)}):
                wrong.append(f"{module} imports {other}")
    return wrong + [f"a cycle through {module}" for module in cyclic(edges)]


def cyclic(edges):
    """The modules from which one can return to themselves."""

    def reachable(start):
        seen, waiting = set(), list(edges.get(start, ()))
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += edges.get(module, ())
        return seen

    return [module for module in sorted(edges) if module in reachable(module)]


def test_imports_keep_to_the_table():
    edges = graph()
    assert faults(edges) == []
    assert "core.layer" in edges["wiring.program"]  # it sees imports
    assert {"transforms.repeat", "layers.spatial.conv", "training.step"} <= edges.keys()


def test_every_row_of_the_table_is_a_room():
    assert {room(module) for module in graph()} == TABLE.keys()


def test_the_table_is_that_of_the_docs():
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|[^|]+\|([^|]+)\|$", text, re.M)
    written = {room: {*re.findall(r"\w+", others)} & TABLE.keys() for room, others in rows}
    assert written == {room: {*others.split()} for room, others in TABLE.items()}


@pytest.mark.parametrize(("edges", "wrong"), [
    ({"core.layer": {"core.notation"}, "core.notation": set()}, []),
    ({"novel": set()}, ["novel has no room"]),
    ({"layers.novel": {"layers.linear"}, "layers.linear": {"core.layer"}, "core.layer": set()}, []),
    ({"core.layer": {"wiring.program"}, "wiring.program": set()},
     ["core.layer imports wiring.program"]),
    ({"transforms.remat": {"layers.spatial.conv"}, "layers.spatial.conv": set()},
     ["transforms.remat imports layers.spatial.conv"]),
    ({"layers.spatial.conv": {"data.batches"}, "data.batches": set()},
     ["layers.spatial.conv imports data.batches"]),
    ({"training.step": {"transforms.remat"}, "transforms.remat": set()},
     ["training.step imports transforms.remat"]),
    ({"core.paths": {"tree"}, "tree": set()}, ["core.paths imports tree"]),
    ({"training.step": {"data.batches"}, "data.batches": {"core.errors"}, "core.errors": set()},
     []),
    ({"layers.linear": {"layers.dropout"}, "layers.dropout": {"layers.linear"}},
     ["a cycle through layers.dropout", "a cycle through layers.linear"]),
    ({"core.paths": {"core.errors"}, "core.errors": {"core.notation"},
      "core.notation": {"core.paths"}},
     ["a cycle through core.errors", "a cycle through core.notation",
      "a cycle through core.paths"]),
    ({"core.layer": {"__init__"}}, ["core.layer imports __init__, which is no file"]),
], ids=str)
def test_the_table_can_fail(edges, wrong):
    assert faults(edges) == wrong


def test_imports_are_read_from_sources():
    modules = {"tree", "core.layer", "layers.spatial.conv", "core.errors", "data.batches"}
    source = """
import jax, diffprog.data.batches
from diffprog import tree, linear
from diffprog.layers.spatial import conv
if TYPE_CHECKING:
    from diffprog.core.errors import LayerError
def f():
    from diffprog.core.layer import Layer
"""
    assert imports(source, modules) == {
        "core.errors", "core.layer", "data.batches", "tree", "__init__", "layers.spatial.conv"}


# Tests mirror the package.

# What has no test file of its own name, and where its tests are.
TESTED_IN = {
    **dict.fromkeys(["core.arguments", "core.guards"], "core.errors"),  # what they do is refuse
    "core.factories": "core.notation",  # the call that they remember is written there
    **dict.fromkeys(["core.nets", "core.records"], "core.computed"),  # they walk over these
    "core.meshes": "across.meshes",  # it asks for the types of every layer
    **dict.fromkeys(["core.paths", "core.patterns"], "tree"),  # which is their public face
    "wiring.children": "wiring.program",  # they are seen by a program's function alone
    "wiring.merging": "wiring.combinators",  # it joins what `branch` and `parallel` give
    "losses.values": "losses.classes",  # all losses keep the same rules
    "runtime.interrupts": "training.loop",  # which it serves
    "runtime.manifests": "runtime.checkpoints",  # which it verifies
    "runtime.differences": "runtime.weights",  # and checkpoints, which list them
    "training.averages": "training.evaluation",  # of which they are made
    "training.courses": "training.loop",  # which goes them
    "training.penalized": "losses.penalties",
    "diffusion.process": "diffusion.denoising",
    **{f"text.{name}": "text.generation" for name in (
        "prompts", "stops", "sampling", "listening", "scoring")},
    "inspection.tables": "inspection.summaries",  # they are made of them
    **{f"laws.{name}": "laws.laws" for name in (
        "trial", "checks", "examples", "draws", "numbers", "permutations", "sequences")},
    "layers.norms.statistics": "layers.norms.norm",  # what all norms share
    "layers.attention.multihead": "layers.attention.attention",  # what all are made of
    **dict.fromkeys([f"interop.{name}" for name in (
        "foreign", "linen", "nnx", "haiku", "equinox", "stax")], "interop.interop"),
}


def own_tests(module, files):
    """The test files of a module: ``test_<module>.py`` or ``test_<module>_<topic>.py``."""
    folder, _, name = TESTED_IN.get(module, module).rpartition(".")
    folder = folder.replace(".", "/")
    start = f"{folder}/test_{name}" if folder else f"test_{name}"
    return [file for file in files if file == f"{start}.py" or file.startswith(f"{start}_")]


def test_every_module_has_a_test_file_of_its_name():
    files = [path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")]
    modules = graph().keys()
    assert not [module for module in modules if not own_tests(module, files)]
    assert TESTED_IN.keys() <= modules


def test_every_test_file_of_a_mirrored_folder_is_of_a_module():
    """What concerns many modules stands in `across/` and `parity/`."""
    files = [path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")
             if path.parent.name not in ("across", "parity")]
    mirrored = {file for module in graph() for file in own_tests(module, files)}
    others = {"test_structure.py", "test_names.py", "models/test_paths.py",
              "models/test_padding.py"}
    assert set(files) - mirrored <= others


@pytest.mark.parametrize(("module", "files", "found"), [
    ("layers.linear", ["layers/test_linear.py", "layers/test_linear_bilinear.py", "test_linear.py"],
     ["layers/test_linear.py", "layers/test_linear_bilinear.py"]),
    ("data.batches", ["layers/test_batches.py", "data/test_batchesize.py"], []),
    ("layers.attention.multihead", ["layers/attention/test_attention.py"],
     ["layers/attention/test_attention.py"]),
])
def test_test_files_are_found_by_their_names(module, files, found):
    assert own_tests(module, files) == found


# Public names.

def test_the_imports_are_as_the_tool_writes_them():
    """If not: ``python tests/names.py --write``."""
    for path, source in names.written().items():
        assert path.read_text() == source, path


def test_the_tool_would_write_another_name():
    """What it reads are the `__all__` of the modules, each name in one."""
    everything = [(home.space(name), name) for home in names.homes() for name in home.names]
    assert len(everything) == len(set(everything)) > 150
    assert ("", "linear") in everything and ("models", "gpt") in everything
    assert ("tree", "merge") in everything and ("training", "fit") not in everything


@pytest.mark.parametrize("space", ["", *names.ROOMS, *names.MODULES])
def test_public_names_resolve_and_are_documented(space):
    module = getattr(dp, space) if space else dp
    for name in module.__all__:
        value = getattr(module, name)
        assert (value.__doc__ or "").strip()
        assert name in dir(module)
        if not isinstance(value, types.ModuleType):
            assert getattr(value, "__name__", name).rpartition(".")[2] == name
    assert len(set(module.__all__)) == len(module.__all__)


def test_the_top_level_has_about_90_names():
    assert 80 <= len(dp.__all__) <= 100


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="module 'diffprog' has no attribute 'liner'; use dp"):
        _ = dp.liner
    with pytest.raises(AttributeError, match=r"module 'diffprog' has no attribute 'xyzzy'$"):
        _ = dp.xyzzy
    with pytest.raises(AttributeError, match=r"no attribute 'relu'; use jax\.nn\.relu"):
        _ = dp.relu


@pytest.mark.parametrize(("space", "name", "use"), [
    ("", "gpt", "dp.models.gpt"), ("", "Fit", "dp.training.Fit"), ("", "l2", "dp.losses.l2"),
    ("", "accuracy", "dp.metrics.accuracy"), ("", "merge", "dp.tree.merge"),
    ("losses", "mse", "dp.losses.squared_error"), ("training", "fit", "dp.fit"),
    ("models", "GPT", "dp.models.gpt"), ("text", "gpt", "dp.models.gpt"),
])
def test_a_name_of_another_module_is_named_with_its_place(space, name, use):
    module = getattr(dp, space) if space else dp
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'; use {use}"):
        getattr(module, name)


def test_no_submodule_hides_a_public_name():
    """As `models/gpt.py` would the function, were its room not imported as a whole."""
    for info in pkgutil.walk_packages([str(PACKAGE)], "diffprog."):
        importlib.import_module(info.name)
    for home in names.homes():
        for name in home.names:
            module = getattr(dp, home.space(name)) if home.space(name) else dp
            value = getattr(module, name)
            assert value is getattr(sys.modules[f"diffprog.{home.module}"], name)
            assert not isinstance(value, types.ModuleType)


# The import is light.

def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_is_light():
    added = run("import sys, jax, optax; before = set(sys.modules); import diffprog; "
                "print(*sorted(set(sys.modules) - before))")
    assert "diffprog.core.layer" in added
    assert len(added) <= 24, added


def test_the_import_loads_no_optional_package():
    loaded = run("import sys, diffprog; diffprog.linear, diffprog.fit, diffprog.check; "
                 "diffprog.interop.from_linen; diffprog.data.pipeline; "
                 "diffprog.runtime.tensorboard; diffprog.runtime.Checkpoints; print(*sys.modules)")
    assert {"jax", "optax", "diffprog", "diffprog.training.step"} <= set(loaded)
    assert not {"tqdm", "tensorboardX", "matplotlib", "sklearn", "flax", "haiku", "equinox",
                "grain", "orbax", "safetensors"} & set(loaded)
