"""`ema`: the average, its use in inference, and training, which ignores it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY, X, close, gradient, same

import diffprog as dp


def test_the_average_in_numpy():
    net = dp.ema(dp.linear(3), decay=0.75)
    params, state = net.init(KEY, X)
    plain = dp.linear(3)
    same(net(params, X, state=state), plain(params, X))
    average = np.zeros((4, 3))
    for i in range(1, 7):
        params = jax.tree.map(lambda p: p + 1, params)
        y, state = net.apply(params, state, X, train=True)
        same(y, plain(params, X))
        kernel = np.asarray(params["kernel"], np.float64)
        # The mean of the first four, then a quarter of each.
        average = (average * (i - 1) + kernel) / i if i <= 4 else 0.75 * average + 0.25 * kernel
    np.testing.assert_allclose(state["#ema"]["kernel"]["average"], average, rtol=1e-6)
    merged, rest = dp.tree.merge(net, params, state)
    close(merged["kernel"], average.astype(np.float32))
    close(net(params, X, state=state), plain(merged, X))
    assert rest == {}


def test_no_gradient_in_inference():
    net = dp.ema(dp.linear(3))
    params, state = net.init(KEY, X)
    grads = gradient(lambda p, x: net(p, x, state=state), params)
    assert not any(bool(leaf.any()) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_training_uses_parameters_and_validation_the_average():
    """A step donates each buffer once, so the average must not share one with the parameters."""
    x, y = X, jnp.array([0, 1, 2])
    states = []
    for net in (dp.ema(dp.linear(3), 0.5), dp.linear(3)):
        step = dp.make_step(net, dp.classification(), optax.sgd(0.5))
        state = step.init(KEY, x)
        for _ in range(5):
            state, _ = step.apply(state, (x, y))
        states.append((state, step.evaluate(state, (x, y))["loss"]))
    (averaged, loss), (plain, least) = states
    same(averaged.params, plain.params)
    assert loss > least  # the average lags behind
