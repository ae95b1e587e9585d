"""Pooling: the largest or the mean value of each window, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.errors import LayerError, check_array
from diffprog.layer import Layer, factory
from diffprog.layers.window import (
    AXES,
    cannot_stream,
    check_fits,
    margins,
    on_images,
    sides,
    window,
)

__all__ = ["avg_pool", "global_avg_pool", "global_max_pool", "max_pool"]


@factory
def max_pool(
    size: int | tuple[int, ...], *, dims: int = 2, stride: int | tuple[int, ...] | None = None,
    padding: Any = "VALID",
) -> Layer:
    """The largest value of each window: ``y[p] = max_q x[stride * p + q]``.

    Padded places never win.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C) for two dims.

    Args:
        size: side of the window, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.
        stride: places between two windows; the size of the window if None.
        padding: "VALID" (none), "SAME", an int, or a pair (before, after) for each axis.

    Raises:
        LayerError: x has too few axes or is smaller than the window.

    Example:
        >>> net = dp.max_pool(2)
        >>> net({}, jnp.arange(16.0).reshape(4, 4, 1))[..., 0].tolist()
        [[5.0, 7.0], [13.0, 15.0]]

    Source: Riesenhuber and Poggio 1999, Nature Neuroscience 2, 1019-1025.
    """

    def largest(x: jax.Array, slide: Callable[..., jax.Array]) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        lowest = -jnp.inf if floating else jnp.iinfo(x.dtype).min
        return slide(x, np.asarray(lowest, x.dtype), jax.lax.max)

    return _sliding(largest, size, dims, stride, padding)


@factory
def avg_pool(
    size: int | tuple[int, ...], *, dims: int = 2, stride: int | tuple[int, ...] | None = None,
    padding: Any = "VALID",
) -> Layer:
    """The mean of each window: ``y[p] = mean_q x[stride * p + q]``.

    Padded places do not count: at the border the mean is that of the real places in the window.
    Sums are taken in float32 or wider.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C) for two dims.

    Args:
        size: side of the window, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.
        stride: places between two windows; the size of the window if None.
        padding: "VALID" (none), "SAME", an int, or a pair (before, after) for each axis.

    Raises:
        LayerError: x has too few axes, is smaller than the window, or holds no floats.

    Example:
        >>> net = dp.avg_pool(2)
        >>> net({}, jnp.arange(16.0).reshape(4, 4, 1))[..., 0].tolist()
        [[2.5, 4.5], [10.5, 12.5]]

    Source: LeCun, Bottou, Bengio, Haffner 1998, Proceedings of the IEEE 86, section II.B.
    """
    whole = math.prod(window(size, dims))

    def mean(x: jax.Array, slide: Callable[..., jax.Array]) -> jax.Array:
        check_array(x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        zero = np.zeros((), wide.dtype)
        total = slide(wide, zero, jax.lax.add)
        if padding == "VALID":
            return (total / whole).astype(x.dtype)
        places = slide(jnp.ones((1, *x.shape[1:-1], 1), wide.dtype), zero, jax.lax.add)
        return (total / places).astype(x.dtype)

    return _sliding(mean, size, dims, stride, padding)


@factory
def global_avg_pool(*, dims: int = 2) -> Layer:
    """The mean over all places: ``y = mean_p x[p]``, one value for each channel.

    Shapes:
        x: (..., H, W, C) -> (..., C) for two dims.

    Args:
        dims: number of spatial axes.

    Example:
        >>> dp.global_avg_pool()({}, jnp.ones((2, 5, 5, 3))).shape
        (2, 3)

    Source: Lin, Chen, Yan 2013, arXiv:1312.4400, section 3.2.
    """
    # jnp.mean reduces bfloat16 in float32 by itself.
    return _whole(jnp.mean, dims, floating=True)


@factory
def global_max_pool(*, dims: int = 2) -> Layer:
    """The largest value over all places: ``y = max_p x[p]``, one for each channel.

    Shapes:
        x: (..., H, W, C) -> (..., C) for two dims.

    Args:
        dims: number of spatial axes.

    Example:
        >>> dp.global_max_pool()({}, jnp.ones((2, 5, 5, 3))).shape
        (2, 3)
    """
    return _whole(jnp.max, dims, floating=False)


def _sliding(
    reduce: Callable[..., jax.Array], size: Any, dims: int, stride: Any, padding: Any
) -> Layer:
    """The pool that calls ``reduce(x, slide)``, where slide reduces the windows of an array."""
    size = window(size, dims)
    dims = len(size)
    stride = size if stride is None else sides("stride", stride, dims)
    margin = margins(padding, dims)
    pairs = margin if isinstance(margin, str) else ((0, 0), *margin, (0, 0))
    if not isinstance(margin, str) and any(max(p) >= n for p, n in zip(margin, size, strict=True)):
        raise LayerError(f"padding below the size {size}", f"{margin}",
                         "a window of padding alone has neither a mean nor a maximum")

    def slide(x: jax.Array, start: Any, combine: Callable[..., Any]) -> jax.Array:
        return jax.lax.reduce_window(x, start, combine, (1, *size, 1), (1, *stride, 1), pairs)

    def pooled(x: jax.Array) -> jax.Array:
        check_array(x, rank=dims + 1, axes=AXES[dims], floating=False)
        y = on_images(lambda x: reduce(x, slide), x, dims)
        check_fits(x, y, "window")
        return y

    return _pool(pooled)


def _whole(reduce: Callable[..., jax.Array], dims: int, *, floating: bool) -> Layer:
    window(1, dims)  # refuses a number of axes that no image has
    axes = tuple(range(-dims - 1, -1))

    def pooled(x: jax.Array) -> jax.Array:
        check_array(x, rank=dims + 1, axes=AXES[dims], floating=floating)
        return reduce(x, axis=axes)

    return _pool(pooled)


def _pool(pooled: Callable[[jax.Array], jax.Array]) -> Layer:
    return Layer(
        init=lambda key, x: ({}, {}),
        apply=lambda params, state, x, **_: (pooled(x), state),
        start=cannot_stream, bare=True,
    )
