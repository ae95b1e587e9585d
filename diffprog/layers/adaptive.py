"""Pools with a given number of outputs: the windows adapt to the size of x."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffprog.factories import factory
from diffprog.layer import Layer
from diffprog.layers.pool import maximum, mean, pool
from diffprog.layers.window import window

__all__ = ["adaptive_avg_pool", "adaptive_max_pool"]


@factory
def adaptive_avg_pool(size: int | tuple[int, ...], *, dims: int = 2) -> Layer:
    """Means of `size` windows an axis: ``y[i] = mean(x[floor(i*H/size) : ceil((i+1)*H/size)])``.

    Windows overlap where H is no multiple of size; H may be smaller than size. Each window is
    computed by itself, so that a size of hundreds makes a long program. Reduced in float32 or
    wider.

    Shapes:
        x: (..., H, W, C) -> (..., size, size, C) for two dims.
        mask, for one dim: booleans of the leading axes of x; what is not real does not count, and
            a window without anything real gives 0.

    Args:
        size: side of y, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.

    Raises:
        LayerError: x has too few axes or holds no floats.

    Example:
        >>> dp.adaptive_avg_pool(2, dims=1)({}, jnp.array([[0.0], [3.0], [6.0]]))[:, 0].tolist()
        [1.5, 4.5]

    Source: He, Zhang, Ren, Sun 2014, arXiv:1406.4729, appendix A (bins).
    """

    def average(x: jax.Array, axis: int, *real: jax.Array) -> jax.Array:
        return mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis, *real)

    return _adaptive(average, size, dims, floating=True)


@factory
def adaptive_max_pool(size: int | tuple[int, ...], *, dims: int = 2) -> Layer:
    """Maxima of `size` windows an axis: ``y[i] = max(x[floor(i*H/size) : ceil((i+1)*H/size)])``.

    Windows as in `adaptive_avg_pool`.

    Shapes:
        x: (..., H, W, C) -> (..., size, size, C) for two dims.
        mask, for one dim: booleans of the leading axes of x; what is not real never wins, and a
            window without anything real gives 0.

    Args:
        size: side of y, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.

    Raises:
        LayerError: x has too few axes.

    Example:
        >>> dp.adaptive_max_pool(2, dims=1)({}, jnp.array([[0.0], [3.0], [6.0]]))[:, 0].tolist()
        [3.0, 6.0]

    Source: He, Zhang, Ren, Sun 2014, arXiv:1406.4729, appendix A (bins).
    """
    return _adaptive(maximum, size, dims, floating=False)


def _adaptive(
    reduce: Callable[..., jax.Array], size: int | tuple[int, ...], dims: int, *, floating: bool
) -> Layer:
    """The pool of ``reduce(x, axis)`` over the windows of one axis after the other."""
    counts = window(size, dims)
    dims = len(counts)

    def along(axis: int, count: int, arrays: tuple[jax.Array, ...]) -> jax.Array:
        side = arrays[0].shape[axis]

        def one(i: int) -> jax.Array:
            ends = i * side // count, -(-(i + 1) * side // count)
            x, *real = (jax.lax.slice_in_dim(a, *ends, axis=axis) for a in arrays)
            return reduce(x, axis, *real)

        return jnp.stack([one(i) for i in range(count)], axis)

    def pooled(x: jax.Array, *real: jax.Array) -> jax.Array:
        y = x
        for axis, count in zip(range(-dims - 1, -1), counts, strict=True):
            y = along(axis, count, (y, *real))
        return y.astype(x.dtype)

    return pool(pooled, dims, floating=floating)
