"""Layers that trade space for space or channels: finer grids, shuffled pixels, patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array, check_count
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import cleared, refuse_segments, widened
from diffprog.core.meshes import reshaped
from diffprog.core.notation import show
from diffprog.layers.spatial.window import AXES, cannot_stream, takes, window

__all__ = ["patches", "pixel_shuffle", "upsample"]


@factory
def upsample(
    factor: int | tuple[int, ...] | None = None, *, size: int | tuple[int, ...] | None = None,
    dims: int = 2, method: str = "nearest",
) -> Layer:
    """Sample x on a finer grid: ``y[i] = x at place (i + 1/2) * H / H' - 1/2``, interpolated.

    "nearest" takes the value of the nearest place (the later of two) and keeps every dtype;
    "linear" and "cubic" weigh the 2 and 4 nearest places of each axis, in float32 or wider. What
    would lie beyond the border has no weight.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C) for two dims.
        mask, for one dim: booleans of the leading axes of x; what is not real has no weight, and
            gives 0.

    Args:
        factor: H' / H, or one for each axis; a tuple sets `dims`.
        size: H' instead of a factor, or one for each axis; at least H.
        dims: number of spatial axes, 1 to 3.
        method: "nearest", "linear" or "cubic" (Keys' kernel with a = -1/2).

    Raises:
        LayerError: both or none of factor and size are given; x has too few axes or is larger than
            size; linear and cubic are given no floats; a mask of steps with a size, because places
            would depend on how long x is padded; segments, which y has no steps of.

    Example:
        >>> dp.upsample(2, dims=1)({}, jnp.array([[1.0], [2.0]]))[:, 0].tolist()
        [1.0, 1.0, 2.0, 2.0]
        >>> dp.upsample(2, dims=1, method="linear")({}, jnp.array([[1.0], [2.0]]))[:, 0].tolist()
        [1.0, 1.25, 1.75, 2.0]

    Source: Keys 1981, IEEE Transactions on Acoustics, Speech, and Signal Processing 29, eq. 15.
    """
    if (factor is None) == (size is None):
        raise LayerError("either a factor or a size", f"factor={factor} and size={size}",
                         "write upsample(2), for example")
    if method not in ("nearest", "linear", "cubic"):
        raise LayerError("method out of cubic, linear, nearest", repr(method),
                         "choose 'nearest' for exact copies")
    given = window(size, dims) if factor is None else window(factor, dims, "factor")
    dims = len(given)

    def resized(x: jax.Array, mask: jax.Array | None) -> jax.Array:
        if mask is not None and mask.ndim == x.ndim - 1 and size is not None:
            raise LayerError("a factor where there is a mask", f"size={size}", "pass upsample(2), "
                             "for example: a size stretches x by how long it is padded")
        before = x.shape[-dims - 1 : -1]
        after = given if factor is None else tuple(
            side * f for side, f in zip(before, given, strict=True))
        if not all(0 < old <= new for old, new in zip(before, after, strict=True)):
            raise LayerError(f"sides from 1 to {after}", show(x), "pool to make x smaller")
        if method == "nearest":
            for axis, new in zip(range(-dims - 1, -1), after, strict=True):
                x = _nearest(x, new, axis)
            return x
        check_array(x)
        wide = x.astype(joint(x.dtype, jnp.float32))
        shape = (*x.shape[: -dims - 1], *after, x.shape[-1])
        y = jax.image.resize(wide, shape, method)
        if mask is not None:  # the weights of what is real have the sum 1, as all have at a border
            real = jnp.broadcast_to(widened(mask, x.shape), (*x.shape[:-1], 1))
            shares = jax.image.resize(real.astype(wide.dtype), (*shape[:-1], 1), method)
            kept = _nearest(real, after[0], -2)
            y = jnp.where(kept, y / jnp.where(kept, shares, 1), 0)
        return y.astype(x.dtype)

    return _reshaping(resized, dims)


@factory
def pixel_shuffle(factor: int) -> Layer:
    """Turn channels into space: ``y[f*h + i, f*w + j, c] = x[h, w, c*f*f + i*f + j]``.

    After a convolution it is an upsampling that is learned, at the cost of the coarse grid.

    Shapes:
        x: (..., H, W, C * f * f) -> (..., H * f, W * f, C), f being the factor.

    Args:
        factor: how many times as high and wide y is; positive.

    Raises:
        LayerError: x has too few axes, or channels that are no multiple of f * f.

    Example:
        >>> dp.pixel_shuffle(2)({}, jnp.arange(4.0).reshape(1, 1, 4))[..., 0].tolist()
        [[0.0, 1.0], [2.0, 3.0]]

    Source: Shi et al. 2016, arXiv:1609.05158, eq. 4.
    """
    check_count("factor", factor)

    def shuffled(x: jax.Array, _: Any) -> jax.Array:
        *batch, height, width, channels = x.shape
        if channels % factor**2:
            raise LayerError(f"channels that are a multiple of {factor**2}", show(x),
                             f"give the layer before it {factor**2} times the channels of y")
        keep = len(batch)
        y = reshaped(x, keep, height, width, channels // factor**2, factor, factor)
        y = jnp.moveaxis(y, (-2, -1), (-4, -2))  # (..., H, f, W, f, C)
        return reshaped(y, keep, height * factor, width * factor, channels // factor**2)

    return _reshaping(shuffled, 2)


@factory
def patches(size: int | tuple[int, ...], *, dims: int = 2) -> Layer:
    """Cut x into tiles, and make a vector of each: ``y[n] = x[tile n].reshape(-1)``.

    Tiles come row by row, the values inside likewise, channels last. So ``patches(p) >> linear(d)``
    is ``conv(d, p, stride=p, padding="VALID")`` with a reshaped kernel.

    Shapes:
        x: (..., H, W, C) -> (..., H / size * W / size, size * size * C) for two dims.
        mask, for one dim: booleans of the leading axes of x; what is not real counts as zero.

    Args:
        size: side of the tiles, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.

    Raises:
        LayerError: x has too few axes, or a side that is no multiple of size; segments, which y
            has no steps of.

    Example:
        >>> dp.patches(2)({}, jnp.arange(8).reshape(2, 4, 1)).tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1.
    """
    size = window(size, dims)
    dims = len(size)

    def cut(x: jax.Array, _: Any) -> jax.Array:
        keep, space = x.ndim - dims - 1, x.shape[-dims - 1 : -1]
        if any(side % n for side, n in zip(space, size, strict=True)):
            raise LayerError(f"sides that are multiples of {size}", show(x),
                             "crop or pad x, or choose a size that divides them")
        counts = tuple(side // n for side, n in zip(space, size, strict=True))
        split = [n for pair in zip(counts, size, strict=True) for n in pair]
        y = reshaped(x, keep, *split, x.shape[-1])
        y = jnp.moveaxis(y, tuple(range(-2 * dims, 0, 2)), tuple(range(-dims - 1, -1)))
        return reshaped(y, keep, math.prod(counts), math.prod(size) * x.shape[-1])

    return _reshaping(cut, dims)


def _nearest(x: jax.Array, new: int, axis: int) -> jax.Array:
    """One axis, by integers alone: `jax.image.resize` rounds the places in float32."""
    old = x.shape[axis]
    if new % old == 0:
        return jnp.repeat(x, new // old, axis)  # its gradient is a sum, not a scatter
    return x.take((2 * np.arange(new) + 1) * old // (2 * new), axis)


def _reshaping(f: Callable[[jax.Array, Any], jax.Array], dims: int) -> Layer:
    """The layer ``y = f(x, mask)`` without parameters, over `dims` axes of space, x cleared."""

    def apply(
        params: Any, state: Any, x: jax.Array, *, mask: jax.Array | None = None,
        segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, Any]:
        refuse_segments(segments)
        check_array(x, rank=dims + 1, axes=AXES[dims], floating=False)
        return f(cleared(x, mask), mask), state

    return Layer(lambda key, x, **_: ({}, {}), apply, cannot_stream, bare=True,
                 side=takes(dims))
