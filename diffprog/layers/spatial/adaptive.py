"""Pools with a given number of outputs: the windows adapt to the size of x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.dtypes import joint
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import real_before
from diffprog.layers.spatial.pool import maximum, mean, pool
from diffprog.layers.spatial.window import window

__all__ = ["adaptive_avg_pool", "adaptive_max_pool"]


@factory
def adaptive_avg_pool(size: int | tuple[int, ...], *, dims: int = 2) -> Layer:
    """Means of `size` windows an axis: ``y[i] = mean(x[floor(i*H/size) : ceil((i+1)*H/size)])``.

    Windows overlap where H is no multiple of size; H may be smaller than size. Each window is
    computed by itself, so that a size of hundreds makes a long program. Reduced in float32 or
    wider.

    Shapes:
        x: (..., H, W, C) -> (..., size, size, C) for two dims.
        mask, for one dim: booleans of the leading axes of x; windows are those of the real steps
            alone, H being how many there are, and give 0 where there are none.

    Args:
        size: side of y, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.

    Raises:
        LayerError: x has too few axes or holds no floats; segments, which y mixes.

    Example:
        >>> dp.adaptive_avg_pool(2, dims=1)({}, jnp.array([[0.0], [3.0], [6.0]]))[:, 0].tolist()
        [1.5, 4.5]

    Source: He, Zhang, Ren, Sun 2014, arXiv:1406.4729, appendix A (bins).
    """

    def average(x: jax.Array, axis: int, *real: jax.Array) -> jax.Array:
        return mean(x.astype(joint(x.dtype, jnp.float32)), axis, *real)

    return _adaptive(average, size, dims, floating=True)


@factory
def adaptive_max_pool(size: int | tuple[int, ...], *, dims: int = 2) -> Layer:
    """Maxima of `size` windows an axis: ``y[i] = max(x[floor(i*H/size) : ceil((i+1)*H/size)])``.

    Windows as in `adaptive_avg_pool`. Of equal values the first has the gradient, as in `max_pool`.

    Shapes:
        x: (..., H, W, C) -> (..., size, size, C) for two dims.
        mask, for one dim: as in `adaptive_avg_pool`.

    Args:
        size: side of y, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.

    Raises:
        LayerError: x has too few axes; segments, which y mixes.

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

    def along(x: jax.Array, axis: int, count: int) -> jax.Array:
        def one(i: int) -> jax.Array:
            first, end = _window(i, x.shape[axis], count)
            return reduce(jax.lax.slice_in_dim(x, first, end, axis=axis), axis)

        return jnp.stack([one(i) for i in range(count)], axis)

    def of_real(x: jax.Array, real: jax.Array, count: int) -> jax.Array:
        ranks = real_before(real[..., 0])[..., None]  # among the real steps of its row
        total = real.sum(-2, keepdims=True, dtype=jnp.int32)

        def one(i: int) -> jax.Array:
            first, end = _window(i, total, count)
            return reduce(x, -2, real & (first <= ranks) & (ranks < end))

        return jnp.stack([one(i) for i in range(count)], -2)

    def pooled(x: jax.Array, *real: jax.Array) -> jax.Array:
        if real:
            return of_real(x, real[0], counts[0]).astype(x.dtype)
        y = x
        for axis, count in reversed([*zip(range(-dims - 1, -1), counts, strict=True)]):
            y = along(y, axis, count)
        return y.astype(x.dtype)

    return pool(pooled, dims, floating=floating)


def _window(i: int, side: Any, count: int) -> tuple[Any, Any]:
    """Where the i-th of `count` windows begins and ends on a side of so many places."""
    return i * side // count, -(-(i + 1) * side // count)
