"""A layer as a pair of stax: in stax, and in a Bayesian model of NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.example_libraries import stax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

import diffprog as dp
from diffprog import interop

KEY, X = jax.random.key(0), jax.random.normal(jax.random.key(1), (6, 4))


@pytest.mark.slow
def test_it_composes_in_stax():
    inner = dp.serial(dp.linear(5), jax.nn.relu)
    init_fun, apply_fun = stax.serial(stax.Dense(3), interop.to_stax(inner), stax.Dense(2))
    shape, params = init_fun(KEY, (-1, 4))
    assert shape == (-1, 2)
    (kernel, bias), own, (last, _) = params
    by_hand = inner(own, X @ kernel + bias) @ last + params[2][1]
    np.testing.assert_allclose(apply_fun(params, X), by_hand, rtol=1e-5)


def test_shapes_are_those_of_the_layer():
    init_fun, _ = interop.to_stax(dp.conv(8, 3, stride=2))
    assert init_fun(KEY, (-1, 28, 28, 1))[0] == (-1, 14, 14, 8)
    assert init_fun(KEY, (5, -1, 28, 1))[0] == (5, -1, 14, 8)
    pair = interop.to_stax(dp.parallel(dp.linear(3), dp.linear(2)))
    shape, params = pair[0](KEY, ((-1, 4), (7, 5)))
    assert shape == ((-1, 3), (7, 2))
    assert params["linear_1"]["kernel"].shape == (5, 2)
    assert interop.to_stax(jnp.tanh)[0](KEY, ()) == ((), {})


@pytest.mark.slow
def test_to_stax_and_back_is_the_same_layer():
    net = dp.serial(dp.linear(5), jnp.tanh, dp.linear(2))
    again = interop.from_stax(interop.to_stax(net))
    params, _ = net.init(KEY, X)
    twice, _ = again.init(KEY, X)
    assert dp.tree.paths(params).keys() == dp.tree.paths(twice).keys()
    np.testing.assert_allclose(again(twice, X), net(params, X), rtol=1e-6)


def test_the_mode_is_fixed():
    net = dp.dropout(0.5)
    inference, training = (interop.to_stax(net, train=train)[1] for train in (False, True))
    assert (inference({}, X, rng=KEY) == X).all()
    assert (training({}, X, rng=KEY) == net.apply({}, {}, X, key=KEY, train=True)[0]).all()
    with pytest.raises(dp.LayerError, match="wants a key when train=True"):
        training({}, X)


def test_side_inputs_are_passed_on():
    _, apply_fun = interop.to_stax(dp.hide())
    mask = jnp.array([[True, False]])
    assert apply_fun({}, jnp.ones((1, 2, 1)), mask=mask).ravel().tolist() == [1, 0]


# Bayesian regression, y = features(x) w + noise with w ~ N(0, 1): for fixed features the posterior
# of w and the evidence have closed forms.

NOISE = 0.3
FEATURES = interop.to_stax(dp.serial(dp.linear(16), jnp.tanh, dp.linear(3), jnp.tanh))


def observed(count, key):
    x = jnp.linspace(-1, 1, count)[:, None]
    return x, jnp.sin(3 * x[:, 0]) + NOISE * jax.random.normal(key, (count,))


def model(x, y):
    features = numpyro.module("features", FEATURES, input_shape=x.shape)
    w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(features(x) @ w, NOISE).to_event(1), obs=y)


def divergence(mean, covariance, other_mean, other):
    """KL(N(mean, covariance) || N(other_mean, other))."""
    precision, away = np.linalg.inv(other), mean - other_mean
    logdet = np.linalg.slogdet(other)[1] - np.linalg.slogdet(covariance)[1]
    return (np.trace(precision @ covariance) - len(mean) + away @ precision @ away + logdet) / 2


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_numpyro_learns_features_and_infers_their_weights():
    """Variational inference maximizes the evidence and finds the posterior of w."""
    steps, (x, y) = 4000, observed(40, KEY)
    guide = AutoMultivariateNormal(model)
    adam = optax.adam(optax.cosine_decay_schedule(0.02, steps))
    svi = SVI(model, guide, numpyro.optim.optax_to_numpyro(adam), Trace_ELBO(num_particles=8))
    found = svi.run(jax.random.key(2), steps, x, y, progress_bar=False)
    params, q = found.params["features$params"], guide.get_posterior(found.params)
    assert params.keys() == {"linear_0", "linear_1"}

    features, y = (np.asarray(a, np.float64) for a in (FEATURES[1](params, x), y))
    covariance = np.linalg.inv(np.eye(3) + features.T @ features / NOISE**2)
    mean = covariance @ features.T @ y / NOISE**2
    assert divergence(q.mean, q.covariance_matrix, mean, covariance) < 0.03

    of_y = features @ features.T + NOISE**2 * np.eye(len(y))
    evidence = -(y @ np.linalg.solve(of_y, y) + np.linalg.slogdet(2 * np.pi * of_y)[1]) / 2
    assert evidence + found.losses[-200:].mean() == pytest.approx(0, abs=0.1)

    fresh, y_fresh = observed(400, jax.random.key(3))
    seen = FEATURES[1](params, fresh)
    spread = jnp.sqrt(jnp.einsum("nf,fg,ng->n", seen, q.covariance_matrix, seen) + NOISE**2)
    inside = jnp.abs(y_fresh - seen @ q.mean) < 1.96 * spread
    assert 0.9 < inside.mean() < 0.99  # 0.95, up to the noise of 400 draws and of training
