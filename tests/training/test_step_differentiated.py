"""Differentiating through training steps: MAML and learned learning rates, with any optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY, drawn

import diffprog as dp
from diffprog.gradients.agreement import widened

NET = dp.linear(3) >> jnp.tanh >> dp.linear(1)
TOLD, ASKED = ((drawn(5, 2, seed=seed), drawn(5, 1, seed=seed + 2)) for seed in (0, 1))
OPTIMIZERS = {
    "sgd": optax.sgd,
    "sgd with momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": lambda rate: optax.adam(rate, eps_root=1e-8),
    "adamw": lambda rate: optax.adamw(rate, eps_root=1e-8),
}


def error_after(params, rate, told, asked, *, optimizer=optax.sgd, net=NET):
    """The error on one batch after three training steps on another."""
    step = dp.make_step(net, dp.regression(), optimizer(rate), donate=False)
    now = step.init(KEY, told[0])
    now = now._replace(params=params, opt_state=optimizer(rate).init(params))
    now, _ = jax.lax.scan(lambda now, _: step.apply(now, told), now, length=3)
    return jnp.mean((net(now.params, asked[0]) - asked[1]) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_through_training_agree_with_finite_differences(name):
    """With respect to the initial parameters, the learning rate, and the data."""
    params, _ = NET.init(KEY, jnp.ones((5, 2)))
    found = dp.gradients.check_gradients(
        lambda params, rate, told: error_after(
            params, rate, told, jax.tree.map(jnp.asarray, ASKED), optimizer=OPTIMIZERS[name]),
        params, jnp.asarray(0.1), TOLD)
    assert len(found.rows) == 7 and all(row.reverse for row in found.rows)


@pytest.mark.slow
def test_a_gradient_of_one_step_is_that_of_the_formula():
    """d/dp L(p - r g(p)) = (1 - r H(p)) g'(p - r g(p)), of a quadratic with a known Hessian."""
    with jax.enable_x64(True):
        x, y, rate = drawn(6, 3), drawn(6, 1, seed=1), 0.1
        batch = (jnp.asarray(x), jnp.asarray(y))
        net = dp.linear(1, bias=False)
        step = dp.make_step(net, dp.regression(), optax.sgd(rate), donate=False)
        now = step.init(KEY, batch[0])
        w = np.asarray(drawn(3, 1, seed=2))

        def after(w):
            new, _ = step.apply(now._replace(params={"kernel": w}), batch)
            return jnp.mean((net(new.params, batch[0]) - batch[1]) ** 2)

        hessian = 2 * x.T @ x / 6
        slope = lambda w: 2 * x.T @ (x @ w - y) / 6  # noqa: E731
        wanted = (np.eye(3) - rate * hessian) @ slope(w - rate * slope(w))
        np.testing.assert_allclose(jax.grad(after)(jnp.asarray(w)), wanted, rtol=1e-10)


def dead(x):
    """A dead ReLU: its gradient is zero, and so is Adam's second moment."""
    return jax.nn.relu(x - 100)


@pytest.mark.slow
def test_the_root_of_adam_has_no_derivative_at_zero():
    """The gradient of sqrt(v) at v = 0 is NaN; `eps_root` moves the root away from 0."""
    net = dp.serial(dp.linear(3), dp.branch(dead, jnp.tanh, merge=dp.concatenate), dp.linear(1))
    with jax.enable_x64(True):
        told, asked = jax.tree.map(jnp.asarray, (TOLD, ASKED))
        params = jax.tree.map(widened, net.init(KEY, told[0])[0])

        def after(params, eps_root):
            adam = functools.partial(optax.adam, eps_root=eps_root)
            return error_after(params, 0.1, told, asked, net=net, optimizer=adam)

        assert dp.tree.nonfinite(jax.jit(jax.grad(after))(params, 0.0))
        dp.gradients.check_gradients(lambda params: after(params, 1e-8), params)


@pytest.mark.slow
def test_differentiating_a_donating_step_raises():
    step = dp.make_step(NET, dp.regression(), optax.sgd(0.1))
    now = step.init(KEY, TOLD[0])
    twice = lambda params: step.apply(step.apply(now._replace(params=params), TOLD)[0], TOLD)  # noqa: E731
    with pytest.raises(RuntimeError, match="deleted"):
        jax.grad(lambda params: sum(map(jnp.sum, jax.tree.leaves(twice(params)[0].params))))(
            now.params)
