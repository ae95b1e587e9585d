"""The variational autoencoder: an image is drawn from a few hidden numbers, and they from it.

The encoder gives a normal distribution over the hidden numbers, the decoder turns a draw from it
back. Both are layers of any kind; `diffprog.elbo` is what they are trained by.
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
    """``y = decoder(z), (m, v)`` with ``(m, v) = encoder(x); z = m + exp(v / 2) * e, e ~ N(0, 1)``.

    With a key z is drawn, at rest too; without one it is the mean m.

    Shapes:
        x: what the encoder takes -> a pair: what the decoder gives, and the pair (m, v).
        side inputs: those of encoder and decoder; one that both take, such as `condition`, reaches
            both.
        params: ``encoder`` and ``decoder``, which are layers of their own:
            ``net.children["decoder"](params["decoder"], z)`` draws an image from any z.

    Args:
        encoder: gives a pair (mean, log_variance) of one shape, the logarithm of the variance being
            natural; it ends in ``branch(mean=linear(n), log_variance=linear(n))``, for example.
        decoder: takes an array of that shape.

    Raises:
        LayerError: the encoder gives no such pair; ``train=True`` without a key.

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
        latent = layers.encoder(x)
        return layers.decoder(layers.sample(latent)), latent

    return vae
