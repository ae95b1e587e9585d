"""Pools with a given output size: the windows adapt to the size of x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.dtypes import wide
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import valid_before
from diffprog.layers.spatial.pool import maximum, mean, pool
from diffprog.layers.spatial.window import window

__all__ = ["adaptive_avg_pool", "adaptive_max_pool"]


@factory
def adaptive_avg_pool(size: int | tuple[int, ...], *, dims: int = 2) -> Layer:
    """Means of `size` windows per axis: ``y[i] = mean(x[floor(i*H/size) : ceil((i+1)*H/size)])``.

    Windows overlap if H is no multiple of size; H may be smaller than size. Each window is a
    separate operation: a size of hundreds compiles slowly. Means are taken in float32 or wider.

    Shapes:
        x: (..., H, W, C) -> (..., size, size, C) for two dims.
        mask, for one dim: booleans over leading axes of x, True = valid; the windows divide the
            valid steps of each row, H being their number, and return 0 if there are none.

    Args:
        size: length of the axes of y, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.

    Raises:
        LayerError: x has too few axes or holds no floats; segments, because y mixes them.

    Example:
        >>> dp.adaptive_avg_pool(2, dims=1)({}, jnp.array([[0.0], [3.0], [6.0]]))[:, 0].tolist()
        [1.5, 4.5]

    Source: He, Zhang, Ren, Sun 2014, arXiv:1406.4729, appendix A (bins).
    """

    def average(x: jax.Array, axis: int, *valid: jax.Array) -> jax.Array:
        return mean(wide(x), axis, *valid)

    return _adaptive(average, size, dims, floating=True)


@factory
def adaptive_max_pool(size: int | tuple[int, ...], *, dims: int = 2) -> Layer:
    """Maxima of `size` windows per axis: ``y[i] = max(x[floor(i*H/size) : ceil((i+1)*H/size)])``.

    Windows as in `adaptive_avg_pool`; of equal values the first has the gradient, as in `max_pool`.

    Shapes:
        x: (..., H, W, C) -> (..., size, size, C) for two dims.
        mask, for one dim: as in `adaptive_avg_pool`.

    Args:
        size: length of the axes of y, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.

    Raises:
        LayerError: x has too few axes; segments, because y mixes them.

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

    def pooled(x: jax.Array, *valid: jax.Array) -> jax.Array:
        if valid:
            return _pooled_valid(reduce, x, valid[0], counts[0]).astype(x.dtype)
        y = x
        for axis in range(-2, -dims - 2, -1):  # the last spatial axis first
            y = _pooled_axis(reduce, y, axis, counts[axis + 1])
        return y.astype(x.dtype)

    return pool(pooled, dims, floating=floating)


def _pooled_axis(
    reduce: Callable[..., jax.Array], x: jax.Array, axis: int, count: int
) -> jax.Array:
    """`count` windows of one axis, each reduced to one entry."""
    parts = []
    for i in range(count):
        first, end = _window(i, x.shape[axis], count)
        parts.append(reduce(jax.lax.slice_in_dim(x, first, end, axis=axis), axis))
    return jnp.stack(parts, axis)


def _pooled_valid(
    reduce: Callable[..., jax.Array], x: jax.Array, valid: jax.Array, count: int
) -> jax.Array:
    """`count` windows of the valid steps of each row: x (..., T, C), valid (..., T, 1)."""
    ranks = valid_before(valid[..., 0])[..., None]  # index among the valid steps, (..., T, 1)
    total = valid.sum(-2, keepdims=True, dtype=jnp.int32)  # (..., 1, 1)
    parts = []
    for i in range(count):
        first, end = _window(i, total, count)
        parts.append(reduce(x, -2, valid & (first <= ranks) & (ranks < end)))
    return jnp.stack(parts, -2)  # (..., count, C)


def _window(i: int, length: Any, count: int) -> tuple[Any, Any]:
    """First position and end of window i of `count` on an axis of this length."""
    return i * length // count, -(-(i + 1) * length // count)
