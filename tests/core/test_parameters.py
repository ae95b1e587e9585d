"""How parameters begin: `docs/defaults.md` is true line by line, and bits are always the same."""

import functools
import inspect
import math
import os
import pathlib
import re
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from names import by_name, public
from support.comparing import KEY, equal, same

import diffprog as dp
from diffprog.core.parameters import INITIALIZERS, fold, parameter
from diffprog.layers.recurrence.cells import forget_ones

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "defaults.md"


def table(section):
    """The rows of the table in a section: column -> text without code marks."""
    _, _, text = DOCS.read_text().partition(f"\n## {section}\n")
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    names, _, *rows = cells
    assert rows and all(len(row) == len(names) for row in cells)
    return [dict(zip(names, row, strict=True)) for row in rows]


def value(text, **names):
    """The number that an expression of the docs stands for."""
    return eval(text, {"sqrt": math.sqrt, "max": max, **names})


# Activations.

@pytest.mark.parametrize("row", table("Activations"), ids=lambda row: row["Name"])
def test_formulas_and_derivatives_are_true(row):
    f = eval(row["Function"], {"jax": jax, "jnp": jnp, "dp": dp})
    x = np.concatenate([[0.0], np.linspace(-6, 6, 40)])  # with the kinks, which are all at zero
    normal = {"Phi": np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2),
              "phi": lambda x: np.exp(-x**2 / 2) / np.sqrt(2 * np.pi)}
    y = eval(row["y"], {**vars(np), **normal, "x": x})
    derivative = eval(row["dy/dx"], {**vars(np), **normal, "x": x, "y": y})
    with jax.enable_x64(True):
        np.testing.assert_allclose(f(jnp.asarray(x)), y, atol=1e-14)
        got = jax.vmap(jax.grad(f))(jnp.asarray(x))
        np.testing.assert_allclose(got, np.broadcast_to(derivative, x.shape), atol=1e-14)


# Initializers by name.

def test_the_names_in_the_docs_are_the_names():
    assert [row["Name"] for row in table("Initializers")] == list(INITIALIZERS)


KERNELS = [(200, 300), (3, 3, 30, 40), (2, 2, 20, 90)]


@pytest.mark.parametrize(("row", "shape"), [
    pytest.param(row, shape, id=f"{row['Name']}-{len(shape)}-{shape[0]}")
    for row in table("Initializers") for shape in KERNELS
    if row["Name"] != "delta_orthogonal" or len(shape) > 2  # which is of convolutions alone
])
def test_each_name_draws_what_the_docs_say(row, shape):
    fan_in, fan_out = math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]
    names = {"fan_in": fan_in, "fan_out": fan_out, "out": shape[-1]}
    drawn = np.asarray(INITIALIZERS[row["Name"]](KEY, shape, jnp.float32), np.float64)
    wanted = value(row["Standard deviation"], **names)
    # The relative error of a deviation of n numbers is 1 / sqrt(2 n), here at most 0.9 per cent.
    assert abs(drawn.std() - wanted) <= 0.03 * wanted
    if row["Name"] != "ones":
        assert abs(drawn.mean()) <= 5 * wanted / math.sqrt(drawn.size)
    if row["Largest size"]:
        largest = value(row["Largest size"], **names)
        assert 0.98 * largest <= np.abs(drawn).max() <= 1.001 * largest
    else:
        assert row["Name"] in ("normal", "orthogonal", "delta_orthogonal", "he_normal_fan_out")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 3, 2, 4)], ids=str)
def test_orthogonal_kernels_are_orthogonal(shape):
    draw = INITIALIZERS["orthogonal"]
    matrix = np.asarray(draw(KEY, shape, jnp.float32)).reshape(-1, shape[-1])
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)


def test_delta_orthogonal_kernels_are_orthogonal_at_the_centre_and_zero_elsewhere():
    kernel = np.array(INITIALIZERS["delta_orthogonal"](KEY, (3, 3, 4, 6), jnp.float32))
    centre = kernel[1, 1].copy()
    np.testing.assert_allclose(centre @ centre.T, np.eye(4), atol=1e-5)
    kernel[1, 1] = 0
    np.testing.assert_array_equal(kernel, 0)


def test_the_name_of_an_initializer_stands_for_the_function():
    x = jnp.ones((2, 4))
    same(dp.linear(3, kernel_init="he_normal").init(KEY, x),
         dp.linear(3, kernel_init=jax.nn.initializers.he_normal()).init(KEY, x))


def test_a_number_is_the_standard_deviation_of_a_normal_distribution():
    x = jnp.ones((2, 4))
    same(dp.linear(3, kernel_init=0.1).init(KEY, x),
         dp.linear(3, kernel_init=jax.nn.initializers.normal(0.1)).init(KEY, x))


@pytest.mark.parametrize("wrong", ["he", None, -0.1, True])
def test_unknown_initializers_raise(wrong):
    x = jnp.ones((2, 4))
    with pytest.raises(dp.LayerError, match=r"kernel_init as a function .* a name .*zeros"):
        dp.linear(3, kernel_init=wrong).init(KEY, x)


# The leaves of every layer.

def to_ids(x):
    return x.astype(jnp.int32)


def asking_itself(attention):
    return dp.program(ask=attention)(lambda layers, x: layers.ask(x, memory=x))


def told_ones(layer):
    return dp.program(told=layer)(lambda layers, x: layers.told(x, condition=jnp.ones(6)))


# layer -> the call with wide kernels, and the shape of x (of the first part of x)
WIDE = {
    "linear": (lambda **o: dp.linear(300, **o), (1, 200)),
    "bilinear": (lambda **o: dp.bilinear(50, **o), ((1, 20), (1, 30))),
    "conv": (lambda **o: dp.conv(40, 3, **o), (1, 3, 3, 30)),
    "depthwise_conv": (lambda **o: dp.depthwise_conv(3, multiplier=3, **o), (1, 3, 3, 400)),
    "conv_transpose": (lambda **o: dp.conv_transpose(40, 3, **o), (1, 3, 3, 30)),
    "glu": (lambda **o: dp.glu(300, **o), (1, 200)),
    "embedding": (lambda **o: dp.serial(to_ids, dp.embedding(200, 300, **o)), (1, 4)),
    "learned_positions": (lambda **o: dp.learned_positions(200, **o), (1, 5, 300)),
    "self_attention": (lambda **o: dp.self_attention(4, head_dim=75, **o), (1, 1, 200)),
    "cross_attention": (lambda **o: asking_itself(dp.cross_attention(4, **o)), (1, 1, 200)),
    "attention_head": (lambda **o: dp.attention_head(300, **o), (1, 1, 200)),
    "ffn": (lambda **o: dp.ffn(300, **o), (1, 200)),
    "simple_rnn": (lambda **o: dp.simple_rnn(300, **o), (1, 200)),
    "lstm": (lambda **o: dp.lstm(100, **o), (1, 200)),
    "gru": (lambda **o: dp.gru(100, **o), (1, 200)),
    "collapse": (lambda **o: dp.collapse("attention", **o), (1, 1, 20_000)),
    "swiglu": (lambda **o: dp.swiglu(300, **{"bias": True, **o}), (1, 200)),
    "hyper": (lambda **o: told_ones(dp.hyper(dp.linear(300), jnp.tanh, **o)), (1, 200)),
    "group_norm": (lambda **o: dp.group_norm(2, **o), (1, 3, 3, 4)),
    "instance_norm": (lambda **o: dp.instance_norm(**o), (1, 3, 3, 4)),
}


def drawn(layer, leaf, **options):
    """The leaf as the layer draws it, and the fans of the kernel beside it."""
    make, shape = WIDE.get(layer, (by_name()[layer], (2, 4)))
    parts = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shape,
                         is_leaf=lambda s: isinstance(s[0], int))
    leaves = dp.tree.paths(make(**options).init(KEY, parts)[0])
    of = {path.rpartition("/")[2]: array for path, array in leaves.items()}
    if "hidden/kernel" in leaves:  # of a cell, whose `hidden_init` is that of this leaf
        of |= {"kernel": leaves["input/kernel"], "hidden": leaves["hidden/kernel"]}
    names = {"features": of[leaf].shape[-1]}
    if "kernel" in of:
        *places, fan_in, features = of["kernel"].shape
        names |= {"fan_in": math.prod(places) * fan_in, "fan_out": math.prod(places) * features,
                 "in_1": of["kernel"].shape[0], "in_2": fan_in}
    if "hidden" in of:
        names["F"] = len(of["hidden"])
    return np.asarray(of[leaf]), names


def takes_initializers(name):
    """The leaves of a public layer that have an initializer; models have a table of their own."""
    made = by_name()[name]
    if name in BEGUN:
        return set()
    parameters = inspect.signature(made).parameters.items() if callable(made) else ()
    return {p.removesuffix("_init") for p, given in parameters if given.annotation == "Initializer"}


def test_every_leaf_of_every_layer_is_in_the_docs():
    listed = [(row["Layer"], row["Leaf"]) for row in table("Parameters")]
    assert len(set(listed)) == len(listed)
    assert set(listed) == {(name, leaf) for name in by_name() for leaf in takes_initializers(name)}


@pytest.mark.parametrize("row", table("Parameters"),
                         ids=lambda row: f"{row['Layer']}-{row['Leaf']}")
def test_each_leaf_begins_as_the_docs_say(row):
    layer, leaf, initializer = row["Layer"], row["Leaf"], row["Initializer"]
    default = inspect.signature(by_name()[layer]).parameters[f"{leaf}_init"].default
    wanted = eval(initializer, {"forget_ones": forget_ones} | {
        name: getattr(jax.nn.initializers, name) for name in ("constant", "variance_scaling")})
    assert default == wanted or not isinstance(default, str)
    got, names = drawn(layer, leaf)
    np.testing.assert_array_equal(got, drawn(layer, leaf, **{f"{leaf}_init": wanted})[0])
    deviation = value(row["Standard deviation"], **names)
    assert abs(got.std() - deviation) <= 0.03 * deviation
    theirs = row["PyTorch"]
    if uniform := re.fullmatch(r"U\(±(.+)\)", theirs):
        bound, there = (value(text, **names) for text in (
            uniform[1], row["Standard deviation there"]))
        assert math.isclose(bound / math.sqrt(3), there)
    elif normal := re.fullmatch(r"N\(0, (.+)\)", theirs):
        assert value(normal[1]) == value(row["Standard deviation there"])
    elif theirs:
        assert (got == float(theirs)).all() and row["Standard deviation there"] == "0"


# The leaves of the models that begin as published.

IDS, IMAGE, ROWS = jnp.ones((1, 5), int), jnp.ones((1, 64, 64, 3)), jnp.ones((1, 5, 96))
TEXT = {"length": 64, "width": 96, "depth": 3, "heads": 4}
BLOCKS = {"depth": 3, "heads": 4, "hidden": 384}
# model -> its net, x, and side inputs
BEGUN = {
    "gpt": (lambda **o: dp.models.gpt(500, **TEXT, **o), IDS, {}),
    "bert": (lambda **o: dp.models.bert(500, **TEXT, **o), IDS, {}),
    "bert_pretraining": (lambda **o: dp.models.bert_pretraining(500, **TEXT, **o), IDS, {}),
    "vit": (lambda **o: dp.models.vit(10, image_size=64, patch_size=8, width=96, depth=3, heads=4,
                                      **o), IMAGE, {}),
    "transformer": (lambda **o: dp.models.transformer(500, 600, width=96, **BLOCKS, **o), IDS,
                    {"source": IDS}),
    "transformer_encoder": (lambda **o: dp.models.transformer_encoder(**BLOCKS, **o), ROWS, {}),
    "transformer_decoder": (lambda **o: dp.models.transformer_decoder(**BLOCKS, **o), ROWS,
                            {"memory": ROWS}),
    "resnet": (lambda **o: dp.models.resnet(18, 100, width=8, **o), IMAGE, {}),
}


def leaves(model, **options):
    """Path -> leaf, as the model draws them."""
    make, x, side = BEGUN[model]
    return dp.tree.paths(make(**options).init(KEY, x, **side)[0])


@functools.cache
def by_row(model):
    """The pattern of each row of a model -> the leaves of which it is the first to match."""
    patterns = [row["Leaves"] for row in table("Models") if row["Model"] == model]
    found = {pattern: {} for pattern in [*patterns, "**/bias", "**/scale"]}
    for path, leaf in leaves(model).items():
        first = next(pattern for pattern in found if dp.tree.matches(path, pattern))
        found[first][path] = leaf
    return found


def test_the_models_in_the_docs_are_those_with_a_kernel_init():
    models = {name.path.rpartition(".")[2] for name in public()
              if name.group == "models" and "kernel_init" in name.arguments}
    assert {row["Model"] for row in table("Models")} == models == BEGUN.keys()


@pytest.mark.parametrize("row", table("Models"), ids=lambda row: f"{row['Model']}-{row['Leaves']}")
def test_each_model_begins_as_the_docs_say(row):
    # The axes of a kernel, after those of `repeat`.
    places = 4 if row["Model"] == "resnet" or row["Leaves"] == "patches/kernel" else 2
    names = {name: getattr(jax.nn.initializers, name) for name in ("normal", "variance_scaling")}
    initializer = value(row["Initializer"], **names, **TEXT)
    draw = INITIALIZERS.get(initializer, initializer)
    found = by_row(row["Model"])[row["Leaves"]]
    assert found
    fourth = []
    for leaf in map(np.asarray, found.values()):
        *space, fan_in, fan_out = (1, 1, *leaf.shape)[-places:]
        size = math.prod(space)
        deviation = value(row["Standard deviation"], fan_in=size * fan_in, fan_out=size * fan_out,
                          **TEXT)
        # Five times the relative error of a deviation of n numbers, 1 / sqrt(2 n).
        assert abs(leaf.std() - deviation) <= 5 * deviation / math.sqrt(2 * leaf.size)
        fourth.append((leaf / (deviation or 1)).ravel() ** 4)
    # The fourth moment tells normal, cut normal and uniform numbers apart: 3, 2.4 and 1.8.
    reference = np.asarray(draw(KEY, (200, 300), jnp.float32))
    wanted = (reference / (reference.std() or 1)) ** 4
    assert abs(np.concatenate(fourth).mean() - wanted.mean()) <= 0.25


@pytest.mark.parametrize("model", BEGUN)
def test_other_leaves_of_models_are_zeros_and_ones(model):
    found = by_row(model)
    assert found["**/bias"] and found["**/scale"]
    assert not any(leaf.any() for leaf in found["**/bias"].values())
    assert all((leaf == 1).all() for leaf in found["**/scale"].values())


@pytest.mark.parametrize("model", BEGUN)
def test_kernel_init_sets_the_kernels_of_a_model(model):
    for path, leaf in leaves(model, kernel_init="ones").items():
        others = {"vit": "patches/", "resnet": "head/"}.get(model, "-")  # have one of their own
        if path.endswith("/kernel") and not path.startswith(others):
            assert (leaf == 1).all(), path


def test_how_to_begin_as_pytorch_does():
    advice = re.search(r"`kernel_init=(jax.+?)`", DOCS.read_text())
    kernel, names = drawn("conv", "kernel", kernel_init=eval(advice[1]))
    assert 0.98 < np.abs(kernel).max() * math.sqrt(names["fan_in"]) <= 1
    assert abs(kernel.std() * math.sqrt(3 * names["fan_in"]) - 1) < 0.03


@pytest.mark.parametrize("row", table("Options"),
                         ids=lambda row: f"{row['Layer']}-{row['Argument']}")
def test_options_are_those_of_the_docs(row):
    parameter = inspect.signature(by_name()[row["Layer"]]).parameters[row["Argument"]]
    assert parameter.default == eval(row["Here"])


# A key for each name.

@pytest.mark.parametrize("one, other", [("gnu", "codding"), ("plumless", "buckeroo")])
def test_names_whose_checksums_collide_begin_and_draw_differently(one, other):
    assert zlib.crc32(one.encode()) == zlib.crc32(other.encode())
    x = jnp.ones((2, 4))
    noisy = dp.linear(4, bias_init="normal") >> dp.dropout(0.5)
    net = dp.branch(**{one: noisy, other: noisy})
    params, state = net.init(KEY, x)
    assert not equal(params[one], params[other])
    params[other] = params[one]
    first, second = net.apply(params, state, x, key=jax.random.key(1), train=True)[0]
    assert not equal(first, second)
    leaves = [parameter(KEY, name, "normal", (4,), x) for name in (one, other)]
    assert not equal(*leaves)


def test_a_name_gives_the_same_key_in_every_process_and_release():
    found = jax.random.key_data(fold(KEY, "linear_0"))
    np.testing.assert_array_equal(found, np.array([2881501583, 629830041], np.uint32))


# The same bits, however init is run.

def everything():
    """A net with a kernel of each initializer, of matrices and of convolutions, and its input."""
    matrices = {name: dp.linear(16, bias=False, kernel_init=name)
                for name in INITIALIZERS if name != "delta_orthogonal"}
    images = {name: dp.conv(16, 3, bias=False, kernel_init=name) for name in INITIALIZERS}
    net = dp.parallel(matrices=dp.branch(**matrices), images=dp.branch(**images))
    return net, (jnp.ones((1, 24)), jnp.ones((1, 3, 3, 8)))


def checksums(params):
    return {path: zlib.crc32(np.asarray(leaf)) for path, leaf in dp.tree.paths(params).items()}


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_jitted_and_mapped_init_give_the_bits_of_eager_init():
    net, x = everything()
    eager = net.init(KEY, x)
    same(jax.jit(net.init)(KEY, x), eager)
    keys = jax.random.split(jax.random.key(1), 3).at[1].set(KEY)
    mapped = jax.jit(jax.vmap(net.init, (0, None)))(keys, x)
    same(jax.tree.map(lambda leaf: leaf[1], mapped), eager)


SHARDED = """
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_parameters import KEY, checksums, everything

net, x = everything()
mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
for axis in (-2, -1):
    def sharding(leaf):
        spec = [None] * leaf.ndim
        spec[axis] = "devices"
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree.map(sharding, net.plan(x).params)
    params, _ = jax.jit(net.init, out_shardings=(shardings, {}))(KEY, x)
    shards = {len({str(s.index) for s in leaf.addressable_shards})
              for leaf in jax.tree.leaves(params)}
    assert shards == {8}, shards
    print(checksums(params))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_sharded_init_gives_the_bits_of_one_device():
    net, x = everything()
    wanted = str(checksums(net.init(KEY, x)[0]))
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300,
        # What else the environment says stays: BLAS may be told by it how to compute `orthogonal`.
        cwd=pathlib.Path(__file__).parent, env=os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, (DOCS.parents[1], DOCS.parents[1] / "tests")))})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [wanted] * 2
