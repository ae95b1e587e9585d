"""Activations are plain functions; here are those that `jax.nn` lacks or defines otherwise."""

from __future__ import annotations

import jax

__all__ = ["gelu"]


def gelu(x: jax.Array) -> jax.Array:
    """The Gaussian error linear unit, exact: ``y = x * Phi(x)``, Phi the normal distribution.

    `jax.nn.gelu` computes an approximation by tanh unless told otherwise.

    Example:
        >>> [round(float(y), 4) for y in dp.gelu(jnp.array([-1.0, 0.0, 1.0]))]
        [-0.1587, 0.0, 0.8413]

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, eq. 1.
    """
    return jax.nn.gelu(x, approximate=False)
