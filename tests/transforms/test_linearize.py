"""`linearize`: value and slope of the layer at the origin, linear in the parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY, X, close, gradient, names, same
from support.refusing import expect, refused

import diffprog as dp

NET = dp.serial(body=dp.repeat(2, dp.residual(dp.linear(4) >> jnp.tanh)), head=dp.linear(2))
NORMED = dp.serial(dp.linear(4), dp.batch_norm(), jnp.tanh, dp.linear(2))


def made(net, x=X):
    """The linearized net, its parameters and state, and parameters far from the origin."""
    expanded = dp.linearize(net)
    params, state = jax.jit(expanded.init)(KEY, x)
    return expanded, params, state, jax.tree.map(
        lambda p: p + jnp.sin(jnp.arange(3.0, 3 + p.size)).reshape(p.shape).astype(p.dtype), params)


@functools.partial(jax.jit, static_argnums=0)
def run(net, params, x, state):
    return net(params, x, state=state)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_value_plus_jacobian_at_the_origin(train):
    with jax.enable_x64(True):
        x = X.astype(jnp.float64)
        expanded, params, state, moved = made(NORMED, x)
        own = {name: part for name, part in state.items() if name != "origin"}
        plain = jax.jit(lambda p: NORMED.apply(p, own, x, train=train)[0])
        wanted = np.array(plain(params))
        for path, slopes in dp.tree.paths(jax.jit(jax.jacobian(plain))(params)).items():
            step = dp.tree.paths(moved)[path] - dp.tree.paths(params)[path]
            wanted += np.tensordot(slopes, step, step.ndim)
        y, _ = jax.jit(expanded.apply, static_argnames="train")(moved, state, x, train=train)
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
        assert np.abs(y - plain(moved)).max() > 0.1  # far from the layer itself


def test_value_and_gradient_equal_the_layer_at_the_origin():
    expanded, params, state, moved = made(NET)
    close(run(expanded, params, X, state), run(NET, params, X, {}))
    close(gradient(expanded, params, state=state), gradient(NET, params))
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float64), tree)  # noqa: E731
        params, state, moved, x = wide((params, state, moved, X))

        @jax.jit
        def error(step):
            there = jax.tree.map(lambda a, b: a + step * (b - a), params, moved)
            return jnp.abs(NET(there, x) - expanded(there, x, state=state)).max()

        assert float(error(1e-3) / error(5e-4)) == pytest.approx(4, rel=0.01)  # of second order


@pytest.mark.slow
@pytest.mark.parametrize("net", [dp.linear(3), dp.conv(2, 3, dims=1)], ids=repr)
def test_a_layer_linear_in_its_parameters_is_unchanged(net):
    x = jnp.stack([X, X])
    expanded, _, state, moved = made(net, x)
    close(run(expanded, moved, x, state), run(net, moved, x, {}))


@pytest.mark.slow
def test_names_stay_and_the_state_has_the_origin():
    expanded, params, state, _ = made(NORMED)
    assert names(expanded) == names(NORMED)
    assert names(dp.serial(dp.linearize(dp.linear(2)))) == ["linear_0"]
    wanted, own = NORMED.init(KEY, X)
    same(params, wanted)
    same(state, own | {"origin": wanted})
    assert dp.linearize(jnp.tanh).init(KEY, X) == ({}, {})
    same(dp.linearize(jnp.tanh)({}, X), jnp.tanh(X))


def test_the_origin_may_be_replaced():
    expanded, _, state, moved = made(NET)
    close(run(expanded, moved, X, state | {"origin": moved}), run(NET, moved, X, {}))


def test_running_statistics_are_those_at_the_origin():
    expanded, params, state, moved = made(NORMED)
    own = {name: part for name, part in state.items() if name != "origin"}
    after, wanted = jax.jit(lambda moved, params: (
        expanded.apply(moved, state, X, train=True)[1],
        NORMED.apply(params, own, X, train=True)[1]))(moved, params)
    same(after["origin"], state["origin"])
    close({name: part for name, part in after.items() if name != "origin"}, wanted)


@pytest.mark.slow
def test_training_follows_the_tangent_kernel():
    """For half the sum of squares: ``f_t = y + (1 - rate K)^t (f_0 - y)``, exactly."""
    rate, steps = 0.02, 20
    y = jnp.cos(jnp.arange(6.0)).reshape(3, 2)
    expanded = dp.linearize(NET)
    step = dp.make_step(expanded, dp.regression(lambda f, y, mask: jnp.sum((f - y) ** 2) / 2),
                        optax.sgd(rate))
    state = step.init(KEY, X)  # buffers are donated: parameters and origin must not share any
    first = jax.tree.map(jnp.copy, state.params)
    for _ in range(steps):
        state, _ = step.apply(state, (X, y))
    same(state.state["origin"], first)
    kernel = np.asarray(jax.jit(functools.partial(dp.gradients.tangent_kernel, NET))(first, X),
        np.float64)
    shrink = np.eye(6) - rate * kernel.swapaxes(1, 2).reshape(6, 6)
    begin = np.asarray(run(NET, first, X, {}) - y).ravel()
    wanted = np.linalg.matrix_power(shrink, steps) @ begin
    found = np.asarray(run(expanded, state.params, X, state.state) - y).ravel()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.linalg.norm(found) < 0.7 * np.linalg.norm(begin)


@pytest.mark.slow
def test_integer_outputs_are_unchanged():
    net = dp.linear(3) >> (lambda y: (y, y.argmax(-1)))
    expanded, params, state, moved = made(net)
    y, best = run(expanded, moved, X, state)
    same(best, run(net, params, X, {})[1])
    close(y, run(net, moved, X, {})[0])


def test_a_missing_or_different_origin_raises():
    expanded, params, state, _ = made(NET)
    other = dp.linear(2).init(KEY, X)[0]
    expect("", "linearize(serial(body=repeat(2, residual(serial(linear(4), jax.nn.tanh))), "
           "head=linear(2))): wants origin with body/body/linear_0/bias, got none",
           expanded, params, X)
    assert "origin with" in refused(expanded, params, X, state={"origin": other}).wants
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    message = str(refused(expanded, narrow, X, state=state))
    assert "origin body/body/linear_0/bias as bfloat16[2,4], got float32[2,4]" in message
