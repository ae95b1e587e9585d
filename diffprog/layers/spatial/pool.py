"""Pooling: the largest or the mean value of each window, for each channel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array
from diffprog.core.dtypes import is_float, wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import begins, check_segments, over_steps, refuse_segments, widened
from diffprog.core.notation import show
from diffprog.core.plans import Params, State
from diffprog.layers.spatial.window import (
    AXES,
    Edges,
    Padding,
    apart,
    cannot_stream,
    check_fits,
    check_length,
    edges,
    extents,
    margins,
    on_images,
    pairs_for,
    reach_back,
    takes,
    window,
)

__all__ = ["avg_pool", "global_avg_pool", "global_max_pool", "max_pool"]

Reduce = Callable[..., jax.Array]  # (x, start, combine) -> each window of x, combined


@factory
def max_pool(
    size: int | tuple[int, ...], *, dims: int = 2, stride: int | tuple[int, ...] | None = None,
    padding: Any = "VALID", dilation: int | tuple[int, ...] = 1,
) -> Layer:
    """The largest value of each window: ``y[p] = max_q x[stride * p + dilation * q]``.

    Padding counts as minus infinity. Of equal values the first has the gradient, as in every
    maximum of the library: in the first row, and there in the first column.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C) for two dims.
        mask, with dims=1 only: booleans over leading axes of x, True = valid; masked steps count
            as padding, and a window without valid steps returns 0.
        segments, with dims=1 and an output for each time step: ints (..., T); steps of other
            segments count as padding. A segment begins wherever the number changes.

    Args:
        size: window size, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.
        stride: distance of two windows; the size of the window if None.
        padding: "VALID" (none), "SAME", an int, or a pair (before, after) for each axis.
        dilation: distance of two entries of a window.

    Raises:
        LayerError: x has too few axes or is smaller than the window; with padding, an axis of x is
            shorter than the dilation; a mask of steps with "SAME" and a stride, because windows
            would depend on the length of x; segments, unless stride is 1 and y as long as x.

    Example:
        >>> net = dp.max_pool(2)
        >>> net({}, jnp.arange(16.0).reshape(4, 4, 1))[..., 0].tolist()
        [[5.0, 7.0], [13.0, 15.0]]

    Source: Riesenhuber and Poggio 1999, Nature Neuroscience 2, 1019-1025.
    """

    def maxima(reduce: Reduce, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        low = np.asarray(lowest(x), x.dtype)
        if valid is None:
            return reduce(x, low, jax.lax.max)  # (batch, H', W', C)
        y = reduce(jnp.where(valid, x, low), low, jax.lax.max)
        count = reduce(valid.astype(jnp.int32), np.int32(0), jax.lax.add)
        return jnp.where(count > 0, y, jnp.zeros_like(y))

    return _sliding(maxima, _windows(size, dims, stride, padding, dilation))


@factory
def avg_pool(
    size: int | tuple[int, ...], *, dims: int = 2, stride: int | tuple[int, ...] | None = None,
    padding: Any = "VALID", count_padding: bool = False,
) -> Layer:
    """The mean of each window: ``y[p] = mean_q x[stride * p + q]``.

    By default padding does not count: at the border the mean is that of the positions inside x.
    Sums are accumulated in float32 or wider.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C) for two dims.
        mask, for one dim: booleans over leading axes of x, True = valid; masked steps count as
            padding, and a window without valid steps returns 0.
        segments, for one dim, if each step has a window: ints (..., T); steps of other segments
            count as padding. A segment begins wherever the number changes.

    Args:
        size: window size, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.
        stride: step between windows; the size of the window if None.
        padding: "VALID" (none), "SAME", an int, or a pair (before, after) for each axis.
        count_padding: True counts padding as zeros: the divisor is always the size of the window.

    Raises:
        LayerError: x has too few axes, is smaller than the window, or is not floating point; mask
            and segments do not fit, as in `max_pool`.

    Example:
        >>> net = dp.avg_pool(2)
        >>> net({}, jnp.arange(16.0).reshape(4, 4, 1))[..., 0].tolist()
        [[2.5, 4.5], [10.5, 12.5]]

    Source: LeCun, Bottou, Bengio, Haffner 1998, Proceedings of the IEEE 86, section II.B.
    """
    windows = _windows(size, dims, stride, padding)

    def means(reduce: Reduce, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        check_array(x)
        wide = x.astype(wide_dtype(x))
        zero = np.zeros((), wide.dtype)
        kept = wide if valid is None else jnp.where(valid, wide, zero)
        total = reduce(kept, zero, jax.lax.add)  # (batch, H', W', C)
        if count_padding or (valid is None and windows.margin == "VALID"):
            count = math.prod(windows.size)
        elif valid is None:
            count = windows.counts(x, total).astype(wide.dtype)  # (1, H', W', 1)
        else:
            count = reduce(valid.astype(wide.dtype), zero, jax.lax.add)  # (batch, H', W', 1)
            count = jnp.maximum(count, 1)
        return (total / count).astype(x.dtype)

    return _sliding(means, windows)


@factory
def global_avg_pool(*, dims: int = 2) -> Layer:
    """The mean over all positions: ``y = mean_p x[p]``, one value for each channel.

    Shapes:
        x: (..., H, W, C) -> (..., C) for two dims.
        mask, for one dim: booleans over leading axes of x, True = valid; the mean is that of the
            valid steps, and 0 if there are none.

    Args:
        dims: number of spatial axes.

    Example:
        >>> dp.global_avg_pool()({}, jnp.ones((2, 5, 5, 3))).shape
        (2, 3)

    Source: Lin, Chen, Yan 2013, arXiv:1312.4400, section 3.2.
    """
    return _global(mean, dims, floating=True)


@factory
def global_max_pool(*, dims: int = 2) -> Layer:
    """The largest value over all positions: ``y = max_p x[p]``, one for each channel.

    Of equal values the first has the gradient, as in `max_pool`.

    Shapes:
        x: (..., H, W, C) -> (..., C) for two dims.
        mask, for one dim: booleans over leading axes of x, True = valid; the maximum is that of the
            valid steps, and 0 if there are none.

    Args:
        dims: number of spatial axes.

    Example:
        >>> dp.global_max_pool()({}, jnp.ones((2, 5, 5, 3))).shape
        (2, 3)
    """
    return _global(maximum, dims, floating=False)


def mean(x: jax.Array, axis: Any, valid: jax.Array | None = None) -> jax.Array:
    """The mean of the valid entries along `axis`, 0 without any; reduced in float32 or wider."""
    if valid is None:
        return jnp.mean(x, axis=axis)  # reduces bfloat16 in float32 by itself
    wide = jnp.where(valid, x, jnp.zeros_like(x)).astype(wide_dtype(x))
    count = jnp.maximum(jnp.sum(valid, axis=axis), 1)
    return (jnp.sum(wide, axis=axis) / count.astype(wide.dtype)).astype(x.dtype)


def maximum(x: jax.Array, axis: Any, valid: jax.Array | None = None) -> jax.Array:
    """The largest of the valid entries along `axis`, 0 without any."""
    if valid is None:
        return _largest(x, axis)
    y = _largest(jnp.where(valid, x, jnp.asarray(lowest(x), x.dtype)), axis)
    return jnp.where(jnp.any(valid, axis=axis), y, jnp.zeros_like(y))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: jax.Array, axis: Any) -> jax.Array:
    """The maximum along axes; of equal values the first has the gradient, which JAX would split."""
    return jnp.max(x, axis=axis)


@_largest.defjvp
def _tangent(axis: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = _largest(x, axis)
    axes = [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    lengths = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    order = jnp.arange(math.prod(lengths)).reshape(lengths)
    smaller = x < jnp.expand_dims(y, axis)  # False everywhere if y is NaN
    first = jnp.where(smaller, order.size, order).min(axis, keepdims=True)
    return y, jnp.where(order == first, dx, 0).sum(axis)


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """The larger one, NaN if one is NaN; of equal values a has the gradient."""
    return jnp.where((b > a) | (b != b), b, a)


def lowest(x: jax.Array) -> float | int | bool:
    """The smallest value of the dtype of x, minus infinity for floats."""
    if x.dtype == bool:
        return False
    return -jnp.inf if is_float(x) else int(jnp.iinfo(x.dtype).min)


def pool(
    pooled: Callable[..., jax.Array], dims: int, *, floating: bool = False,
    by_segment: Callable[..., jax.Array] | None = None,
    check_mask: Callable[..., None] = lambda mask, x: None,
) -> Layer:
    """The layer of ``pooled(x)``, or of ``pooled(x, valid)`` with a mask, valid (..., T, 1).

    With segments it is ``by_segment(x, segments, mask)``; None refuses them.
    """

    def init(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        return {}, {}

    def apply(
        params: Any, state: Any, x: jax.Array, *, mask: jax.Array | None = None,
        segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, Any]:
        check_array(x, rank=dims + 1, axes=AXES[dims], floating=floating)
        if 0 in x.shape[-dims - 1 : -1]:
            raise LayerError("at least one position to pool", show(x), "leave such an input out: "
                             "an empty window has no mean and no maximum")
        check_mask(mask, x)
        if segments is not None and by_segment:
            return by_segment(x, segments, mask), state
        refuse_segments(segments)
        if mask is None:
            return pooled(x), state
        valid = jnp.broadcast_to(widened(mask, x.shape), (*x.shape[:-1], 1))  # (..., T, 1)
        return pooled(x, valid), state

    return Layer(init, apply, cannot_stream, bare=True, side=takes(dims))


def _sliding(pooled: Callable[..., jax.Array], windows: _Windows) -> Layer:
    """The layer of ``pooled(reduce, x, valid)``, where `reduce` reduces each window of an array."""
    dims = len(windows.size)

    def whole(x: jax.Array, *valid: jax.Array) -> jax.Array:
        y = on_images(functools.partial(pooled, windows.reduce), dims, x, *valid)
        check_fits(x, y, "window")
        return y

    def by_segment(x: jax.Array, segments: jax.Array, mask: jax.Array | None) -> jax.Array:
        entries, valid = windows.apart(x, segments, mask)
        return on_images(functools.partial(pooled, windows.reduce_apart), 1, entries, valid)

    def check_mask(mask: jax.Array | None, x: jax.Array) -> None:
        check_length(mask, x, windows.margin, windows.extent, windows.stride)

    return pool(whole, dims, by_segment=by_segment, check_mask=check_mask)


def _windows(size: Any, dims: int, stride: Any, padding: Any, dilation: Any = 1) -> _Windows:
    """The windows of a pool; raise if one of them may hold padding alone."""
    size = window(size, dims)
    dims = len(size)
    stride = size if stride is None else edges("stride", stride, dims)
    dilation = edges("dilation", dilation, dims)
    extent = extents(size, dilation)
    margin = margins(padding, dims)
    if not isinstance(margin, str) and any(
            max(pair) >= k for pair, k in zip(margin, extent, strict=True)):
        raise LayerError(f"padding below the size {extent}", f"{margin}",
                         "pad less: a window of padding alone has no mean and no maximum")
    return _Windows(size, extent, stride, dilation, margin)


@dataclasses.dataclass(frozen=True, eq=False)
class _Windows:
    """The windows that slide over x, and how an array is reduced over each of them."""

    size: Edges
    extent: Edges  # positions of x that a window spans
    stride: Edges
    dilation: Edges
    margin: Padding

    def reduce(self, x: jax.Array, start: Any, combine: Callable[..., Any]) -> jax.Array:
        """Combine the entries of each window of x: (batch, H, W, C) -> (batch, H', W', C)."""
        if set(self.dilation) != {1}:
            return self.reduce_dilated(x, start, combine)
        pairs = self.margin if isinstance(self.margin, str) else ((0, 0), *self.margin, (0, 0))
        return jax.lax.reduce_window(
            x, start, combine, (1, *self.size, 1), (1, *self.stride, 1), pairs)

    def reduce_dilated(self, x: jax.Array, start: Any, combine: Callable[..., Any]) -> jax.Array:
        """The same by slices: with dilation the maximum of `reduce_window` has no gradient."""
        pairs = pairs_for(self.margin, x, self.extent, self.stride)
        if any(any(pair) and length < d
               for pair, length, d in zip(pairs, x.shape[1:-1], self.dilation, strict=True)):
            raise LayerError(f"padded axes at least as long as the dilation {self.dilation}",
                             f"{x.shape[1:-1]}", "dilate less: a window of padding alone has no "
                             "maximum")
        x = jax.lax.pad(x, start, [(0, 0, 0), *((*pair, 0) for pair in pairs), (0, 0, 0)])
        combine = _larger if combine is jax.lax.max else combine
        # The last axis comes first: of equal values, the first in the first row has the gradient.
        for i in reversed(range(len(self.size))):
            before = (slice(None),) * (i + 1)  # the batch axis, and spatial axes before this one
            positions = max(x.shape[i + 1] - self.extent[i] + 1, 0)
            entries = [x[(*before, slice(q, q + positions, self.stride[i]))]
                       for q in range(0, self.extent[i], self.dilation[i])]
            x = functools.reduce(combine, entries)
        return x

    def counts(self, x: jax.Array, y: Any) -> jax.Array:
        """How many positions of x are in each window of y, (1, H', W', 1): a product over axes.

        They are computed from indices: a sliding sum of ones is a constant, which XLA would
        evaluate while it compiles, for up to a minute.
        """
        pairs = pairs_for(self.margin, x, self.size, self.stride)
        counts = []
        for i, (before, _) in enumerate(pairs):
            axis = i + 1
            shape = [n if a == axis else 1 for a, n in enumerate(y.shape)]
            first = self.stride[i] * jax.lax.broadcasted_iota(jnp.int32, shape, axis) - before
            end = jnp.minimum(first + self.size[i], x.shape[axis])
            counts.append(end - jnp.maximum(first, 0))
        return functools.reduce(jnp.multiply, counts)

    def apart(
        self, x: jax.Array, segments: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The windows of all steps in sequence, (..., T * size, C), and their valid entries."""
        back = reach_back(segments, self.margin, self.extent, self.stride)
        segments, valid = check_segments(segments, x.shape[:-1]), over_steps(mask, x)
        runs = jnp.cumsum(begins(segments, valid), -1, dtype=jnp.int32)  # index of the segment
        if valid is not None:
            runs = jnp.where(valid, runs, -1)
        around = [(0, 0)] * (x.ndim - 2) + [(back, self.extent[0] - 1 - back)]
        x = jnp.pad(x, [*around, (0, 0)])
        runs = jnp.pad(runs, around, constant_values=-1)
        entries, same = apart(x, runs, self.size[0], self.dilation[0], back)
        return entries, same[..., None]

    def reduce_apart(self, x: jax.Array, start: Any, combine: Callable[..., Any]) -> jax.Array:
        """Combine the entries of windows in sequence: (batch, T * size, C) -> (batch, T, C)."""
        window = (1, *self.size, 1)
        return jax.lax.reduce_window(x, start, combine, window, window, "VALID")


def _global(reduce: Callable[..., jax.Array], dims: int, *, floating: bool) -> Layer:
    """The layer of ``reduce(x, axes)`` over all spatial axes."""
    window(1, dims)  # refuses a wrong number of axes
    axes = tuple(range(-dims - 1, -1))

    def pooled(x: jax.Array, *valid: jax.Array) -> jax.Array:
        return reduce(x, axes, *valid)

    return pool(pooled, dims, floating=floating)
