"""Weight normalization: the norm and the direction of kernels as separate parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.computed import Computed, Patterns
from diffprog.core.dtypes import joint
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.transforms.reparam import check_kernel, length, reparametrized

__all__ = ["weight_norm"]


@factory
def weight_norm(layer: Any, pattern: Patterns = "**/kernel") -> Layer:
    """Separate norm and direction of kernels: ``y = f(x; scale * direction / |direction|)``.

    The norm is taken over the weights of one output feature, over all axes but the last. The output
    is unchanged at first; weights of zero get a direction of ones and a scale of zero.

    Args:
        layer: any layer.
        pattern: paths of the kernels, or a tuple of several patterns.

    Raises:
        LayerError: at ``init``, for a pattern that matches nothing, or a leaf with one axis.

    Example:
        >>> net = dp.weight_norm(dp.linear(3))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> jax.tree.map(jnp.shape, params["kernel"])
        {'direction': (4, 3), 'scale': (3,)}

    Source: Salimans and Kingma 2016, arXiv:1602.07868, eq. 2.
    """

    def make(key: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
        check_kernel(kernel)
        scale = norms(kernel)                                            # (out,)
        direction = jnp.where(scale == 0, 1, kernel)                     # (..., in, out)
        return {"direction": direction, "scale": scale.astype(kernel.real.dtype)}

    def use(tree: dict[str, jax.Array]) -> jax.Array:
        direction = tree["direction"]
        norm = norms(direction)
        factor = jax.lax.broadcast_to_rank(tree["scale"].astype(norm.dtype) / norm, direction.ndim)
        dtype = joint(direction, factor)
        return (direction.astype(dtype) * factor.astype(dtype)).astype(direction.dtype)

    def norms(kernel: jax.Array) -> jax.Array:
        return length(kernel, tuple(range(kernel.ndim - 1)))

    return reparametrized(as_layer(layer), Computed(make, use, pattern),
                          lambda layer: weight_norm(layer, pattern))
