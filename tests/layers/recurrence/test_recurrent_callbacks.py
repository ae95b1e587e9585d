"""A cell runs once for each step, and never on zeros in place of an input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import diffprog as dp

X = jnp.ones((2, 3, 2))
MASK = {"mask": jnp.array([[True, True, False], [True, False, False]])}
SEGMENTS = {"segments": jnp.array([[0, 0, 1], [0, 2, 2]])}
CALLS = []


def noting(x):
    jax.debug.callback(lambda _: CALLS.append(1), x[0])
    return x


def noting_in_order(x):
    jax.debug.callback(lambda _: CALLS.append(1), x[0], ordered=True)
    return x


def noting_purely(x):
    return jax.pure_callback(lambda x: (CALLS.append(1), np.asarray(x))[1], x, x)


def noting_by_result(x):
    return io_callback(lambda x: (CALLS.append(1), np.asarray(x))[1], x, x)


def counted(f):
    CALLS.clear()
    jax.block_until_ready(f())
    jax.effects_barrier()
    return len(CALLS)


def made(cell, **options):
    net = dp.recurrent(cell, **options)
    return net, net.init(jax.random.key(0), X)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "side", "calls"), [
    ({"reverse": True}, MASK, 3), *(pytest.param(*given, marks=pytest.mark.slow) for given in (
        ({}, {}, 3), ({"unroll": 2}, {}, 3), ({}, MASK | SEGMENTS, 3),
        ({"bidirectional": True}, SEGMENTS, 6))),
], ids=str)
def test_a_cell_runs_once_for_each_step(options, side, calls):
    net, params = made(dp.serial(noting, dp.simple_rnn(2)), **options)
    assert counted(lambda: net(params, X, **side)) == calls
    assert counted(lambda: jax.jit(net.apply)(params, {}, X, **side)) == calls


@pytest.mark.slow
@pytest.mark.parametrize("callback", [
    jax.jit(noting), *(pytest.param(f, marks=pytest.mark.slow) for f in (
        noting, noting_in_order, noting_purely, noting_by_result))], ids=[
    "jitted", "debug", "in order", "pure", "by result"])
def test_no_callback_runs_for_the_initial_carry(callback):
    cell = dp.repeat(2, dp.serial(callback, dp.simple_rnn(2)))
    net, params = made(cell)
    assert counted(lambda: net(params, X)) == 6


@pytest.mark.slow
def test_a_stream_runs_a_cell_once_for_each_step():
    net, params = made(dp.serial(dp.simple_rnn(2), noting, dp.simple_rnn(2)))
    start = functools.partial(net.start, params, {}, X, length=3)
    state = start()
    assert counted(start) == 0
    assert counted(lambda: net.apply(params, state, X[:, :2])) == 2
    assert counted(lambda: net.apply(params, state, X[:, :2], segments=SEGMENTS["segments"][
        :, :2])) == 2


@pytest.mark.slow
def test_the_initial_carry_is_not_computed_from_zeros():
    net, params = made(dp.serial(lambda x: x / jnp.sum(x, -1, keepdims=True), dp.simple_rnn(2)))
    with jax.debug_nans(True):
        net.start(params, {}, X, length=3)
        assert jnp.isfinite(net(params, X)).all()
        with pytest.raises(FloatingPointError):
            net(params, 0 * X)


def test_the_initial_carry_depends_on_parameters_and_side_inputs():
    def start(params, state, x, *, length, context):
        return {"sum": params["scale"] * context}

    def apply(params, state, x, *, key=None, train=False, context):
        total = state.get("sum", 0) + x
        return total, {"sum": total} if state else state

    cell = dp.Layer(lambda key, x, **_: ({"scale": jnp.full((), 2.0)}, {}), apply, start,
                    side=frozenset({"context"}))
    context = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    net = dp.recurrent(cell)
    params, _ = net.init(jax.random.key(0), X, context=context)
    y, slope = jax.value_and_grad(lambda params: net(params, X, context=context)[:, 0].sum())(
        params)
    assert y == 2 * 10 + 4 and slope["scale"] == 10
