"""Penalties of parameters, alone and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.refusing import refused
from support.training_nets import KEY, examples, train

import diffprog as dp

NET = dp.serial(body=dp.linear(4), head=dp.linear(3))


def params():
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32),
        NET.init(KEY, jnp.ones((1, 4)))[0])


@pytest.mark.parametrize(("penalty", "formula"), [
    (dp.losses.l1, lambda w: np.abs(w).sum()), (dp.losses.l2, lambda w: (w * w).sum())],
        ids=["l1", "l2"])
def test_penalties_are_their_formulas(penalty, formula):
    tree = params()
    for patterns, leaves in (
            ((), [tree["body"]["kernel"], tree["head"]["kernel"]]),
            (("head/*",), [tree["head"]["kernel"], tree["head"]["bias"]]),
            (("head/**", "**/kernel"), [tree["body"]["kernel"], *tree["head"].values()])):
        found = jax.jit(lambda tree, patterns=patterns: penalty(tree, *patterns))(tree)
        wanted = sum(formula(np.asarray(leaf, np.float64)) for leaf in leaves)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert found.shape == () and found.dtype == jnp.float32
    dp.gradients.check_gradients(penalty, tree)
    assert "a pattern that matches" in refused(penalty, tree, "**/kernels").wants
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    assert penalty(half).dtype == jnp.float32
    np.testing.assert_allclose(penalty(half), penalty(tree), rtol=0.01)


@pytest.mark.parametrize("penalty", [dp.losses.l1, dp.losses.l2])
def test_penalties_have_zero_gradient_at_zero(penalty):
    assert jax.grad(penalty)({"kernel": jnp.zeros(2)})["kernel"].tolist() == [0.0, 0.0]


@pytest.mark.slow
def test_a_penalty_is_trained_and_reported_beside_the_loss():
    x, y = examples()
    plain, rate = dp.classification(), 0.1
    objective = dp.training.penalized(plain, lambda p: rate * dp.losses.l2(p))
    step, bare = (dp.make_step(NET, o, optax.sgd(1.0), donate=False) for o in (objective, plain))
    state = step.init(KEY, x)
    (new, metrics), (other, wanted) = (s.apply(state, (x, y)) for s in (step, bare))
    assert set(metrics) == {*wanted, "penalty"}
    for name in wanted:
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-6)
    np.testing.assert_allclose(metrics["penalty"], rate * dp.losses.l2(state.params), rtol=1e-6)
    for name in ("body", "head"):
        pulled = other.params[name]["kernel"] - 2 * rate * state.params[name]["kernel"]
        np.testing.assert_allclose(new.params[name]["kernel"], pulled, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new.params[name]["bias"], other.params[name]["bias"], atol=1e-6)
    loss, _ = objective(NET, state.params, {}, (x, y), key=None, train=False)
    np.testing.assert_allclose(loss, metrics["loss"] + metrics["penalty"], rtol=1e-6)


@pytest.mark.slow
def test_a_penalty_is_reported_by_fit():
    x, y = examples()
    step = dp.make_step(
        NET, dp.training.penalized(dp.classification(), lambda p: 1e-2 * dp.losses.l1(p)),
        optax.sgd(0.1))
    data = dp.batches((x, y), 5)  # of unequal size
    result = train(step, data, 3, validation=data)
    (row,) = result.history
    assert row["validation/penalty"] == pytest.approx(1e-2
        * float(dp.losses.l1(result.state.params)))
    assert row["penalty"] > 0


def test_penalties_add_up():
    x, y = examples()
    once = dp.training.penalized(dp.classification(), dp.losses.l1)
    twice = dp.training.penalized(once, lambda p: 2 * dp.losses.l2(p, "**/bias"))
    tree = params()
    loss, (_, metrics) = twice(NET, tree, {}, (x, y), key=None, train=True)
    np.testing.assert_allclose(metrics["penalty"], dp.losses.l1(tree) + 2
        * dp.losses.l2(tree, "**/bias"))
    np.testing.assert_allclose(loss, metrics["loss"] + metrics["penalty"], rtol=1e-6)
