"""Every law on every case, and on faulty layers that break it."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, floats
from names import makers
from support.comparing import same

import diffprog as dp
from diffprog.core.layer import as_layer
from diffprog.laws.laws import LAWS
from diffprog.laws.trial import Options, Trial


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow) for case in CASES])
def test_every_law_holds(case):
    """The laws without a witness are those that the case lists."""
    report = dp.check(case.layer, case.x, **case.options or {})
    given = as_layer(case.layer).side - case.side.keys()
    assert report.untried.keys() - given == case.reasons.keys()
    assert set(report.laws) == LAWS.keys() - case.reasons.keys()
    assert len(report.untried) == len(LAWS) - len(report.laws) + len(given)


def test_every_law_is_held_by_many_cases():
    """By the lists of the cases, which the test above compares with the reports."""
    held = collections.Counter(law for case in CASES for law in LAWS if law not in case.reasons)
    assert not {law: held[law] for law in LAWS if held[law] < 20}
    assert all(case.reasons.keys() <= LAWS.keys() for case in CASES)


def test_every_layer_and_combinator_has_a_case():
    shown = " ".join(repr(case.layer) for case in CASES)
    assert makers() and not {name for name in makers() if f"{name}(" not in shown}


def wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def scaling(apply, *, state=None, random=False, side=frozenset(), start=None, **fields):
    """A layer with one parameter and a faulty `apply`."""
    return dp.Layer(
        lambda key, x, **_: ({"scale": jnp.ones(x.shape[-1], wide(x))}, dict(state or {})),
        apply, random=random, side=side, **fields,
    )


def plain(forward):
    return scaling(lambda p, s, x, **_: (forward(p["scale"].astype(x.dtype), x), s))


def _other_shape_in_training():
    return scaling(lambda p, s, x, train=False, **_: (
        (p["scale"] * x)[..., :1] if train else p["scale"] * x, s))


def _init_is_not_abstract():
    """The dtype changes from call to call."""
    calls = itertools.count()

    def init(key, x):
        dtype = jnp.float64 if next(calls) % 2 else jnp.float32
        return {"scale": jnp.ones(x.shape[-1], dtype)}, {}

    return dp.Layer(init, lambda p, s, x, **_: (x * p["scale"].astype(x.dtype), s))


def _counts_in_python():
    calls = itertools.count()
    return plain(lambda scale, x: scale * x + next(calls))


def _counts_at_runtime():
    calls = itertools.count()
    count = lambda dtype: np.asarray(next(calls), dtype)  # noqa: E731
    return plain(lambda scale, x: scale * x + jax.pure_callback(
        lambda: count(x.dtype), jax.ShapeDtypeStruct((), x.dtype)))


def _draws_unseeded():
    def init(key, x):
        return {"scale": jnp.asarray(np.random.default_rng().normal(size=x.shape[-1]))}, {}

    return dp.Layer(init, lambda p, s, x, **_: (x * p["scale"].astype(x.dtype), s))


def _state_appears_in_training():
    return scaling(lambda p, s, x, train=False, **_: (
        p["scale"] * x, {"seen": jnp.ones(())} if train else s))


def _ignores_its_key():
    return scaling(lambda p, s, x, **_: (p["scale"] * x, s), random=True)


@jax.custom_jvp
def _cube(x):
    return x**3


@_cube.defjvp
def _cube_jvp(primals, tangents):
    return _cube(*primals), 3.003 * primals[0] ** 2 * tangents[0]


@jax.custom_jvp
def _root(x):
    return jnp.sqrt(jnp.abs(x))


@_root.defjvp
def _root_jvp(primals, tangents):
    return _root(*primals), tangents[0] * jnp.sign(primals[0]) / (2 * _root(*primals))


def _changes_with_its_neighbours():
    made = itertools.count()

    def init(key, x):
        return {"scale": jnp.full(x.shape[-1], next(made), x.dtype)}, {}

    return dp.Layer(init, lambda p, s, x, **_: (x * p["scale"], s))


def _rebuilds_another():
    inner = dp.serial(dp.linear(3))
    return dp.Layer(inner.init, inner.apply, children=inner.children, name="inner",
                    rebuild=lambda children: dp.serial(dp.linear(3), jnp.tanh))


def _forgets_its_mask():
    return scaling(lambda p, s, x, mask=None, **_: (p["scale"].astype(x.dtype) * x, s),
                   side=frozenset({"mask"}))


def _draws_in_inference():
    return scaling(lambda p, s, x, key=None, **_: (
        p["scale"].astype(x.dtype) * x + jax.random.normal(key, x.shape, x.dtype), s), random=True)


def _averages_the_padding():
    return scaling(lambda p, s, x, mask=None, **_: (
        p["scale"].astype(x.dtype) * jnp.where(mask[..., None], x, 0) + x.mean(1, keepdims=True),
        s), side=frozenset({"mask"}))


def _sums_up_without_a_carry():
    return plain(lambda scale, x: scale * jnp.cumsum(x, 1))


def _looks_ahead():
    return plain(lambda scale, x: scale * x.sum(1, keepdims=True) + 0 * x)


def _draws_twice():
    return scaling(lambda p, s, x, key=None, train=False, **_: (
        p["scale"].astype(x.dtype) * x + (jax.random.normal(key, x.shape, x.dtype) if train else 0)
        - (jax.random.uniform(key, x.shape, x.dtype) if train else 0), s), random=True)


def _drops_without_dividing():
    return scaling(lambda p, s, x, key=None, train=False, **_: (
        p["scale"].astype(x.dtype) * x * (jax.random.bernoulli(key, 0.5, x.shape) if train else 1),
        s), random=True)


def _averages_over_the_padding():
    return scaling(lambda p, s, x, mask=None, **_: (
        p["scale"].astype(x.dtype) * x
        + jnp.where(mask[..., None], x, 0).mean(1, keepdims=True), s), side=frozenset({"mask"}))


def _sums_up_over_segments():
    return scaling(lambda p, s, x, segments=None, **_: (
        p["scale"].astype(x.dtype) * jnp.cumsum(x, 1) + 0 * segments[..., None].astype(x.dtype)
        if segments is not None else p["scale"].astype(x.dtype) * jnp.cumsum(x, 1), s),
        side=frozenset({"segments"}))


MASK = {"mask": jnp.array([[True, False], [True, True], [False, True]])}

# law -> a layer that breaks it
FAULTS = {
    "declared shapes are real": _other_shape_in_training,
    "init is abstract": _init_is_not_abstract,
    "jit equals eager": _counts_at_runtime,
    "state keeps its structure": _state_appears_in_training,
    "results are determined": _draws_unseeded,
    "keys matter in training": _ignores_its_key,
    "no two draws share a key": _draws_twice,
    "noise keeps the mean": _drops_without_dividing,
    "gradients are finite": lambda: plain(lambda scale, x: _root(scale * x)),
    "sums are accurate in 16 bits": lambda: plain(lambda scale, x: scale * x),
    "dtypes are kept": lambda: plain(lambda scale, x: x * jnp.float32(2)),
    "init does not depend on siblings": _changes_with_its_neighbours,
    "rebuild gives the same layer": _rebuilds_another,
    "side inputs have an effect": _forgets_its_mask,
    "examples do not mix": lambda: plain(lambda scale, x: scale * (x - x.mean(0))),
    "padding changes nothing": _averages_the_padding,
    "more padding changes nothing": _averages_over_the_padding,
    "segments do not mix": _sums_up_over_segments,
    "nothing depends on the future": _looks_ahead,
    "streaming equals all at once": _sums_up_without_a_carry,
    "steps are symmetric": lambda: plain(
        lambda scale, x: scale * x + jnp.arange(x.shape[1], dtype=x.dtype)[:, None]),
    "gradients agree": lambda: plain(lambda scale, x: _cube(scale * x)),
}
SIDE = {"side inputs have an effect": {"mask": jnp.ones((3, 2), bool)},
        "padding changes nothing": MASK, "more padding changes nothing": MASK}
CAUSAL = {"nothing depends on the future", "streaming equals all at once"}


def test_every_law_has_a_faulty_layer():
    assert FAULTS.keys() == LAWS.keys()


def inside_program(layer):
    @dp.program(inner=layer)
    def around(layers, x):
        return layers.inner(x)

    return around


PLACES = {"bare": lambda f: f, "in repeat": lambda f: dp.repeat(2, f), "in program": inside_program}


def breaks(law, layer, x, side):
    """Assert that a layer breaks a law."""
    with jax.enable_x64(True):
        trial = Trial.of(layer, x, jax.random.key(0), side, Options(
            causal=law in CAUSAL, symmetry="equivariant"))
        with pytest.raises((dp.LayerError, TypeError)):
            LAWS[law](trial)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("law", FAULTS)
def test_each_law_catches_its_fault(law, place):
    layer = PLACES[place](FAULTS[law]())
    breaks(law, layer, floats(3, 2, 3), SIDE.get(law, {}))


@pytest.mark.parametrize("place", ["bare", "in program"])  # which is traced once for both
def test_a_layer_that_counts_its_traces_is_caught(place):
    breaks("jit equals eager", PLACES[place](_counts_in_python()), floats(3, 2, 3), {})


def test_a_wrong_gradient_after_an_embedding_is_caught():
    with pytest.raises(dp.LayerError, match="1 broken; correct these:\n  gradients agree"):
        dp.check(dp.embedding(3, 2) >> _cube, jnp.array([[0, 2], [1, 1]]))


def test_padding_of_ids_is_changed_too():
    ids = jnp.array([[0, 2], [4, 1], [3, 1]])
    with pytest.raises(dp.LayerError, match="\n  padding changes nothing"):
        dp.check(dp.embedding(5, 3) >> _averages_the_padding(), ids, **MASK)


def test_a_side_input_may_have_an_effect_on_streams_only():
    """With positions, the mask only marks the last valid step."""
    net, x = dp.sinusoidal_positions(), jnp.ones((2, 2, 4))
    side = {"mask": jnp.ones((2, 2), bool), "positions": jnp.array([[0, 1], [3, 4]])}
    dp.check(net, x, **side)
    for mask in (side["mask"], ~side["mask"]):
        same(net({}, x, positions=side["positions"], mask=mask), net({}, x, **side))


def test_check_lists_all_broken_laws():
    with pytest.raises(dp.LayerError) as caught:
        dp.check(plain(lambda scale, x: _cube(scale * x) - x.mean(0)), floats(3, 2))
    assert "3 broken" in str(caught.value)
    assert "sums are accurate in 16 bits" in str(caught.value)
    assert "examples do not mix" in str(caught.value)
    assert "gradients agree" in str(caught.value)


def test_check_reports_an_init_that_reads_values():
    def init(key, x):
        return {"scale": jnp.ones(3) * float(jax.random.uniform(key))}, {}

    faulty = dp.Layer(init, lambda params, state, x, **_: (x * params["scale"], state))
    with pytest.raises(dp.LayerError, match="init works on shapes alone"):
        dp.check(faulty, floats(2, 3))


@pytest.mark.parametrize("place", PLACES)
def test_check_reports_a_layer_that_needs_a_key_in_inference(place):
    with pytest.raises(dp.LayerError, match="init works on shapes alone"):
        dp.check(PLACES[place](_draws_in_inference()), floats(2, 3))


def test_check_reports_untried_laws_with_reasons():
    report = dp.check(dp.global_avg_pool(dims=1), floats(2, 4, 3))
    assert report.untried["mask"] == "not given"
    assert report.untried["padding changes nothing"] == "no mask is given"
    assert "not tried: padding changes nothing: no mask is given" in str(report)
    assert not report.untried.keys() & set(report.laws)


# Witnesses: a law does not hold for a layer that could not break it.

ATTENTION = dp.embedding(5, 4) >> dp.self_attention(1)


def test_equal_ids_are_no_witness_of_time():
    report = dp.check(ATTENTION, jax.ShapeDtypeStruct((2, 4), jnp.int32), causal=True)
    assert {"nothing depends on the future", "streaming equals all at once",
            "examples do not mix"} <= report.untried.keys()


def test_bidirectional_attention_is_not_causal():
    with pytest.raises(dp.LayerError, match="nothing depends on the future"):
        dp.check(ATTENTION, jnp.array([[0, 1, 2, 3], [4, 3, 0, 1]]), causal=True)


@pytest.mark.parametrize(("law", "layer", "x", "options"), [
    ("examples do not mix", dp.linear(2), floats(1, 3), {}),
    ("examples do not mix", dp.linear(2), jnp.ones((3, 2)), {}),
    ("padding changes nothing", dp.self_attention(1), floats(2, 3, 2),
     {"mask": jnp.ones((2, 3), bool)}),
    ("padding changes nothing", dp.hide(), floats(3, 2, 3), MASK),
    ("nothing depends on the future", dp.linear(2), floats(2, 1, 3), {"causal": True}),
    ("gradients agree", dp.one_hot(3), jnp.array([0, 2]), {}),
    ("sums are accurate in 16 bits", dp.linear(2) >> jnp.sin, floats(2, 3), {}),
    ("noise keeps the mean", dp.dropout(0.5) >> jnp.sin, floats(2, 3), {}),
    ("steps are symmetric", dp.linear(3), jnp.ones((2, 3, 4)), {"symmetry": "equivariant"}),
    ("steps are symmetric", dp.collapse("mean"), jnp.ones((2, 3, 4)), {"symmetry": "invariant"}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_law_without_a_witness_is_untried(law, layer, x, options):
    assert law in dp.check(layer, x, **options).untried


@pytest.mark.parametrize(("layer", "symmetry"), [
    (dp.collapse("last"), "invariant"), (dp.collapse("mean"), "equivariant"),
    (dp.learned_positions(4) >> dp.self_attention(1), "equivariant"),
    (dp.self_attention(1), "invariant"), (dp.conv(3, 3, dims=1), "equivariant"),
    (dp.conv(3, 3, dims=1, padding_mode="circular"), "equivariant"),
    (dp.recurrent(dp.gru(3)), "equivariant"), (dp.self_attention(1, causal=True), "equivariant"),
])
def test_a_layer_without_the_symmetry_is_caught(layer, symmetry):
    """A circular convolution commutes with cycles, and not with all permutations."""
    with pytest.raises(dp.LayerError, match="1 broken; correct these:\n  steps are symmetric"):
        dp.check(layer, floats(2, 4, 3), symmetry=symmetry)


# Eight faults that early versions of the laws missed, each in three variants.

def masked_mean(x, mask):
    """The mean over time of the valid entries, wrongly divided by the length with padding."""
    valid = jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0)
    return valid.mean(1, keepdims=True)


def divides_by_padding():
    return scaling(lambda p, s, x, mask=None, **_: (
        p["scale"] * x + masked_mean(x, mask), s), side=frozenset({"mask"}))


def stops_the_gradient_of_memory():
    return scaling(lambda p, s, x, memory=None, **_: (
        p["scale"] * x + jax.lax.stop_gradient(memory.mean(1)).reshape(
            len(x), *(1,) * (x.ndim - 2), -1), s), side=frozenset({"memory"}))


def looks_two_steps_ahead():
    """By a difference of later steps, which is unchanged if all of them change alike."""
    return plain(lambda scale, x: scale * x + (
        x[:, jnp.minimum(jnp.arange(x.shape[1]) + 1, x.shape[1] - 1)] - x[:, -1:]))


def streams_without_gradients():
    def apply(params, state, x, *, key=None, train=False):
        if "total" not in state:
            return params["scale"] * jnp.cumsum(x, 1), state
        y = jnp.cumsum(x, 1) + state["total"][:, None]
        return jax.lax.stop_gradient(params["scale"] * y), {"total": y[:, -1]}

    return dp.Layer(
        lambda key, x: ({"scale": jnp.ones(x.shape[-1], wide(x))}, {}), apply,
        lambda params, state, x, *, length: {"total": jnp.zeros_like(x[:, 0])})


def averages_the_padding_too():
    def apply(params, state, x, *, key=None, train=False, mask=None):
        mean = masked_mean(x, mask).mean((0, *range(1, x.ndim - 1)))
        after = {"mean": 0.9 * state["mean"] + 0.1 * jax.lax.stop_gradient(mean)}
        return x - state["mean"], after if train else state

    return dp.Layer(lambda key, x, **_: ({}, {"mean": jnp.zeros(x.shape[-1], wide(x))}), apply,
                    side=frozenset({"mask"}))


def draws_one_key_twice():
    return scaling(lambda p, s, x, key=None, train=False, **_: (
        p["scale"] * x * jax.random.bernoulli(key, 0.5, x.shape) * 4 * jax.random.bernoulli(
            key, 0.5, x.shape) if train else p["scale"] * x, s), random=True)


def drops_the_same_in_all_examples():
    """One mask for all examples, without division by the probability of keeping."""
    return scaling(lambda p, s, x, key=None, train=False, **_: (
        p["scale"] * x * jax.random.bernoulli(key, 0.5, x.shape[1:]) if train
        else p["scale"] * x, s), random=True)


def divides_by_the_batch():
    return scaling(lambda p, s, x, train=False, **_: (
        p["scale"] * x / (len(x) if train else 1), s))


EIGHT = {
    divides_by_padding: ["more padding changes nothing"],
    stops_the_gradient_of_memory: ["gradients agree"],
    looks_two_steps_ahead: ["nothing depends on the future"],
    streams_without_gradients: ["streaming equals all at once"],
    averages_the_padding_too: ["more padding changes nothing"],
    draws_one_key_twice: ["no two draws share a key", "noise keeps the mean"],
    drops_the_same_in_all_examples: ["no two draws share a key", "noise keeps the mean"],
    divides_by_the_batch: ["examples do not mix"],
}
VARIANTS = {"another axis": ((2, 4, 2, 3), lambda f: f), "another size": ((3, 5, 2), lambda f: f),
            "in repeat": ((2, 4, 3), lambda f: dp.repeat(2, f))}


@pytest.mark.parametrize("variant", [pytest.param(
    name, marks=[pytest.mark.slow] * (name != "another size")) for name in VARIANTS])
@pytest.mark.parametrize("fault", EIGHT)
def test_a_fault_that_was_once_missed_is_caught(fault, variant):
    shape, place = VARIANTS[variant]
    given = {"mask": jnp.arange(math.prod(shape[:2])).reshape(shape[:2]) % 3 != 1,
             "memory": jnp.sin(jnp.arange(2.0 * shape[0] * shape[-1])).reshape(shape[0], 2, -1)}
    layer = place(fault())
    side = {name: value for name, value in given.items() if name in layer.side}
    for law in EIGHT[fault]:
        breaks(law, layer, floats(*shape), side)


@pytest.mark.parametrize("wrap", [
    lambda f: f, dp.remat, lambda f: dp.pin(f, train=True), lambda f: dp.repeat(1, f)])
def test_a_random_solver_is_recognized_in_wrappers(wrap):
    net = wrap(dp.fixed_point(dp.add >> dp.dropout(0.5)))
    with jax.enable_x64(True):
        trial = Trial.of(net, floats(2, 4), jax.random.key(0), {})
        assert "solver" in LAWS["no two draws share a key"](trial)
