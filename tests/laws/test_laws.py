"""Every law on every registered layer, and on faulty layers that each law must catch."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, floats
from comparing import same
from names import makers

import diffprog as dp
from diffprog.core.layer import as_layer
from diffprog.laws.laws import LAWS
from diffprog.laws.trial import Options, Trial


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow) for case in CASES])
def test_every_law_holds(case):
    """A law counts as held only with a witness; which have none is listed by hand."""
    report = dp.check(case.layer, case.x, **case.options or {})
    given = as_layer(case.layer).side - case.side.keys()
    assert report.untried.keys() - given == case.reasons.keys()
    assert set(report.laws) == LAWS.keys() - case.reasons.keys()
    assert len(report.untried) == len(LAWS) - len(report.laws) + len(given)


def test_every_law_is_held_by_many_cases():
    """As listed, which the test above compares to what is found."""
    held = collections.Counter(law for case in CASES for law in LAWS if law not in case.reasons)
    assert not {law: held[law] for law in LAWS if held[law] < 20}
    assert all(case.reasons.keys() <= LAWS.keys() for case in CASES)


def test_every_layer_and_combinator_has_a_case():
    shown = " ".join(repr(case.layer) for case in CASES)
    assert makers() and not {name for name in makers() if f"{name}(" not in shown}


def wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def scaling(apply, *, state=None, random=False, side=frozenset(), start=None, **fields):
    """A layer with one parameter, whose apply is at fault."""
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
    """The dtype changes from call to call, so that shapes alone cannot tell it."""
    calls = itertools.count()

    def init(key, x):
        dtype = jnp.float64 if next(calls) % 2 else jnp.float32
        return {"scale": jnp.ones(x.shape[-1], dtype)}, {}

    return dp.Layer(init, lambda p, s, x, **_: (x * p["scale"].astype(x.dtype), s))


def _counts_in_python():
    calls = itertools.count()
    return plain(lambda scale, x: scale * x + next(calls))


def _counts_where_it_runs():
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


def _draws_at_rest():
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

# law -> the faulty layer, and the side inputs under which it is at fault
FAULTS = {
    "declared shapes are real": _other_shape_in_training,
    "init is abstract": _init_is_not_abstract,
    "jit equals eager": _counts_where_it_runs,
    "state keeps its structure": _state_appears_in_training,
    "results are determined": _draws_unseeded,
    "keys matter in training": _ignores_its_key,
    "no two draws share a key": _draws_twice,
    "noise keeps the mean": _drops_without_dividing,
    "gradients are finite": lambda: plain(lambda scale, x: _root(scale * x)),
    "sums are right in sixteen bits": lambda: plain(lambda scale, x: scale * x),
    "dtypes are kept": lambda: plain(lambda scale, x: x * jnp.float32(2)),
    "siblings keep their values": _changes_with_its_neighbours,
    "rebuild gives the same layer": _rebuilds_another,
    "side inputs have effect": _forgets_its_mask,
    "a batch is its examples": lambda: plain(lambda scale, x: scale * (x - x.mean(0))),
    "padding changes nothing": _averages_the_padding,
    "more padding changes nothing": _averages_over_the_padding,
    "a segment is as if alone": _sums_up_over_segments,
    "nothing depends on the future": _looks_ahead,
    "streaming equals all at once": _sums_up_without_a_carry,
    "gradients agree": lambda: plain(lambda scale, x: _cube(scale * x)),
}
SIDE = {"side inputs have effect": {"mask": jnp.ones((3, 2), bool)},
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
        trial = Trial.of(layer, x, jax.random.key(0), side, Options(causal=law in CAUSAL))
        with pytest.raises((dp.LayerError, TypeError)):
            LAWS[law](trial)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("law", FAULTS)
def test_each_law_catches_its_fault(law, place):
    layer = PLACES[place](FAULTS[law]())
    breaks(law, layer, floats(3, 2, 3), SIDE.get(law, {}))


@pytest.mark.parametrize("place", ["bare", "in program"])  # which is traced once for both
def test_what_counts_its_traces_is_no_function(place):
    breaks("jit equals eager", PLACES[place](_counts_in_python()), floats(3, 2, 3), {})


def test_a_wrong_gradient_is_caught_behind_ids_too():
    with pytest.raises(dp.LayerError, match="1 broken; mend it by these:\n  gradients agree"):
        dp.check(dp.embedding(3, 2) >> _cube, jnp.array([[0, 2], [1, 1]]))


def test_the_padding_of_ids_is_filled_too():
    ids = jnp.array([[0, 2], [4, 1], [3, 1]])
    with pytest.raises(dp.LayerError, match="\n  padding changes nothing"):
        dp.check(dp.embedding(5, 3) >> _averages_the_padding(), ids, **MASK)


def test_a_side_input_may_have_its_effect_in_a_stream_alone():
    """A mask beside positions says which step is the last real one, and nothing else."""
    net, x = dp.sinusoidal_positions(), jnp.ones((2, 2, 4))
    side = {"mask": jnp.ones((2, 2), bool), "positions": jnp.array([[0, 1], [3, 4]])}
    dp.check(net, x, **side)
    for mask in (side["mask"], ~side["mask"]):
        same(net({}, x, positions=side["positions"], mask=mask), net({}, x, **side))


def test_check_lists_every_law_that_fails():
    with pytest.raises(dp.LayerError) as caught:
        dp.check(plain(lambda scale, x: _cube(scale * x) - x.mean(0)), floats(3, 2))
    assert "3 broken" in str(caught.value)
    assert "sums are right in sixteen bits" in str(caught.value)
    assert "a batch is its examples" in str(caught.value)
    assert "gradients agree" in str(caught.value)


def test_check_reports_an_init_that_reads_values():
    def init(key, x):
        return {"scale": jnp.ones(3) * float(jax.random.uniform(key))}, {}

    faulty = dp.Layer(init, lambda params, state, x, **_: (x * params["scale"], state))
    with pytest.raises(dp.LayerError, match="init works on shapes alone"):
        dp.check(faulty, floats(2, 3))


@pytest.mark.parametrize("place", PLACES)
def test_check_reports_a_layer_that_needs_a_key_at_rest(place):
    with pytest.raises(dp.LayerError, match="init works on shapes alone"):
        dp.check(PLACES[place](_draws_at_rest()), floats(2, 3))


def test_check_says_what_it_did_not_try_and_why():
    report = dp.check(dp.global_avg_pool(dims=1), floats(2, 4, 3))
    assert report.untried["mask"] == "not given"
    assert report.untried["padding changes nothing"] == "no mask is given"
    assert "not tried: padding changes nothing: no mask is given" in str(report)
    assert not report.untried.keys() & set(report.laws)


# Witnesses: a law is not held by what could not break it.

READING = dp.embedding(5, 4) >> dp.self_attention(1)


def test_one_id_over_and_over_is_no_witness_of_time():
    report = dp.check(READING, jax.ShapeDtypeStruct((2, 4), jnp.int32), causal=True)
    assert {"nothing depends on the future", "streaming equals all at once",
            "a batch is its examples"} <= report.untried.keys()


def test_attention_both_ways_looks_into_the_future():
    with pytest.raises(dp.LayerError, match="nothing depends on the future"):
        dp.check(READING, jnp.array([[0, 1, 2, 3], [4, 3, 0, 1]]), causal=True)


@pytest.mark.parametrize(("law", "layer", "x", "options"), [
    ("a batch is its examples", dp.linear(2), floats(1, 3), {}),
    ("a batch is its examples", dp.linear(2), jnp.ones((3, 2)), {}),
    ("padding changes nothing", dp.self_attention(1), floats(2, 3, 2),
     {"mask": jnp.ones((2, 3), bool)}),
    ("padding changes nothing", dp.hide(), floats(3, 2, 3), MASK),
    ("nothing depends on the future", dp.linear(2), floats(2, 1, 3), {"causal": True}),
    ("gradients agree", dp.one_hot(3), jnp.array([0, 2]), {}),
    ("sums are right in sixteen bits", dp.linear(2) >> jnp.sin, floats(2, 3), {}),
    ("noise keeps the mean", dp.dropout(0.5) >> jnp.sin, floats(2, 3), {}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_law_without_a_witness_is_not_held(law, layer, x, options):
    assert law in dp.check(layer, x, **options).untried


# Eight faults that once passed every law, each in three variants.

def shares(x, mask):
    """The mean over time of what the mask lets through, divided by the padding too."""
    real = jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0)
    return real.mean(1, keepdims=True)


def divides_by_padding():
    return scaling(lambda p, s, x, mask=None, **_: (
        p["scale"] * x + shares(x, mask), s), side=frozenset({"mask"}))


def holds_back_the_memory():
    return scaling(lambda p, s, x, memory=None, **_: (
        p["scale"] * x + jax.lax.stop_gradient(memory.mean(1)).reshape(
            len(x), *(1,) * (x.ndim - 2), -1), s), side=frozenset({"memory"}))


def looks_two_steps_ahead():
    """By a difference, which a change of all that comes later leaves as it is."""
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
        mean = shares(x, mask).mean((0, *range(1, x.ndim - 1)))
        after = {"mean": 0.9 * state["mean"] + 0.1 * jax.lax.stop_gradient(mean)}
        return x - state["mean"], after if train else state

    return dp.Layer(lambda key, x, **_: ({}, {"mean": jnp.zeros(x.shape[-1], wide(x))}), apply,
                    side=frozenset({"mask"}))


def draws_one_key_twice():
    return scaling(lambda p, s, x, key=None, train=False, **_: (
        p["scale"] * x * jax.random.bernoulli(key, 0.5, x.shape) * 4 * jax.random.bernoulli(
            key, 0.5, x.shape) if train else p["scale"] * x, s), random=True)


def drops_alike():
    """One mask for all examples, and what is kept is not divided by the share that is kept."""
    return scaling(lambda p, s, x, key=None, train=False, **_: (
        p["scale"] * x * jax.random.bernoulli(key, 0.5, x.shape[1:]) if train
        else p["scale"] * x, s), random=True)


def divides_by_the_batch():
    return scaling(lambda p, s, x, train=False, **_: (
        p["scale"] * x / (len(x) if train else 1), s))


EIGHT = {
    divides_by_padding: ["more padding changes nothing"],
    holds_back_the_memory: ["gradients agree"],
    looks_two_steps_ahead: ["nothing depends on the future"],
    streams_without_gradients: ["streaming equals all at once"],
    averages_the_padding_too: ["more padding changes nothing"],
    draws_one_key_twice: ["no two draws share a key", "noise keeps the mean"],
    drops_alike: ["no two draws share a key", "noise keeps the mean"],
    divides_by_the_batch: ["a batch is its examples"],
}
VARIANTS = {"another axis": ((2, 4, 2, 3), lambda f: f), "another size": ((3, 5, 2), lambda f: f),
            "in repeat": ((2, 4, 3), lambda f: dp.repeat(2, f))}


@pytest.mark.parametrize("variant", [pytest.param(
    name, marks=[pytest.mark.slow] * (name != "another size")) for name in VARIANTS])
@pytest.mark.parametrize("fault", EIGHT)
def test_what_once_passed_every_law_is_caught(fault, variant):
    shape, place = VARIANTS[variant]
    given = {"mask": jnp.arange(math.prod(shape[:2])).reshape(shape[:2]) % 3 != 1,
             "memory": jnp.sin(jnp.arange(2.0 * shape[0] * shape[-1])).reshape(shape[0], 2, -1)}
    layer = place(fault())
    side = {name: value for name, value in given.items() if name in layer.side}
    for law in EIGHT[fault]:
        breaks(law, layer, floats(*shape), side)
