"""Length and direction of weights as parameters of their own."""

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
    """Learn length and direction of weights apart: ``y = f(x; scale * direction / |direction|)``.

    The norm is that of the weights into one output feature: over all axes but the last. A layer
    begins as it was; weights that are zero get a direction, and a length of zero.

    Args:
        layer: any layer.
        pattern: of the paths of the kernels, or a tuple of several.

    Raises:
        LayerError: at ``init``: a pattern that matches nothing, or a leaf with one axis.

    Example:
        >>> net = dp.weight_norm(dp.linear(3))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> jax.tree.map(jnp.shape, params["kernel"])
        {'direction': (4, 3), 'scale': (3,)}

    Source: Salimans and Kingma 2016, arXiv:1602.07868, eq. 2.
    """

    def make(key: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
        check_kernel(kernel)
        scale = lengths(kernel)
        stored = scale.astype(kernel.real.dtype)
        return {"direction": jnp.where(scale == 0, 1, kernel), "scale": stored}

    def use(tree: dict[str, jax.Array]) -> jax.Array:
        direction = tree["direction"]
        size = lengths(direction)
        factor = jax.lax.broadcast_to_rank(tree["scale"].astype(size.dtype) / size, direction.ndim)
        dtype = joint(direction, factor)
        return (direction.astype(dtype) * factor.astype(dtype)).astype(direction.dtype)

    def lengths(kernel: jax.Array) -> jax.Array:
        return length(kernel, tuple(range(kernel.ndim - 1)))

    return reparametrized(as_layer(layer), Computed(make, use, pattern),
                          lambda layer: weight_norm(layer, pattern))
