"""Distributions of samples, and gradients of estimators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import drawn, same
from support.refusing import refused

import diffprog as dp

KEY = jax.random.key(0)
LOGITS = jnp.array([0.5, -1.0, 1.2, 0.0])
REWARDS = jnp.array([3.0, -1.0, 5.0, 2.0])
DRAWS = 20_000


def exact(logits, rewards):
    """``d/dlogits sum(softmax(logits) * rewards)``, in NumPy."""
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum()
    return p * (rewards - (p * rewards).sum())


def deviations(estimates, wanted):
    """The error of the mean of the estimates, in standard errors, for each entry."""
    estimates = np.asarray(estimates, np.float64)
    error = estimates.std(0, ddof=1) / np.sqrt(len(estimates))
    return np.abs(estimates.mean(0) - wanted) / error


# Normal distributions.


def test_gaussian_sample_has_the_mean_and_the_variance():
    mean, log_variance = jnp.array([-2.0, 0.0, 3.0]), jnp.array([0.0, -2.0, 1.0])
    pair = tuple(jnp.broadcast_to(a, (DRAWS, 3)) for a in (mean, log_variance))
    y = np.asarray(dp.estimators.gaussian_sample()({}, pair, key=KEY), np.float64)
    assert (deviations(y, np.asarray(mean)) < 4).all()
    variance = np.exp(np.asarray(log_variance))
    assert (deviations((y - np.asarray(mean)) ** 2, variance) < 4).all()
    assert abs(np.corrcoef(y.T)[0, 1]) < 4 / np.sqrt(DRAWS)


def test_gaussian_sample_is_the_mean_without_a_key_and_random_with_one_in_inference():
    net, pair = dp.estimators.gaussian_sample(), (
        jnp.asarray(drawn(4, 3)), jnp.asarray(drawn(4, 3, seed=1)))
    same(net({}, pair), pair[0])
    inference = net({}, pair, key=KEY)
    same(net.apply({}, {}, pair, key=KEY, train=True)[0], inference)
    assert (inference != pair[0]).all()
    assert (net({}, pair, key=jax.random.key(1)) != inference).all()
    assert refused(net.apply, {}, {}, pair, train=True).wants == "a key when train=True"


def test_the_gradient_flows_to_mean_and_log_variance():
    """For f(y) = y**2 with mean m and variance s: d E[f] / dm = 2 m, d E[f] / dlog s = s."""
    m, log_s = 0.7, -0.4

    @jax.jit
    def slopes(key):
        f = lambda pair: jnp.square(dp.estimators.gaussian_sample()({}, pair, key=key))  # noqa: E731
        grads = jax.grad(lambda pair: f(pair).sum())(
            (jnp.full(DRAWS, m), jnp.full(DRAWS, log_s)))
        return jnp.stack(grads, -1)

    assert (deviations(slopes(KEY), [2 * m, np.exp(log_s)]) < 4).all()


# Classes.


@pytest.mark.parametrize("temperature", [0.2, 3.0])
def test_gumbel_softmax_samples_classes_with_their_probability(temperature):
    net = dp.estimators.gumbel_softmax(temperature=temperature, hard=True)
    y = np.asarray(net({}, jnp.tile(LOGITS, (DRAWS, 1)), key=KEY))
    np.testing.assert_array_equal(np.sort(y)[:, -2:], np.tile([0.0, 1.0], (DRAWS, 1)))
    assert (deviations(y, jax.nn.softmax(LOGITS)) < 4).all()


@pytest.mark.slow
def test_a_soft_sample_is_the_softmax_of_noisy_logits():
    x, noise = drawn(5, 4), np.asarray(jax.random.gumbel(KEY, (5, 4)), np.float64)
    wanted = np.exp((x + noise) / 0.7)
    wanted /= wanted.sum(-1, keepdims=True)
    got = dp.estimators.gumbel_softmax(temperature=0.7)({}, jnp.asarray(x, jnp.float32), key=KEY)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_without_a_key_there_is_no_noise():
    x = jnp.asarray(drawn(5, 4))
    np.testing.assert_allclose(
        dp.estimators.gumbel_softmax(temperature=0.5)({}, x), jax.nn.softmax(2 * x), rtol=1e-6)
    hard = dp.estimators.gumbel_softmax(hard=True)({}, x)
    np.testing.assert_array_equal(hard, np.eye(4)[np.asarray(x).argmax(-1)])


@pytest.mark.slow
def test_a_hard_sample_is_the_argmax_of_the_soft_one_and_has_its_gradient():
    x, weights = jnp.asarray(drawn(5, 4)), jnp.asarray(drawn(5, 4, seed=1))
    soft, hard = (dp.estimators.gumbel_softmax(temperature=0.5, hard=hard)
        for hard in (False, True))

    def scored(net, x):
        y = net({}, x, key=KEY)
        return (weights * y).sum(), y

    (_, y), slope = jax.value_and_grad(functools.partial(scored, soft), has_aux=True)(x)
    (_, one), through = jax.value_and_grad(functools.partial(scored, hard), has_aux=True)(x)
    same(one, jax.nn.one_hot(y.argmax(-1), 4))
    assert np.abs(slope).max() > 0.1
    np.testing.assert_allclose(through, slope, rtol=1e-6)


def test_a_tie_of_the_soft_vector_is_decided_by_the_logits():
    """In bfloat16 a high temperature makes all entries equal, and their argmax is the first."""
    x = jnp.array([1.0, 2.0, 1.5], jnp.bfloat16)
    soft, hard = (dp.estimators.gumbel_softmax(temperature=1e4, hard=hard)({}, x)
        for hard in (False, True))
    assert soft.dtype == hard.dtype == jnp.bfloat16
    assert len(set(soft.tolist())) == 1 and hard.tolist() == [0.0, 1.0, 0.0]


# Estimators of a gradient.


@functools.partial(jax.jit, static_argnums=0)
def estimates(net, logits):
    """Estimates of the gradient of ``E[reward**2]``, from one sample each.

    The square is not linear, so a relaxed sample is biased.
    """
    def reward(logits, key):
        return jnp.square(net({}, logits, key=key) @ REWARDS)

    return jax.vmap(jax.grad(reward), (None, 0))(logits, jax.random.split(KEY, DRAWS))


@pytest.mark.slow
def test_gumbel_softmax_bias_falls_and_variance_rises_as_temperature_falls():
    wanted = exact(LOGITS, np.square(REWARDS))
    bias, spread = [], []
    for temperature in (2.0, 1.0, 0.5):
        found = np.asarray(estimates(dp.estimators.gumbel_softmax(temperature=temperature), LOGITS))
        error = np.linalg.norm(found.std(0)) / np.sqrt(DRAWS)
        bias.append(np.linalg.norm(found.mean(0) - wanted))
        spread.append(np.linalg.norm(found.std(0)))
        assert bias[-1] > 4 * error  # significant
    assert bias[0] > 1.5 * bias[1] > 1.5**2 * bias[2]
    assert spread[0] < spread[1] < spread[2]


@pytest.mark.parametrize("baseline", [None, 2.5, "leave_one_out"])
def test_the_score_function_is_unbiased(baseline):
    @jax.jit
    def found(logits):
        draws = jax.random.categorical(KEY, logits, shape=(4, DRAWS // 4))

        def means(logits, draws):
            log_p = jax.nn.log_softmax(logits)[draws]
            return dp.estimators.score_function(REWARDS[draws], log_p, baseline=baseline).mean()

        return jax.vmap(jax.grad(means), (None, 1))(logits, draws)

    assert (deviations(found(LOGITS), exact(LOGITS, REWARDS)) < 4).all()


@pytest.mark.slow
def test_a_baseline_reduces_the_variance():
    draws = jax.random.categorical(KEY, LOGITS, shape=(8, 500))

    @functools.partial(jax.jit, static_argnums=0)
    def spread(baseline, rewards):
        def mean(logits, draws):
            log_p = jax.nn.log_softmax(logits)[draws]
            return dp.estimators.score_function(rewards[draws], log_p, baseline=baseline).mean()

        return jax.vmap(jax.grad(mean), (None, 1))(LOGITS, draws).std(0)

    far = REWARDS + 10
    assert (spread("leave_one_out", far) < 0.5 * spread(None, far)).all()
    # The leave-one-out advantage does not change if a number is added to all rewards.
    np.testing.assert_allclose(
        spread("leave_one_out", far), spread("leave_one_out", REWARDS), rtol=1e-4)


def test_score_function_equals_its_formula():
    f, log_p = jnp.asarray(drawn(3, 2)), jnp.asarray(drawn(3, 2, seed=1))
    others = (np.asarray(f).sum(0) - f) / 2
    given = jnp.asarray(drawn(3, 2, seed=2))
    for baseline, b in ((None, 0), (1.5, 1.5), (given, given), ("leave_one_out", others)):
        y = lambda f, p, b=baseline: dp.estimators.score_function(f, p, baseline=b)  # noqa: E731
        np.testing.assert_array_equal(y(f, log_p), f)
        of_f, of_p = jax.grad(lambda f, p, y=y: y(f, p).sum(), (0, 1))(f, log_p)
        np.testing.assert_array_equal(of_f, 1)
        np.testing.assert_allclose(of_p, f - b, rtol=1e-5)


def test_score_function_is_finite_for_classes_of_probability_0():
    logits, f = jnp.array([0.0, 1.0, -jnp.inf]), jnp.array([1.0, 2.0, 4.0])
    y = lambda logits: dp.estimators.score_function(f, jax.nn.log_softmax(logits))  # noqa: E731
    assert y(logits).tolist() == f.tolist()
    probabilities = np.exp([0.0, 1.0, -np.inf]) / np.exp([0.0, 1.0]).sum()
    slope = jax.grad(lambda logits: y(logits).sum())(logits)
    np.testing.assert_allclose(slope, np.asarray(f) - f.sum() * probabilities, rtol=1e-5)


def test_straight_through_with_an_infinite_surrogate():
    y, slope = jax.value_and_grad(lambda x: dp.estimators.straight_through(jnp.float32(1), x))(
        -jnp.inf)
    assert [float(y), float(slope)] == [1, 1]


def test_straight_through_has_the_gradient_of_the_surrogate():
    x = jnp.asarray(drawn(200))
    y, slope = jax.value_and_grad(
        lambda x: dp.estimators.straight_through(jnp.round(x), jnp.sin(x)).sum())(x)
    np.testing.assert_array_equal(dp.estimators.straight_through(jnp.round(x), jnp.sin(x)),
        np.round(x))
    np.testing.assert_allclose(slope, np.cos(np.asarray(x)), rtol=1e-5)
    assert np.isfinite(y)
    of_values = jax.grad(lambda v: dp.estimators.straight_through(v, x).sum())(x)
    np.testing.assert_array_equal(of_values, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gaussian_sample_in_16_bits_has_tails(dtype):
    """P(|e| > 3) = 0.0027; for noise drawn in bfloat16 it is 0."""
    zeros = jnp.zeros(2**18, dtype)
    y = dp.estimators.gaussian_sample()({}, (zeros, zeros), key=jax.random.key(0))
    assert y.dtype == dtype
    assert abs(float((jnp.abs(y.astype(jnp.float32)) > 3).mean()) - 0.0027) < 0.0004


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [
    jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_leave_one_out_in_16_bits_does_not_overflow(dtype):
    """In float16 the sum of 1000 values of 100 would be infinite."""
    values = jnp.full(1000, 100, dtype)
    log_p = jnp.zeros(1000, dtype)
    slope = jax.grad(lambda log_p: dp.estimators.score_function(
        values, log_p, baseline="leave_one_out").astype(jnp.float32).sum())(log_p)
    assert (slope == 0).all()
