"""Scaled dot-product attention against NumPy, in every implementation."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AxisType
from support.comparing import KEY, close, drawn
from support.in_numpy import attend, visible
from support.refusing import expect

from diffprog.core.masks import valid_before
from diffprog.core.notation import show
from diffprog.layers.attention import dot_product as module
from diffprog.layers.attention.dot_product import Pattern, choose, dot_product

STEPS, LONG = 6, module._LONG
MASK = np.array([[1, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0]], bool)
SEGMENTS = np.array([[0, 0, 0, 4, 4, 4], [7, 2, 2, 2, 2, 7]])
PAIRS = drawn(2, 4, STEPS, STEPS, seed=9) > 0.3


def inputs(steps=STEPS, heads=4, groups=4, features=3, value_features=5, batch=(2,)):
    return (drawn(*batch, heads, steps, features), drawn(*batch, groups, steps, features, seed=1),
            drawn(*batch, groups, steps, value_features, seed=2))


# name -> pattern, the mask in NumPy, sizes of the inputs, other options
FORMULAS = {
    "plain": (Pattern(), None, {}, {}),
    "scale": (Pattern(), None, {}, {"scale": 0.3}),
    "scale 0": (Pattern(), None, {}, {"scale": 0.0}),
    "one head": (Pattern(), None, {"heads": 1, "groups": 1}, {}),
    "two heads share": (Pattern(), None, {"groups": 2}, {}),
    "all heads share": (Pattern(), None, {"groups": 1}, {}),
    "causal": (Pattern(causal=True), visible(STEPS, causal=True), {}, {}),
    "window": (Pattern(causal=True, window=2), visible(STEPS, causal=True, window=2),
               {"groups": 2}, {}),
    "valid": (Pattern(valid=MASK, empty=True), visible(STEPS, mask=MASK), {"groups": 2}, {}),
    "window of valid keys": (
        Pattern(causal=True, window=2, valid=MASK, ranks=(valid_before(MASK),) * 2, empty=True),
        visible(STEPS, causal=True, window=2, mask=MASK), {}, {}),
    "segments": (Pattern(causal=True, segments=(SEGMENTS, SEGMENTS)),
                 visible(STEPS, causal=True, segments=SEGMENTS), {}, {}),
    "pairs": (Pattern(mask=PAIRS, empty=True), PAIRS, {"groups": 2}, {}),
    "pairs for all heads": (Pattern(mask=PAIRS[:, :1], empty=True), PAIRS[:, :1], {}, {}),
    "pairs for all": (Pattern(mask=PAIRS[:1, :1], empty=True), PAIRS[:1, :1], {"groups": 2}, {}),
    "bias": (Pattern(), None, {"groups": 2}, {"bias": drawn(2, 4, STEPS, STEPS, seed=3)}),
    "bias for all": (Pattern(causal=True), visible(STEPS, causal=True), {},
                     {"bias": drawn(1, 1, STEPS, STEPS, seed=3)}),
    "bias of -inf": (Pattern(), PAIRS, {"groups": 1}, {"bias": np.where(PAIRS, 0.0, -np.inf)}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_output_equals_loops_in_numpy(name):
    pattern, seen, sizes, options = FORMULAS[name]
    given = inputs(**sizes)
    wanted = attend(*given, seen, **{n: np.where(a == -np.inf, 0, a) for n, a in options.items()})
    with jax.enable_x64(True):
        run = jax.jit(lambda given, options: [
            dot_product(*given, pattern, **options, implementation=way) for way in (
                "xla", "blocks")])
        for y in run(given, options):
            assert y.dtype == jnp.float64
            np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)], ids=str)
def test_other_numbers_of_keys_and_any_batch_axes(lead):
    query, key, value = drawn(1, 3, 4, 2), drawn(1, 3, 7, 2, seed=1), drawn(1, 3, 7, 1, seed=2)
    wanted = attend(query, key, value)
    with jax.enable_x64(True):
        given = [a.reshape(*lead, *a.shape[1:]) for a in (query, key, value)]
        y = jax.jit(dot_product)(*given)
        np.testing.assert_allclose(y, wanted.reshape(*lead, *wanted.shape[1:]), atol=1e-12)


# The implementations.

LONG_MASK = np.random.default_rng(5).random((2, 70)) > 0.3


def blocked(name, steps):
    """Pattern, key heads and bias of a case; with a mask some queries have no key."""
    valid = LONG_MASK[:, :steps]
    bias = drawn(1, 4, steps, steps, seed=4).astype(np.float32)
    return {
        "causal": (Pattern(causal=True), 4, None),
        "window and bias, shared": (Pattern(causal=True, window=7), 2, bias),
        "window of valid keys": (Pattern(causal=True, window=3, valid=valid, empty=True,
                                       ranks=(valid_before(valid),) * 2), 1, None),
        "neither causal nor all": (Pattern(mask=bias[:, :1] > 0, empty=True), 4, bias),
    }[name]


@pytest.mark.parametrize(("name", "steps"), [
    *(("causal", steps) for steps in (1, 5, 63, 64, 65)),
    *(("window and bias, shared", steps) for steps in (1, 70)),
    *(("window of valid keys", steps) for steps in (6, 65)), ("neither causal nor all", 65)])
def test_blocks_equal_one_product(name, steps):
    pattern, groups, bias = blocked(name, steps)
    given = tuple(a.astype(np.float32) for a in inputs(steps, groups=groups))

    def total(given, bias, way):
        y = dot_product(*given, pattern, bias=bias, implementation=way)
        return jnp.sum(jnp.sin(y)), y

    @jax.jit
    def both(given, bias):
        argnums = (0,) if bias is None else (0, 1)
        return [jax.value_and_grad(total, argnums, has_aux=True)(given, bias, way)
                for way in ("blocks", "xla")]

    close(*both(given, bias))


def test_blocks_skip_keys_that_their_queries_do_not_attend_to():
    def pairs(pattern, way):
        """The number of weights computed."""
        given = [jax.ShapeDtypeStruct((1, 64, 8), jnp.float32)] * 3
        text = jax.jit(lambda *qkv: dot_product(*qkv, pattern, implementation=way)
                       ).lower(*given).as_text()
        found = re.findall(r"stablehlo\.exponential.*tensor<1x(\d+)x(\d+)xf32>", text)
        return sum(int(rows) * int(columns) for rows, columns in found)

    assert pairs(Pattern(causal=True), "xla") == 64 * 64
    assert pairs(Pattern(causal=True), "blocks") == 64 * 64 * 5 // 8
    assert pairs(Pattern(), "blocks") == 64 * 64
    assert pairs(Pattern(causal=True, window=3), "blocks") == 16 * (16 + 3 * 18)


def shapes(steps=LONG, keys=None, features=64, value_features=None, dtype=jnp.bfloat16):
    of = lambda steps, size: jax.ShapeDtypeStruct((2, 4, steps, size), dtype)  # noqa: E731
    keys = steps if keys is None else keys
    return of(steps, features), of(keys, features), of(keys, value_features or features)


CAUSAL, SHORT, BOTH = Pattern(causal=True), LONG - 1, {"default": "blocks", "cuda": "cudnn"}
CHOICES = {  # inputs, pattern, options, the choice on a Hopper GPU
    "causal": (shapes(), CAUSAL, {}, BOTH),
    "short": (shapes(SHORT), CAUSAL, {}, {"default": "xla", "cuda": "cudnn"}),
    "window": (shapes(), Pattern(causal=True, window=4), {}, BOTH),
    "not causal": (shapes(), Pattern(), {}, {"default": "xla", "cuda": "cudnn"}),
    "float16": (shapes(dtype=jnp.float16), CAUSAL, {}, BOTH),
    "float32": (shapes(dtype=jnp.float32), CAUSAL, {}, {"default": "blocks"}),
    "both": (shapes()[:1] + shapes(dtype=jnp.float16)[1:], CAUSAL, {}, {"default": "blocks"}),
    "fewer of values": (shapes(value_features=20), CAUSAL, {}, BOTH),
    "more of values": (shapes(value_features=256), CAUSAL, {}, BOTH),
    "odd features": (shapes(features=60), CAUSAL, {}, {"default": "blocks"}),
    "odd features of values": (shapes(value_features=68), CAUSAL, {}, {"default": "blocks"}),
    "many features": (shapes(features=256), CAUSAL, {}, BOTH),
    "too many features": (shapes(features=264), CAUSAL, {}, {"default": "blocks"}),
    "mask": (shapes(), Pattern(causal=True, mask=PAIRS), {}, {"default": "blocks"}),
    "valid": (shapes(), Pattern(valid=MASK), {}, {"default": "xla", "cuda": "cudnn"}),
    "valid and causal": (shapes(), Pattern(causal=True, valid=MASK), {}, BOTH),
    "window of valid keys": (shapes(), Pattern(causal=True, window=4, valid=MASK), {},
                           {"default": "blocks"}),
    "window alone": (shapes(), Pattern(window=4), {}, {"default": "xla"}),
    "one query": (shapes(1, 7), Pattern(), {}, {"default": "xla"}),
    "a short chunk": (shapes(4, 32), Pattern(valid=MASK), {}, {"default": "xla"}),
    "a longer chunk": (shapes(5, 32), Pattern(valid=MASK), {}, {"default": "xla", "cuda": "cudnn"}),
    "segments": (shapes(), Pattern(segments=(SEGMENTS,) * 2), {}, {"default": "xla"}),
    "bias or dropout": (shapes(), CAUSAL, {"unsupported": True}, {"default": "blocks"}),
    "a stream": (shapes(LONG, 999), Pattern(causal=True, orders=(np.arange(LONG), np.arange(999))),
                 {}, {"default": "xla"}),
    "named": (shapes(), CAUSAL, {"implementation": "xla"}, {"default": "xla"}),
    "cudnn named": (shapes(SHORT), CAUSAL, {"implementation": "cudnn"}, {"default": "cudnn"}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_by_platform_shape_and_dtype(name, monkeypatch):
    given, pattern, options, wanted = CHOICES[name]
    monkeypatch.setattr(module, "_on_hopper", lambda: True)
    assert choose(*given, pattern, **options) == wanted
    monkeypatch.setattr(module, "_on_hopper", lambda: False)
    assert choose(*given, pattern, **options) == {"default": wanted["default"]}


def test_choice_is_the_formula_for_symbolic_sizes_and_explicit_meshes(monkeypatch):
    """The kernel supports neither symbolic sizes nor explicit mesh axes."""
    monkeypatch.setattr(module, "_on_hopper", lambda: True)
    (batch,) = jax.export.symbolic_shape("batch")
    given = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in shapes()]
    assert choose(*given, CAUSAL) == {"default": "blocks"}
    for kind, wanted in ((AxisType.Explicit, {"default": "blocks"}), (AxisType.Auto, BOTH)):
        with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(kind,))):
            assert choose(*shapes(), CAUSAL) == wanted


@pytest.mark.parametrize(("backend", "capability", "installed", "wanted"), [
    ("gpu", "9.0", True, True), ("gpu", "8.0", True, False), ("gpu", "gfx90a", True, False),
    ("cpu", "9.0", True, False), ("gpu", "9.0", False, False)])
def test_on_hopper_by_backend_capability_and_cudnn(
        backend, capability, installed, wanted, monkeypatch):
    def version():
        if not installed:
            raise RuntimeError("cuDNN is not detected.")
        return 91000

    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(cudnn, "check_cudnn_version", version)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert module._on_hopper.__wrapped__() is wanted


@pytest.mark.parametrize(("given", "pattern", "options", "wants"), [
    (shapes(dtype=jnp.float32), CAUSAL, {}, "bfloat16 or float16"),
    (shapes(features=60), CAUSAL, {}, "the larger size of keys and values as a multiple of 8 "
                                      "up to 128"),
    (shapes(), Pattern(mask=PAIRS), {},
     "only causal attention, a causal window, or a mask of keys"),
])
def test_cudnn_raises_for_unsupported_inputs(given, pattern, options, wants):
    got = f"({show(given[0])}, {show(given[2])})"
    expect("", f"wants {wants}, for cuDNN's attention, got {got}; leave "
           "implementation=None to choose by platform, dtype and shape",
           lambda: choose(*given, pattern, implementation="cudnn", **options))


def test_cudnn_raises_if_not_installed(monkeypatch):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(cudnn, "check_cudnn_version", missing)
    given = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes(8, features=8))
    expect("", "wants cuDNN, which comes with JAX for NVIDIA GPUs, got cuDNN is not detected; "
           "leave implementation=None to choose by platform, dtype and shape",
           lambda: dot_product(*given, implementation="cudnn"))


@pytest.mark.slow
def test_one_program_is_lowered_to_each_platform(monkeypatch, request):
    """A program with the branch of cuDNN runs on a CPU, and calls cuDNN on CUDA."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    request.addfinalizer(dot_product.clear_cache)  # traced as for a Hopper
    given = jax.tree.map(jnp.bfloat16, inputs(70, groups=2, features=8, value_features=8))

    def traced():
        def total(*qkv):
            y = dot_product(*qkv, Pattern(causal=True, window=9))
            return y.astype(jnp.float32).sum(), y

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True)).trace(*given)

    wanted = traced().lower(lowering_platforms=("cpu",))
    monkeypatch.setattr(module, "_on_hopper", lambda: True)
    dot_product.clear_cache()
    found = traced()
    on_cpu = found.lower(lowering_platforms=("cpu",))
    assert "__cudnn" not in on_cpu.as_text()
    on_cuda = found.lower(lowering_platforms=("cuda",)).as_text()
    assert on_cuda.count("@__cudnn$fmha") == 2  # forwards and backwards
    with jax.default_device(jax.devices("cpu")[0]):
        close(on_cpu.compile()(*given), wanted.compile()(*given))


# Precision.

def test_16_bit_inputs_are_summed_in_float32():
    """The error is that of rounding weights, values and y once, for any number of keys."""
    query, key, value = (jnp.bfloat16(a) for a in (
        drawn(1, 2, 8, 16), drawn(1, 2, 3000, 16, seed=1), 1 + drawn(1, 2, 3000, 4, seed=2)))
    wanted = attend(*(np.asarray(a, np.float64) for a in (query, key, value)))
    y = jax.jit(dot_product)(query, key, value)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=0, atol=2**-8 * 1.5)
    text = str(jax.make_jaxpr(dot_product)(query, key, value))
    assert text.count("preferred_element_type=float32") == text.count("= dot_general[") == 2
    assert all(re.search(rf":f32\[[\d,]+\] = {f}", text) for f in ("exp ", "reduce_sum", "div "))
    alike = jnp.ones((1, 3000, 4), jnp.bfloat16)
    np.testing.assert_array_equal(dot_product(alike, alike, alike), 1)  # 256 + 1 is 256 in bfloat16


def test_large_scores_do_not_overflow():
    key = jnp.float16([[[300.0] * 8, [299.0] * 8]])
    value = jnp.float16([[[1.0, 2.0], [3.0, 4.0]]])
    y, slope = jax.jit(jax.value_and_grad(
        lambda k: dot_product(k, k, value, scale=1.0).astype(jnp.float32).sum()))(key)
    assert 8 * 300**2 > float(jnp.finfo(jnp.float16).max)
    assert float(y) == 6.0 and bool(jnp.isfinite(slope).all())


# Queries without keys, and dropped weights.

@pytest.mark.parametrize("way", ["xla", "blocks"])
def test_a_query_without_keys_returns_zeros_and_has_no_gradient(way):
    given = tuple(a.astype(np.float32) for a in inputs())
    seen, bias = PAIRS.copy(), np.zeros((2, 4, STEPS, STEPS), np.float32)
    seen[1] = seen[0, :, 2] = False

    def total(given, bias):
        y = dot_product(*given, Pattern(mask=seen, empty=True), bias=bias, implementation=way)
        return jnp.sum(y * y + y), y

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, y), (slopes, of_bias) = jax.tree.map(np.asarray, run(given, bias))
    assert not y[1].any() and not y[0, :, 2].any() and y[0, :, :2].any()
    for slope in (*slopes, of_bias):
        assert not slope[1].any() and slope[0].any()
    assert not slopes[0][0, :, 2].any() and not of_bias[~seen].any()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["xla", "blocks"])
def test_dropped_weights(way):
    given = tuple(a.astype(np.float32) for a in inputs(groups=2))
    run = lambda rng, rate: dot_product(  # noqa: E731
        *given, CAUSAL, dropout=rate, rng=rng, implementation=way)
    wanted = np.asarray(jax.jit(run, static_argnums=1)(None, 0.4))
    many = np.asarray(jax.jit(jax.vmap(lambda rng: run(rng, 0.4)))(jax.random.split(KEY, 4000)))
    spread = many.std(0) / np.sqrt(len(many))
    assert (np.abs(many.mean(0) - wanted) <= 5 * spread).all() and (spread > 0).all()
    first = many[:, :, :, 0] / wanted[:, :, 0]  # of a single weight, which is 1
    np.testing.assert_allclose(np.where(first > 0.5, first - 1 / 0.6, first), 0, atol=1e-5)
