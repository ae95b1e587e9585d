"""Every law on every registered layer, and on faulty layers that each law must catch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, floats
from comparing import same

import diffprog as dp
from diffprog.laws import LAWS
from diffprog.trials import Trial

TIME = {"nothing depends on the future", "streaming equals all at once"}
GRADIENTS = {"gradients agree", "gradients are finite"}


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow) for case in CASES])
def test_every_law_holds(case):
    options = case.options or {}
    report = dp.check(case.layer, case.x, **options)
    left_out = set() if options.get("causal") else set(TIME)
    left_out |= set() if options.get("batched", True) else {"examples do not mix"}
    left_out |= {"gradients agree"} if "precision" in options else set()
    left_out |= set() if options.get("smooth", True) else GRADIENTS
    assert set(report.laws) == set(LAWS) - left_out


def test_every_layer_and_combinator_has_a_case():
    shown = " ".join(repr(case.layer) for case in CASES)
    makers = {name for name in dp.__all__ if hasattr(getattr(dp, name), "__wrapped__")}
    assert makers and not {name for name in makers if f"{name}(" not in shown}


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


MASK = {"mask": jnp.array([[True, False], [True, True], [False, True]])}

# law -> the faulty layer, and the side inputs under which it is at fault
FAULTS = {
    "declared shapes are real": _other_shape_in_training,
    "init is abstract": _init_is_not_abstract,
    "jit equals eager": _counts_in_python,
    "state keeps its structure": _state_appears_in_training,
    "results are determined": _draws_unseeded,
    "keys matter in training": _ignores_its_key,
    "gradients are finite": lambda: plain(lambda scale, x: _root(scale * x)),
    "dtypes are kept": lambda: plain(lambda scale, x: x * jnp.float32(2)),
    "siblings keep their values": _changes_with_its_neighbours,
    "rebuild gives the same layer": _rebuilds_another,
    "side inputs have effect": _forgets_its_mask,
    "examples do not mix": lambda: plain(lambda scale, x: scale * (x - x.mean(0))),
    "padding changes nothing": _averages_the_padding,
    "nothing depends on the future": _looks_ahead,
    "streaming equals all at once": _sums_up_without_a_carry,
    "gradients agree": lambda: plain(lambda scale, x: _cube(scale * x)),
}
SIDE = {"side inputs have effect": {"mask": jnp.ones((3, 2), bool)},
        "padding changes nothing": MASK}


def test_every_law_has_a_faulty_layer():
    assert FAULTS.keys() == LAWS.keys()


def inside_program(layer):
    @dp.program(inner=layer)
    def around(layers, x):
        return layers.inner(x)

    return around


PLACES = {"bare": lambda f: f, "in repeat": lambda f: dp.repeat(2, f), "in program": inside_program}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("law", FAULTS)
def test_each_law_catches_its_fault(law, place):
    layer, key = PLACES[place](FAULTS[law]()), jax.random.key(0)
    with jax.enable_x64(True):
        trial = Trial.of(layer, floats(3, 2, 3), key, SIDE.get(law, {}))
        with pytest.raises((dp.LayerError, TypeError)):
            LAWS[law](trial)


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
    assert "2 broken" in str(caught.value)
    assert "examples do not mix" in str(caught.value) and "gradients agree" in str(caught.value)


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


def test_check_says_which_side_inputs_it_did_not_try():
    report = dp.check(_forgets_its_mask(), floats(2, 3))
    assert report.untried == ["mask"] and "not tried: mask" in str(report)
