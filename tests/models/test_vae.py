"""The variational autoencoder: its encoder and decoder, sampling with a key, and training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import MODELS
from support.comparing import drawn, same
from support.counting import count, linear

import diffprog as dp
from diffprog.core.parameters import fold

KEY = jax.random.key(0)


def test_the_parameters_of_vae():
    assert count("vae") == linear(64, 32) + 2 * linear(32, 2) + linear(2, 32) + linear(32, 64)


@pytest.mark.slow
def test_encoder_and_decoder_may_be_called_alone():
    net, x = MODELS["vae"].net, jnp.asarray(drawn(3, 64), jnp.float32)
    params, _ = net.init(KEY, x)
    encoder, decoder = net.children["encoder"], net.children["decoder"]
    mean, log_variance = encoder(params["encoder"], x)
    y, latent = net(params, x)
    same(latent, (mean, log_variance))
    same(y, decoder(params["decoder"], mean))
    z = dp.estimators.gaussian_sample()({}, latent, key=fold(KEY, "sample"))
    assert not np.allclose(z, mean)
    same(net(params, x, key=KEY)[0], decoder(params["decoder"], z))


def test_a_condition_goes_to_encoder_and_decoder():
    def add(layers, x, *, condition):
        return layers.f(jnp.concatenate([x, condition], -1))

    halves = dp.branch(mean=dp.linear(2), log_variance=dp.linear(2))
    net = dp.models.vae(dp.program(f=halves)(add), dp.program(f=dp.linear(5))(add))
    x, condition = jnp.ones((3, 5)), jnp.eye(3)
    params, _ = net.init(KEY, x, condition=condition)
    assert params["encoder"]["f"]["mean"]["kernel"].shape == (8, 2)
    assert params["decoder"]["f"]["kernel"].shape == (5, 5)
    assert net(params, x, condition=condition)[0].shape == (3, 5)


@pytest.mark.slow
def test_one_latent_dimension_is_used_for_data_on_a_line():
    """Data on a line in four dimensions need one latent dimension; the second stays unused."""
    rng = np.random.default_rng(0)
    x = (np.outer(rng.normal(size=512), [1.0, -1.0, 2.0, 0.0])
         + 0.1 * rng.normal(size=(512, 4))).astype(np.float32)
    net = dp.models.vae(dp.branch(mean=dp.linear(2), log_variance=dp.linear(2)), dp.linear(4))
    step = dp.make_step(net, dp.training.elbo(dp.losses.squared_error), optax.adam(3e-2))
    fit = dp.fit(step, dp.batches((x, x), 128, seed=0), key=KEY, steps=600, progress=False)
    mean, log_variance = net(fit.state.params, jnp.asarray(x))[1]
    kl = np.sort(np.asarray(
        [dp.losses.gaussian_kl(mean[:, i, None], log_variance[:, i, None]) for i in (0, 1)]))
    assert kl[0] < 0.05 and kl[1] > 0.5
    # The best direction of a linear decoder with noise of variance 1/2 is the principal axis.
    loading = np.asarray(fit.state.params["decoder"]["kernel"])
    axis = loading[np.linalg.norm(loading, axis=1).argmax()]
    cosine = abs(axis @ [1, -1, 2, 0]) / np.linalg.norm(axis) / np.sqrt(6)
    assert cosine > 0.99
