"""The evidence lower bound: its two terms against NumPy, its masks, and the evidence."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import drawn
from support.refusing import refused

import diffprog as dp

KEY = jax.random.key(0)


def closed(mean, log_variance):
    """KL of each row, in float64."""
    mean, variance = np.asarray(mean, np.float64), np.exp(np.asarray(log_variance, np.float64))
    return (mean**2 + variance - 1 - np.log(variance)).sum(-1) / 2


def example(batch=6):
    """A net whose latent and prediction are linear in x; binary images."""
    net = dp.models.vae(dp.branch(mean=dp.linear(2), log_variance=dp.linear(2)), dp.linear(5))
    x = jnp.asarray(drawn(batch, 3), jnp.float32)
    y = jnp.asarray(drawn(batch, 5, seed=1) > 0, jnp.float32)
    params, _ = net.init(KEY, x)
    return net, params, x, y


def nll(net, params, x, y, key):
    """-log p(y | z) of each entry, in float64."""
    logits = np.asarray(net(params, x, key=key)[0], np.float64)
    return np.where(np.asarray(y) == 1, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))


# the KL term


def test_the_kl_is_its_closed_form():
    mean, log_variance = drawn(4, 3), drawn(4, 3, seed=1)
    wanted = closed(mean, log_variance)
    pair = jnp.asarray(mean, jnp.float32), jnp.asarray(log_variance, jnp.float32)
    np.testing.assert_allclose(dp.losses.gaussian_kl(*pair, reduction="none"), wanted, rtol=1e-5)
    np.testing.assert_allclose(dp.losses.gaussian_kl(*pair), wanted.mean(), rtol=1e-5)
    np.testing.assert_array_equal(dp.losses.gaussian_kl(jnp.zeros(3), jnp.zeros(3)), 0)


def test_the_kl_is_the_mean_of_log_q_less_log_p():
    """By Monte Carlo over 40,000 draws of q, within four standard errors."""
    mean, log_variance = np.array([0.5, -1.0]), np.array([0.3, -0.7])
    e = np.random.default_rng(0).normal(size=(40_000, 2))
    z = mean + np.exp(log_variance / 2) * e
    ratio = (-(e**2) / 2 - log_variance / 2 + z**2 / 2).sum(1)
    wanted = float(dp.losses.gaussian_kl(jnp.asarray(mean), jnp.asarray(log_variance)))
    assert abs(ratio.mean() - wanted) < 4 * ratio.std() / 200


def test_a_small_kl_is_precise():
    log_variance = jnp.array([1e-4])  # whose KL is log_variance**2 / 4
    np.testing.assert_allclose(
        dp.losses.gaussian_kl(jnp.zeros(1), log_variance), 2.5e-9, rtol=1e-2)


def test_the_gradient_of_the_kl_agrees():
    dp.gradients.check_gradients(dp.losses.gaussian_kl, drawn(3, 2), drawn(3, 2, seed=1))


@pytest.mark.slow
def test_the_kl_of_masked_entries_is_zero():
    mean, log_variance = drawn(4, 3), drawn(4, 3, seed=1)
    mask = jnp.array([True, False, True, True])
    broken = [jnp.asarray(np.where(mask[:, None], a, np.nan)) for a in (mean, log_variance)]
    wanted = closed(mean, log_variance)[np.asarray(mask)].mean()
    value, grads = jax.value_and_grad(
        lambda pair: dp.losses.gaussian_kl(*pair, mask=mask))(tuple(broken))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    chex.assert_tree_all_finite(grads)
    assert all((g[1] == 0).all() for g in grads)


# the objective


@pytest.mark.slow
@pytest.mark.parametrize(("key", "train", "beta"), [
    (None, False, 1.0), (KEY, False, 4.0), (KEY, True, 1.0),
], ids=["inference", "one draw", "training"])
def test_both_terms_are_sums_over_an_example_and_means_over_the_batch(key, train, beta):
    net, params, x, y = example()
    mean, log_variance = net(params, x)[1]
    loss, (state, metrics) = dp.training.elbo(beta=beta)(
        net, params, {}, (x, y), key=key, train=train)
    wanted = {"reconstruction": nll(net, params, x, y, key).sum(1).mean(),
              "kl": closed(mean, log_variance).mean(), "count": 6}
    wanted["loss"] = wanted["reconstruction"] + beta * wanted["kl"]
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(wanted, rel=1e-5)
    assert float(loss) == float(metrics["loss"]) and state == {}


@pytest.mark.slow
def test_masks_leave_out_examples_and_entries():
    net, params, x, y = example()
    rows = np.array([True, True, False, True, False, True])
    entries = (drawn(6, 5, seed=3) > 0) & rows[:, None]
    losses, kl = nll(net, params, x, y, None), closed(*net(params, x)[1])
    for mask in (rows, entries):
        whole = np.broadcast_to(mask.reshape(6, -1), (6, 5))
        name = "mask" if mask is rows else "target_mask"
        batch = {"x": jnp.where(rows[:, None], x, 9.0), name: jnp.asarray(mask),
                 "y": jnp.where(whole, y, jnp.nan)}
        (_, (_, metrics)), grads = jax.jit(jax.value_and_grad(
            lambda p, batch: dp.training.elbo()(net, p, {}, batch, key=None, train=False),
            has_aux=True))(params, batch)
        assert float(metrics["reconstruction"]) == pytest.approx(
            (losses * whole).sum() / 4, rel=1e-5)
        assert float(metrics["kl"]) == pytest.approx(kl[rows].mean(), rel=1e-5)
        assert float(metrics["count"]) == 4 and not dp.tree.nonfinite(grads)


@pytest.mark.slow
def test_evaluation_averages_over_examples():
    net, params, x, y = example(7)
    step = dp.make_step(net, dp.training.elbo(), optax.sgd(0.1))
    state = step.init(KEY, x)._replace(params=params)
    parts = dp.evaluate(step, state, dp.batches((x, y), 3))
    assert parts == pytest.approx(dp.evaluate(step, state, [(x, y)]), rel=1e-5)


@pytest.mark.slow
def test_images_and_latent_maps_are_summed():
    net = dp.models.vae(dp.branch(dp.conv(2, 3, stride=2), dp.conv(2, 3, stride=2)),
                 dp.conv_transpose(1, 3, stride=2))
    x = jnp.asarray(drawn(2, 4, 4, 1), jnp.float32)
    params, _ = net.init(KEY, x)
    y, latent = net(params, x)
    _, (_, metrics) = dp.training.elbo(dp.losses.squared_error)(net, params, {}, (x, x), key=None,
        train=False)
    wanted = ((np.asarray(y) - np.asarray(x)) ** 2).sum() / 2
    np.testing.assert_allclose(metrics["reconstruction"], wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], closed(*latent).sum() / 2, rtol=1e-4)


@pytest.mark.slow
def test_it_bounds_the_evidence():
    """A linear decoder with noise of variance 1/2: log p(y) is that of one normal distribution."""
    net, params, x, _ = example()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / 2, params)
    y = jnp.asarray(drawn(6, 5, seed=4), jnp.float32)
    kernel, bias = (np.asarray(params["decoder"][name], np.float64) for name in ("kernel", "bias"))
    covariance = kernel.T @ kernel + np.eye(5) / 2
    off = np.asarray(y, np.float64) - bias
    evidence = -(np.einsum("bi,ij,bj->b", off, np.linalg.inv(covariance), off)
                 + np.linalg.slogdet(2 * np.pi * covariance)[1]) / 2

    @jax.jit
    def losses(params, keys):
        one = lambda key: dp.training.elbo(dp.losses.squared_error)(  # noqa: E731
            net, params, {}, (x, y), key=key, train=False)[0]
        return jax.vmap(one)(keys)

    constant = 5 * np.log(np.pi) / 2  # which `squared_error` leaves out
    keys = jax.random.split(KEY, 2000)
    bound = -np.asarray(losses(params, keys), np.float64) - constant
    error = bound.std() / np.sqrt(len(keys))
    assert bound.mean() + 4 * error < evidence.mean()
    # With the true posterior for q, its mean linear in y, the bound is the evidence.
    precision = np.eye(2) + 2 * kernel @ kernel.T
    posterior = np.linalg.inv(precision)
    rotation, scales = np.linalg.eigh(posterior)[::-1]
    turned = rotation.T @ kernel  # a rotated z is as likely, and its posterior has no covariance
    to_mean = 2 * scales[:, None] * turned
    exact = {"encoder": {"mean": {"kernel": to_mean.T, "bias": -to_mean @ bias},
                         "log_variance": {"kernel": np.zeros((5, 2)), "bias": np.log(scales)}},
             "decoder": {"kernel": turned, "bias": bias}}
    exact = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), exact)

    @jax.jit
    def tight(params, keys):
        one = lambda key: dp.training.elbo(dp.losses.squared_error)(  # noqa: E731
            net, params, {}, (y, y), key=key, train=False)[0]
        return jax.vmap(one)(keys)

    bound = -np.asarray(tight(exact, keys), np.float64) - constant
    error = bound.std() / np.sqrt(len(keys))
    assert abs(bound.mean() - evidence.mean()) < 4 * error


def test_other_outputs_and_a_negative_beta_are_refused():
    net, x = dp.linear(3), jnp.ones((2, 4))
    for other in (net, net >> (lambda y: (y, y))):
        params, state = other.init(KEY, x)
        error = refused(dp.training.elbo(), other, params, state, (x, x), key=None, train=False)
        assert "(mean, log_variance)" in error.wants
    assert refused(dp.training.elbo, beta=-1.0).remedy
