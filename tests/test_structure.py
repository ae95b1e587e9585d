"""The shape of the code: floors, names, imports."""

import ast
import importlib
import pathlib
import pkgutil
import subprocess
import sys

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
    "inspection": "training wiring transforms core",
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
    "runtime.logs": "training.loop", "runtime.interrupts": "training.loop",  # which they serve
    "training.averages": "training.evaluation",  # of which they are made
    "training.courses": "training.loop",  # which goes them
    "training.penalized": "losses.penalties",
    "diffusion.process": "diffusion.denoising",
    **{f"text.{name}": "text.generation" for name in (
        "prompts", "stops", "sampling", "listening", "scoring")},
    "inspection.tables": "inspection.summaries",  # they are made of them
    **{f"laws.{name}": "laws.laws" for name in (
        "trial", "checks", "examples", "draws", "numbers", "sequences")},
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

PUBLIC = [
    "Fit", "Generation", "Layer", "LayerError", "Player", "Step", "TrainState", "absolute_error",
    "accuracy", "adaptive_avg_pool", "adaptive_max_pool", "add", "add_noise", "add_norm", "alexnet",
    "attend", "attention_head", "avg_pool", "batch_norm", "batches", "beam_search", "bert",
    "bert_pretraining", "bilinear", "binary_classification", "binary_cross_entropy", "binary_step",
    "bits_per_character", "branch", "check", "check_gradients", "chunked_next_token",
    "classification", "collapse", "concatenate", "confusion_matrix", "conv", "conv_transpose",
    "cosine_schedule", "cross_attention", "cross_entropy", "ctc", "dcgan_discriminator",
    "dcgan_generator", "ddim", "ddpm", "denoising", "depthwise_conv", "diagram", "dit", "dropout",
    "elbo", "ema", "embedding", "encoder_decoder", "ensemble", "evaluate", "ffn", "fisher_product",
    "fit", "fixed_point", "flatten", "freeze", "gauss_newton_product", "gaussian_kl",
    "gaussian_sample", "gelu", "generate", "global_avg_pool", "global_max_pool", "glu", "gpt",
    "gradient_flow", "group_norm", "gru", "gumbel_softmax", "heads", "hessian_product", "hide",
    "huber", "hyper", "instance_norm", "interop", "kl_divergence", "l1", "l2", "layer_norm",
    "learned_positions", "linear", "linear_cross_entropy", "linear_scaling", "linear_schedule",
    "linearize", "llama", "llama3_scaling", "log_probabilities", "longrope_scaling", "lora",
    "lstm", "make_game", "make_step", "mask_tokens", "masked_language", "max_pool", "merge",
    "mixed", "mlp", "next_token", "ntk_scaling", "one_hot", "parallel", "patches", "penalized",
    "per_example_gradient_norms", "per_example_gradients", "perplexity", "pin", "pixel_shuffle",
    "pre_norm", "predict", "prelu", "program", "quantize", "recurrent", "regression", "remat",
    "reparam", "repeat", "replace", "reshape", "residual", "resnet", "restart", "rms_norm",
    "rotary", "sample", "score_function", "self_attention", "sentence_pairs", "seq2seq",
    "sequence_classifier", "serial", "simple_rnn", "sinusoidal_positions", "spatial_dropout",
    "spectral_norm", "squared_error", "stateless", "stochastic_depth", "straight_through",
    "summary", "swiglu", "tangent_kernel", "tap", "top_k_accuracy", "trainable", "transformer",
    "transformer_decoder", "transformer_encoder", "tree", "unet", "unmerge", "upsample", "vae",
    "vit", "weight_norm", "yarn_scaling",
]


def test_public_names_are_pinned():
    assert sorted(dp.__all__) == PUBLIC
    assert len(set(dp.__all__)) == len(dp.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_resolve_and_are_documented(name):
    value = getattr(dp, name)
    assert (value.__doc__ or "").strip()
    assert name in dir(dp)
    assert getattr(value, "__name__", name).rpartition(".")[2] == name


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="module 'diffprog' has no attribute 'liner'; use dp"):
        _ = dp.liner
    with pytest.raises(AttributeError, match=r"module 'diffprog' has no attribute 'xyzzy'$"):
        _ = dp.xyzzy
    with pytest.raises(AttributeError, match=r"no attribute 'relu'; use jax\.nn\.relu"):
        _ = dp.relu


def test_type_checkers_see_exactly_the_lazy_names():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    guarded = [node for node in body if isinstance(node, ast.If)]
    assert [ast.unparse(node.test) for node in guarded] == ["TYPE_CHECKING"]
    shown = {
        alias.name: node.module.removeprefix("diffprog.")
        for node in guarded[0].body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert shown == dp._HOMES | dict.fromkeys(dp._MODULES, "diffprog")
    eager = {
        alias.name for node in body if isinstance(node, ast.ImportFrom)
        and node.module.startswith("diffprog") for alias in node.names
    }
    assert eager | shown.keys() == set(PUBLIC)
    assert not eager & shown.keys()


def test_lazy_names_come_from_where_it_is_said():
    for name, home in dp._HOMES.items():
        module = importlib.import_module(f"diffprog.{home}")
        assert getattr(module, name) is getattr(dp, name)
        assert name in module.__all__


def test_no_module_has_the_name_of_a_public_function():
    found = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "diffprog.")]
    assert "diffprog.layers.spatial.conv" in found
    top = {name.split(".")[1] for name in found if name.count(".") == 1}
    assert top & set(PUBLIC) == {"interop", "tree"}
    for name in found:
        importlib.import_module(name)
    assert callable(dp.program) and not callable(dp.tree)  # whatever was imported in between


# The import is light.

def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_is_light():
    added = run("import sys, jax, optax; before = set(sys.modules); import diffprog; "
                "print(*sorted(set(sys.modules) - before))")
    assert "diffprog.core.layer" in added
    assert len(added) <= 19, added


def test_the_import_loads_no_optional_package():
    loaded = run("import sys, diffprog; diffprog.linear, diffprog.fit, diffprog.check; "
                 "diffprog.interop.from_linen; "
                 "print(*sys.modules)")
    assert {"jax", "optax", "diffprog", "diffprog.training.step"} <= set(loaded)
    assert not {"tqdm", "matplotlib", "sklearn", "flax", "haiku", "equinox"} & set(loaded)
