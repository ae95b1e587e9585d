"""The variational autoencoder: an encoder of x to a normal distribution of z, and a decoder of z.

Encoder and decoder are any two layers; the training objective is `diffprog.training.elbo`.
"""

from __future__ import annotations

from typing import Any

import jax

from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.layers.estimators import gaussian_sample
from diffprog.wiring.children import Children
from diffprog.wiring.program import program

__all__ = ["vae"]


@known
def vae(encoder: Layer, decoder: Layer) -> Layer:
    """Variational autoencoder: ``decoder(z), (m, v)`` with ``z = m + exp(v / 2) * e, e ~ N(0, 1)``.

    ``(m, v) = encoder(x)`` are the mean and the natural log of the variance. With a key, z is
    sampled, even at inference; without one it is the mean.

    Shapes:
        x: input of the encoder -> a pair: the output of the decoder, and the pair (m, v).
        side inputs: those of encoder and decoder; one that both take, such as `condition`, goes to
            both.
        params: ``encoder`` and ``decoder``. To decode any z:
            ``net.children["decoder"](params["decoder"], z)``.

    Args:
        encoder: returns a pair (mean, log_variance) of arrays of one shape; it ends in
            ``branch(mean=linear(n), log_variance=linear(n))``, for example.
        decoder: takes an array of that shape.

    Raises:
        LayerError: the encoder does not return such a pair; ``train=True`` without a key.

    Example:
        >>> halves = dp.branch(mean=dp.linear(2), log_variance=dp.linear(2))
        >>> net = dp.models.vae(dp.linear(8) >> jnp.tanh >> halves, dp.models.mlp((8,), 5))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((3, 5)))
        >>> y, (mean, log_variance) = net(params, jnp.ones((3, 5)), key=jax.random.key(1))
        >>> y.shape, mean.shape
        ((3, 5), (3, 2))

    Source: Kingma and Welling 2014, arXiv:1312.6114, section 3 and appendix C.
    """

    @program(encoder=encoder, sample=gaussian_sample(), decoder=decoder)
    def vae(layers: Children, x: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        latent = layers.encoder(x)                                       # mean and log variance
        z = layers.sample(latent)
        return layers.decoder(z), latent

    return vae
