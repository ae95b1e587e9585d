"""Pooling: the largest or the mean value of each window, channel by channel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import begins, check_segments, over_steps, refuse_segments, widened
from diffprog.core.notation import show
from diffprog.layers.spatial.window import (
    AXES,
    Sides,
    apart,
    cannot_stream,
    check_fits,
    check_length,
    extents,
    margins,
    on_images,
    pairs_for,
    reach_back,
    sides,
    takes,
    window,
)

__all__ = ["avg_pool", "global_avg_pool", "global_max_pool", "max_pool"]


@factory
def max_pool(
    size: int | tuple[int, ...], *, dims: int = 2, stride: int | tuple[int, ...] | None = None,
    padding: Any = "VALID", dilation: int | tuple[int, ...] = 1,
) -> Layer:
    """The largest value of each window: ``y[p] = max_q x[stride * p + dilation * q]``.

    Padded places never win. Of equal values the first has the gradient, as in every maximum of the
    library: that of the first row, and in it of the first column.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C) for two dims.
        mask, for one dim: booleans of the leading axes of x; what is not real never wins, and a
            window without anything real gives 0.
        segments, for one dim, where each step has a window: ints (..., T); what is of another
            segment is no part of the window. A new one begins wherever they change.

    Args:
        size: side of the window, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.
        stride: places between two windows; the size of the window if None.
        padding: "VALID" (none), "SAME", an int, or a pair (before, after) for each axis.
        dilation: places between two entries of a window.

    Raises:
        LayerError: x has too few axes or is smaller than the window; with padding, a side of x is
            smaller than the dilation; a mask of steps with "SAME" and a stride, because windows
            would depend on how long x is padded; segments, unless stride is 1 and y as long as x.

    Example:
        >>> net = dp.max_pool(2)
        >>> net({}, jnp.arange(16.0).reshape(4, 4, 1))[..., 0].tolist()
        [[5.0, 7.0], [13.0, 15.0]]

    Source: Riesenhuber and Poggio 1999, Nature Neuroscience 2, 1019-1025.
    """

    def largest(slide: Callable[..., Any], x: jax.Array, real: jax.Array | None = None) -> Any:
        low = np.asarray(lowest(x), x.dtype)
        if real is None:
            return slide(x, low, jax.lax.max)
        y = slide(jnp.where(real, x, low), low, jax.lax.max)
        count = slide(real.astype(jnp.int32), np.int32(0), jax.lax.add)
        return jnp.where(count > 0, y, jnp.zeros_like(y))

    return _sliding(largest, size, dims, stride, padding, dilation)


@factory
def avg_pool(
    size: int | tuple[int, ...], *, dims: int = 2, stride: int | tuple[int, ...] | None = None,
    padding: Any = "VALID", count_padding: bool = False,
) -> Layer:
    """The mean of each window: ``y[p] = mean_q x[stride * p + q]``.

    Padded places do not count: at the border the mean is that of the real places in the window.
    Sums are taken in float32 or wider.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C) for two dims.
        mask, for one dim: booleans of the leading axes of x; what is not real counts as the padding
            does, and a window without anything real gives 0.
        segments, for one dim, where each step has a window: ints (..., T); what is of another
            segment is no part of the window. A new one begins wherever they change.

    Args:
        size: side of the window, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.
        stride: places between two windows; the size of the window if None.
        padding: "VALID" (none), "SAME", an int, or a pair (before, after) for each axis.
        count_padding: True counts padded places as zeros: the divisor is always the whole window.

    Raises:
        LayerError: x has too few axes, is smaller than the window, or holds no floats; for a mask
            and segments as `max_pool` does.

    Example:
        >>> net = dp.avg_pool(2)
        >>> net({}, jnp.arange(16.0).reshape(4, 4, 1))[..., 0].tolist()
        [[2.5, 4.5], [10.5, 12.5]]

    Source: LeCun, Bottou, Bengio, Haffner 1998, Proceedings of the IEEE 86, section II.B.
    """
    size = window(size, dims)
    whole, dims = math.prod(size), len(size)
    stride = size if stride is None else sides("stride", stride, dims)

    def average(slide: Callable[..., Any], x: jax.Array, real: jax.Array | None = None) -> Any:
        check_array(x)
        wide = x.astype(joint(x.dtype, jnp.float32))
        zero = np.zeros((), wide.dtype)
        total = slide(wide if real is None else jnp.where(real, wide, zero), zero, jax.lax.add)
        if count_padding or (real is None and padding == "VALID"):
            return (total / whole).astype(x.dtype)
        if real is None:
            count = _places(x, total, size, stride, padding).astype(wide.dtype)
        else:
            count = jnp.maximum(slide(real.astype(wide.dtype), zero, jax.lax.add), 1)
        return (total / count).astype(x.dtype)

    return _sliding(average, size, dims, stride, padding)


@factory
def global_avg_pool(*, dims: int = 2) -> Layer:
    """The mean over all places: ``y = mean_p x[p]``, one value for each channel.

    Shapes:
        x: (..., H, W, C) -> (..., C) for two dims.
        mask, for one dim: booleans of the leading axes of x; the mean is that of what is real, and
            0 where nothing is.

    Args:
        dims: number of spatial axes.

    Example:
        >>> dp.global_avg_pool()({}, jnp.ones((2, 5, 5, 3))).shape
        (2, 3)

    Source: Lin, Chen, Yan 2013, arXiv:1312.4400, section 3.2.
    """
    return _whole(mean, dims, floating=True)


@factory
def global_max_pool(*, dims: int = 2) -> Layer:
    """The largest value over all places: ``y = max_p x[p]``, one for each channel.

    Of equal values the first has the gradient, as in `max_pool`.

    Shapes:
        x: (..., H, W, C) -> (..., C) for two dims.
        mask, for one dim: booleans of the leading axes of x; what is not real never wins, and y is
            0 where nothing is real.

    Args:
        dims: number of spatial axes.

    Example:
        >>> dp.global_max_pool()({}, jnp.ones((2, 5, 5, 3))).shape
        (2, 3)
    """
    return _whole(maximum, dims, floating=False)


def mean(x: jax.Array, axis: Any, real: jax.Array | None = None) -> jax.Array:
    """The mean of what is real along `axis`, 0 where nothing is; reduced in float32 or wider."""
    if real is None:
        return jnp.mean(x, axis=axis)  # reduces bfloat16 in float32 by itself
    wide = jnp.where(real, x, jnp.zeros_like(x)).astype(joint(x.dtype, jnp.float32))
    count = jnp.maximum(jnp.sum(real, axis=axis), 1)
    return (jnp.sum(wide, axis=axis) / count.astype(wide.dtype)).astype(x.dtype)


def maximum(x: jax.Array, axis: Any, real: jax.Array | None = None) -> jax.Array:
    """The largest of what is real along `axis`, 0 where nothing is."""
    if real is None:
        return _largest(x, axis)
    y = _largest(jnp.where(real, x, jnp.asarray(lowest(x), x.dtype)), axis)
    return jnp.where(jnp.any(real, axis=axis), y, jnp.zeros_like(y))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: jax.Array, axis: Any) -> jax.Array:
    """The largest along axes; of equal ones the first has the gradient, which JAX would split."""
    return jnp.max(x, axis=axis)


@_largest.defjvp
def _tangent(axis: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = _largest(x, axis)
    axes = [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    sides = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    order = jnp.arange(math.prod(sides)).reshape(sides)
    behind = x < jnp.expand_dims(y, axis)  # none of them is if y is NaN
    first = jnp.where(behind, order.size, order).min(axis, keepdims=True)
    return y, jnp.where(order == first, dx, 0).sum(axis)


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """The larger one, NaN if one is; of equal ones a has the gradient."""
    return jnp.where((b > a) | (b != b), b, a)


def lowest(x: jax.Array) -> float | int | bool:
    """What loses to every value of the dtype of x."""
    if x.dtype == bool:
        return False
    return -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else int(jnp.iinfo(x.dtype).min)


def pool(
    pooled: Callable[..., jax.Array], dims: int, *, floating: bool = False,
    by_segment: Callable[..., jax.Array] | None = None,
    check_mask: Callable[..., None] = lambda mask, x: None,
) -> Layer:
    """The layer of ``pooled(x)``, or of ``pooled(x, real)`` where a mask says what is real.

    With segments it is ``by_segment(x, segments, mask)``; None refuses them.
    """

    def apply(
        params: Any, state: Any, x: jax.Array, *, mask: jax.Array | None = None,
        segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, Any]:
        check_array(x, rank=dims + 1, axes=AXES[dims], floating=floating)
        if 0 in x.shape[-dims - 1 : -1]:
            raise LayerError("at least one place to pool", show(x), "leave such an input out: "
                             "nothing has no mean and no maximum")
        check_mask(mask, x)
        if segments is not None and by_segment:
            return by_segment(x, segments, mask), state
        refuse_segments(segments)
        if mask is None:
            return pooled(x), state
        return pooled(x, jnp.broadcast_to(widened(mask, x.shape), (*x.shape[:-1], 1))), state

    return Layer(lambda key, x, **_: ({}, {}), apply, cannot_stream, bare=True, side=takes(dims))


def _sliding(
    reduce: Callable[..., jax.Array], size: Any, dims: int, stride: Any, padding: Any,
    dilation: Any = 1,
) -> Layer:
    """The pool of ``reduce(slide, x)``, where slide reduces the windows of an array."""
    size = window(size, dims)
    dims = len(size)
    stride = size if stride is None else sides("stride", stride, dims)
    dilation = sides("dilation", dilation, dims)
    extent = extents(size, dilation)
    margin = margins(padding, dims)
    pairs = margin if isinstance(margin, str) else ((0, 0), *margin, (0, 0))
    numbers = () if isinstance(margin, str) else zip(margin, extent, strict=True)
    if any(max(pair) >= n for pair, n in numbers):
        raise LayerError(f"padding below the size {extent}", f"{margin}",
                         "pad less: a window of padding alone has no mean and no maximum")

    def slide(x: jax.Array, start: Any, combine: Callable[..., Any]) -> jax.Array:
        return jax.lax.reduce_window(x, start, combine, (1, *size, 1), (1, *stride, 1), pairs)

    def slide_apart(x: jax.Array, start: Any, combine: Callable[..., Any]) -> jax.Array:
        """The same with dilation, for which the maximum of `reduce_window` has no gradient."""
        around = pairs_for(margin, x, extent, stride)
        if any(any(pair) and side < d
               for pair, side, d in zip(around, x.shape[1:-1], dilation, strict=True)):
            raise LayerError(f"padded sides of at least the dilation {dilation}",
                             f"{x.shape[1:-1]}", "dilate less: a window of padding alone has no "
                             "maximum")
        x = jax.lax.pad(x, start, [(0, 0, 0), *((*pair, 0) for pair in around), (0, 0, 0)])
        combine = _larger if combine is jax.lax.max else combine
        # The last axis first: of equal values the first of the first row is to win.
        for axis, k, s, d in reversed([*zip(range(1, dims + 1), extent, stride, dilation,
                                            strict=True)]):
            places = max(x.shape[axis] - k + 1, 0)
            x = functools.reduce(combine, [
                x[(slice(None),) * axis + (slice(q, q + places, s),)] for q in range(0, k, d)])
        return x

    def pooled(x: jax.Array, *real: jax.Array) -> jax.Array:
        sliding = slide if set(dilation) == {1} else slide_apart
        y = on_images(functools.partial(reduce, sliding), dims, x, *real)
        check_fits(x, y, "window")
        return y

    def by_segment(x: jax.Array, segments: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The same where windows end with their segment: each is written out, with what counts."""
        back = reach_back(segments, margin, extent, stride)
        segments, real = check_segments(segments, x.shape[:-1]), over_steps(mask, x)
        runs = jnp.cumsum(begins(segments, real), -1, dtype=jnp.int32)
        if real is not None:
            runs = jnp.where(real, runs, -1)
        around = [(0, 0)] * (x.ndim - 2) + [(back, extent[0] - 1 - back)]
        whole, runs = jnp.pad(x, [*around, (0, 0)]), jnp.pad(runs, around, constant_values=-1)
        windows, counts = apart(whole, runs, size[0], dilation[0], back)

        def slide_windows(x: jax.Array, start: Any, combine: Callable[..., Any]) -> jax.Array:
            return jax.lax.reduce_window(x, start, combine, (1, *size, 1), (1, *size, 1), "VALID")

        return on_images(functools.partial(reduce, slide_windows), 1, windows, counts[..., None])

    return pool(pooled, dims, by_segment=by_segment,
                check_mask=lambda mask, x: check_length(mask, x, margin, extent, stride))


def _places(x: jax.Array, y: Any, size: Sides, stride: Sides, padding: Any) -> jax.Array:
    """How many places of x each window of y holds, (1, H', W', 1): a product over the axes.

    They are counted from their numbers: a sliding sum of ones is a constant, which XLA would
    compute while it compiles, for up to a minute.
    """
    around = pairs_for(margins(padding, len(size)), x, size, stride)
    counts = []
    for axis, (k, s, (before, _)) in enumerate(zip(size, stride, around, strict=True), 1):
        along = [n if i == axis else 1 for i, n in enumerate(y.shape)]
        first = s * jax.lax.broadcasted_iota(jnp.int32, along, axis) - before
        counts.append(jnp.minimum(first + k, x.shape[axis]) - jnp.maximum(first, 0))
    return functools.reduce(jnp.multiply, counts)


def _whole(reduce: Callable[..., jax.Array], dims: int, *, floating: bool) -> Layer:
    """The pool of ``reduce(x, axes)`` over all places."""
    window(1, dims)  # refuses a number of axes that no image has
    axes = tuple(range(-dims - 1, -1))
    return pool(lambda x, *real: reduce(x, axes, *real), dims, floating=floating)
