"""Planning: every leaf is traced once."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, X

import diffprog as dp
from diffprog.core.plans import remember


def leaf(log):
    def forward(params, x):
        log.append(x.shape)
        return params["scale"] * x

    return dp.stateless(lambda key, x: {"scale": jnp.ones(x.shape[-1])}, forward, name="leaf")


TRACED = {
    "serial": dp.serial, "residual": dp.residual, "remat": dp.remat,
    "repeat": lambda f: dp.repeat(2, f), "heads": lambda f: dp.heads(2, f),
    "branch": lambda f: dp.branch(f, abs) >> dp.add,
    "program with train": lambda f: dp.program(f=f)(lambda layers, x, *, train: layers.f(x)),
    "shared": lambda f: dp.program(f=f)(lambda layers, x: layers.f(layers.f(x))),
}


@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("wrap", TRACED)
def test_init_traces_each_leaf_once(wrap, depth):
    log = []
    net = leaf(log)
    for _ in range(min(depth, 2) if wrap in ("repeat", "heads") else depth):
        net = TRACED[wrap](net)
    net.init(KEY, X)
    assert len(log) == 1
    net.init(KEY, X)
    net.init(jax.random.key(1), X + 1)
    net.plan(X)
    assert len(log) == 1
    net.init(KEY, X[:2])
    assert len(log) == 2


def test_a_layer_in_two_places_is_traced_once():
    log = []
    one = leaf(log)
    dp.serial(dp.serial(one), dp.residual(dp.serial(one)), one).init(KEY, X)
    assert len(log) == 1


def test_apply_traces_each_leaf_once_more():
    log = []
    net = dp.serial(dp.serial(dp.serial(leaf(log))))
    params, state = net.init(KEY, X)
    log.clear()
    jax.jit(net.apply)(params, state, X)
    assert len(log) == 1


def test_trees_of_another_dtype_differ_from_the_plan():
    """Also where JAX would narrow what it is given without a word."""
    net = dp.linear(3)
    params, _ = net.init(KEY, X)
    assert net.plan(X).difference(params) is None
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    error = net.plan(X).difference(wide)
    assert error is not None and "float64" in error.got and "as float32" in error.wants


def fit(width=8):
    """A layer that projects what is of another width, and has parameters only then."""

    def init(key, x):
        return {} if x.shape[-1] == width else {
            "kernel": jax.random.normal(key, (x.shape[-1], width))}, {}

    def apply(params, state, x, *, key=None, train=False):
        return x @ params["kernel"] if params else x, state

    return dp.Layer(init, apply, name="fit")


def test_a_recipe_has_other_parameters_in_another_place():
    """The plan of the last place says nothing of the first."""
    one = fit()
    net = dp.serial(a=one, b=dp.linear(8), c=one)
    params, state = net.init(KEY, X)
    assert sorted(params) == ["a", "b"]
    wanted = X @ params["a"]["kernel"] @ params["b"]["kernel"]
    np.testing.assert_allclose(net(params, X), wanted, rtol=1e-5)
    jax.eval_shape(dp.serial(a=fit(), b=dp.linear(8), c=fit()).apply, params, state, X)


def test_a_recipe_that_was_initialized_on_two_widths_takes_the_parameters_of_both():
    one = fit()
    narrow, wide = one.init(KEY, X)[0], one.init(KEY, jnp.ones((3, 8)))[0]
    assert one(narrow, X).shape == one(wide, jnp.ones((3, 8))).shape == (3, 8)
    for params, x, names in ((wide, X, "kernel"), (narrow, jnp.ones((3, 8)), "none")):
        with pytest.raises(dp.LayerError, match=f"wants params {names}"):
            one(params, x)


def test_a_call_traces_a_leaf_once_for_its_parameters():
    """`apply` of a leaf is traced for its own sake alone."""
    log = []
    net = leaf(log)
    params, state = net.init(KEY, X)
    log.clear()
    jax.eval_shape(net.apply, params, state, X[:1])
    assert log == [(1, 4)]


def test_a_plan_of_one_setting_is_not_that_of_another():
    net = dp.linear(3)
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)

    def keyed(key, x):
        return {}, {"key": jax.random.key(0)}

    keeps = dp.Layer(keyed, lambda params, state, x, **_: (x, state))
    assert net.plan(x).params["kernel"].dtype == jnp.float32
    with jax.enable_x64(True):
        wide = net.plan(jax.ShapeDtypeStruct((2, 4), jnp.float64))
    assert wide.params["kernel"].dtype == jnp.float64
    kinds = set()
    for impl in ("threefry2x32", "rbg"):
        with jax.default_prng_impl(impl):
            kinds.add(str(keeps.plan(x).state["key"].dtype))
    assert len(kinds) == 2


def test_plans_of_what_a_plan_has_just_made_come_to_an_end():
    """Nothing stays noted in it, so to begin anew does not help."""
    def nested(times):
        return remember(lambda x, side: 1 + nested(times - 1)(x, side) if times else 0)

    assert nested(150)(X, {}) == 150
