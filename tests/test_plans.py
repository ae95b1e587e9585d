"""Planning: every leaf is traced once."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import KEY, X

import diffprog as dp


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
