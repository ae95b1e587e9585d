"""Layers that change the spatial axes: upsampling, pixel shuffling, patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array, check_count
from diffprog.core.dtypes import wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import cleared, refuse_segments, widened
from diffprog.core.meshes import reshaped
from diffprog.core.notation import show
from diffprog.core.plans import Params, State
from diffprog.layers.spatial.window import AXES, Edges, cannot_stream, takes, window

__all__ = ["patches", "pixel_shuffle", "upsample"]


@factory
def upsample(
    factor: int | tuple[int, ...] | None = None, *, size: int | tuple[int, ...] | None = None,
    dims: int = 2, method: str = "nearest",
) -> Layer:
    """Interpolate x on a finer grid: ``y[i] = x at position (i + 1/2) * H / H' - 1/2``.

    "nearest" takes the value at the nearest position (the later of two) and keeps every dtype;
    "linear" and "cubic" weight the 2 and 4 nearest positions of each axis, in float32 or wider.
    Positions outside x have no weight.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C) for two dims.
        mask, for one dim: booleans over leading axes of x, True = valid; masked steps have no
            weight, and y is 0 there.

    Args:
        factor: H' / H, or one for each axis; a tuple sets `dims`.
        size: H' instead of a factor, or one for each axis; at least H.
        dims: number of spatial axes, 1 to 3.
        method: "nearest", "linear" or "cubic" (Keys' kernel with a = -1/2).

    Raises:
        LayerError: both or neither of factor and size are given; x has too few axes or is larger
            than size; x holds no floats, for linear and cubic; a mask of steps with a size, because
            positions would depend on the length of the padding; segments, because the steps of y
            are others.

    Example:
        >>> dp.upsample(2, dims=1)({}, jnp.array([[1.0], [2.0]]))[:, 0].tolist()
        [1.0, 1.0, 2.0, 2.0]
        >>> dp.upsample(2, dims=1, method="linear")({}, jnp.array([[1.0], [2.0]]))[:, 0].tolist()
        [1.0, 1.25, 1.75, 2.0]

    Source: Keys 1981, IEEE Transactions on Acoustics, Speech, and Signal Processing 29, eq. 15.
    """
    if (factor is None) == (size is None):
        raise LayerError("exactly one of factor and size", f"factor={factor} and size={size}",
                         "write upsample(2), for example")
    if method not in ("nearest", "linear", "cubic"):
        raise LayerError("method out of cubic, linear, nearest", repr(method),
                         "choose 'nearest' for exact copies")
    given = window(size, dims) if factor is None else window(factor, dims, "factor")
    dims = len(given)

    def resized(x: jax.Array, mask: jax.Array | None) -> jax.Array:
        if mask is not None and mask.ndim == x.ndim - 1 and size is not None:
            raise LayerError("a factor with a mask", f"size={size}", "pass upsample(2), for "
                             "example: a size stretches x by the length of its padding")
        old = x.shape[-dims - 1 : -1]
        new = given
        if factor is not None:
            new = tuple(n * f for n, f in zip(old, given, strict=True))
        if not all(0 < n <= m for n, m in zip(old, new, strict=True)):
            raise LayerError(f"spatial axes from 1 to {new}", show(x), "pool to make x smaller")
        if method == "nearest":
            for axis, n in zip(range(-dims - 1, -1), new, strict=True):
                x = _nearest(x, n, axis)
            return x
        return _interpolated(x, mask, new, method)

    return _reshaping(resized, dims)


@factory
def pixel_shuffle(factor: int) -> Layer:
    """Move channels into space: ``y[f*h + i, f*w + j, c] = x[h, w, c*f*f + i*f + j]``.

    After a convolution it is a learned upsampling, computed on the coarse grid.

    Shapes:
        x: (..., H, W, C * f * f) -> (..., H * f, W * f, C), f being the factor.

    Args:
        factor: ratio of the height and width of y to those of x; positive.

    Raises:
        LayerError: x has too few axes, or a number of channels that is no multiple of f * f.

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
        keep, features = len(batch), channels // factor**2
        y = reshaped(x, keep, height, width, features, factor, factor)  # (..., H, W, C, f, f)
        y = jnp.moveaxis(y, (-2, -1), (-4, -2))  # (..., H, f, W, f, C)
        return reshaped(y, keep, height * factor, width * factor, features)

    return _reshaping(shuffled, 2)


@factory
def patches(size: int | tuple[int, ...], *, dims: int = 2) -> Layer:
    """Cut x into tiles, and flatten each to a vector: ``y[n] = x[tile n].reshape(-1)``.

    Tiles are in row-major order, as are the values in each, channels last. So
    ``patches(p) >> linear(d)`` is ``conv(d, p, stride=p, padding="VALID")`` with a reshaped kernel.

    Shapes:
        x: (..., H, W, C) -> (..., H / size * W / size, size * size * C) for two dims.
        mask, for one dim: booleans over leading axes of x, True = valid; masked steps count as
            zeros.

    Args:
        size: size of the tiles, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.

    Raises:
        LayerError: x has too few axes, or an axis that is no multiple of size; segments, because
            the steps of y are others.

    Example:
        >>> dp.patches(2)({}, jnp.arange(8).reshape(2, 4, 1)).tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1.
    """
    size = window(size, dims)
    dims = len(size)

    def cut(x: jax.Array, _: Any) -> jax.Array:
        keep, space = x.ndim - dims - 1, x.shape[-dims - 1 : -1]
        if any(length % n for length, n in zip(space, size, strict=True)):
            raise LayerError(f"spatial axes that are multiples of {size}", show(x),
                             "crop or pad x, or choose a size that divides them")
        counts = tuple(length // n for length, n in zip(space, size, strict=True))
        split = [n for pair in zip(counts, size, strict=True) for n in pair]
        y = reshaped(x, keep, *split, x.shape[-1])  # (..., H / size, size, W / size, size, C)
        tiles, ahead = tuple(range(-2 * dims - 1, -1, 2)), tuple(range(-2 * dims - 1, -dims - 1))
        y = jnp.moveaxis(y, tiles, ahead)  # (..., H / size, W / size, size, size, C)
        return reshaped(y, keep, math.prod(counts), math.prod(size) * x.shape[-1])

    return _reshaping(cut, dims)


def _nearest(x: jax.Array, new: int, axis: int) -> jax.Array:
    """One axis, in integer arithmetic: `jax.image.resize` rounds the positions in float32."""
    old = x.shape[axis]
    if new % old == 0:
        return jnp.repeat(x, new // old, axis)  # its gradient is a sum, not a scatter
    return x.take((2 * np.arange(new) + 1) * old // (2 * new), axis)


def _interpolated(
    x: jax.Array, mask: jax.Array | None, new: Edges, method: str
) -> jax.Array:
    """The weighted mean of the nearest positions, with a mask of the valid ones among them."""
    check_array(x)
    wide = x.astype(wide_dtype(x))
    space = (*x.shape[: -len(new) - 1], *new)  # (..., H', W')
    y = jax.image.resize(wide, (*space, x.shape[-1]), method)
    if mask is not None:  # weights of valid steps sum to 1, as all do at a border
        valid = jnp.broadcast_to(widened(mask, x.shape), (*x.shape[:-1], 1))  # (..., T, 1)
        weights = jax.image.resize(valid.astype(wide.dtype), (*space, 1), method)  # (..., T', 1)
        kept = _nearest(valid, new[0], -2)
        y = jnp.where(kept, y / jnp.where(kept, weights, 1), 0)
    return y.astype(x.dtype)


def _reshaping(f: Callable[[jax.Array, Any], jax.Array], dims: int) -> Layer:
    """The layer ``y = f(x, mask)`` over `dims` spatial axes, with zeros at masked steps of x."""

    def init(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        return {}, {}

    def apply(
        params: Any, state: Any, x: jax.Array, *, mask: jax.Array | None = None,
        segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, Any]:
        refuse_segments(segments)
        check_array(x, rank=dims + 1, axes=AXES[dims], floating=False)
        return f(cleared(x, mask), mask), state

    return Layer(init, apply, cannot_stream, bare=True, side=takes(dims))
