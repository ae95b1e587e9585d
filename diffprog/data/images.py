"""Random changes of images, on the device: pure functions of a key, for use under jit.

Images are (batch, height, width, channels). The draw of an example depends on the key and its
number in the batch alone, so the first examples of a longer batch are changed alike.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.ndimage import map_coordinates

from diffprog.core.arguments import arrays, check_array, check_count, check_positive
from diffprog.core.dtypes import is_float, standard_promotion, wide, wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.guards import check_key
from diffprog.core.notation import show

__all__ = ["mixup", "normalize", "random_crop", "random_flip", "random_rotation"]


def random_crop(
    key: jax.Array, x: jax.Array, size: int | tuple[int, int] | None = None, *, padding: int = 0
) -> jax.Array:
    """Crop each image at a random place: ``y[i, j] = x[top + i, left + j]``, after zero padding.

    All places are equally likely.

    Shapes:
        x: (batch, height, width, channels), any dtype. y: (batch, *size, channels).

    Args:
        key: of the draws.
        size: height and width of y, one int for both; None is the size of x.
        padding: number of zero pixels added on each of the four sides first.

    Raises:
        LayerError: x is no batch of images; a size larger than the padded image.

    Example:
        >>> x = jnp.ones((8, 32, 32, 3))
        >>> dp.data.random_crop(jax.random.key(0), x, padding=4).shape
        (8, 32, 32, 3)

    Source: He et al. 2016, arXiv:1512.03385, section 4.2: padding 4 and a crop of 32 by 32.
    """
    x = _images(key, x)
    check_count("padding", padding, 0)
    sizes = x.shape[1:3] if size is None else size if isinstance(size, tuple) else (size, size)
    height, width = sizes
    check_count("height", height)
    check_count("width", width)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    room = x.shape[1] - height + 1, x.shape[2] - width + 1
    if min(room) < 1:
        raise LayerError(f"size of at most {x.shape[1:3]}, the padded image",
                         f"{(height, width)}", "lower it, or add padding")

    def crop(key: jax.Array, image: jax.Array) -> jax.Array:
        top, left = (jax.random.randint(part, (), 0, most)
                     for part, most in zip(jax.random.split(key), room, strict=True))
        return jax.lax.dynamic_slice(image, (top, left, 0), (height, width, image.shape[2]))

    return jax.vmap(crop)(_keys(key, x), x)


def random_flip(key: jax.Array, x: jax.Array) -> jax.Array:
    """Mirror each image left to right with probability 1/2: ``y[i, j] = x[i, width - 1 - j]``.

    Shapes:
        x: (batch, height, width, channels), any dtype. y: as x.

    Args:
        key: of the draws.

    Raises:
        LayerError: x is no batch of images.

    Example:
        >>> x = jnp.arange(4.0).reshape(4, 1, 1, 1) + jnp.array([0.0, 0.5])[:, None]
        >>> dp.data.random_flip(jax.random.key(0), x).shape
        (4, 1, 2, 1)

    Source: Krizhevsky et al. 2012, NeurIPS 25, section 4.1.
    """
    x = _images(key, x)
    flipped = jax.vmap(jax.random.bernoulli)(_keys(key, x))
    return jnp.where(flipped[:, None, None, None], x[:, :, ::-1], x)


def random_rotation(key: jax.Array, x: jax.Array, degrees: float) -> jax.Array:
    """Rotate each image about its center: ``y(p) = x(R(-angle) (p - center) + center)``.

    The angle is uniform in [-degrees, degrees), and counterclockwise if positive. Values between
    pixels are interpolated linearly; outside of the image they are 0. Ints are rounded.

    Shapes:
        x: (batch, height, width, channels), any dtype. y: as x.

    Args:
        key: of the draws.
        degrees: the largest angle; positive.

    Raises:
        LayerError: x is no batch of images; degrees is not positive.

    Example:
        >>> x = jnp.ones((8, 5, 5, 1))
        >>> y = dp.data.random_rotation(jax.random.key(0), x, degrees=15)
        >>> bool(jnp.allclose(y[:, 2, 2], 1))
        True

    Source: Simard, Steinkraus, Platt 2003, ICDAR, section 2, doi:10.1109/ICDAR.2003.1227801.
    """
    x = _images(key, x)
    check_positive("degrees", degrees, "pass the largest angle")
    most = np.deg2rad(degrees)
    rows, columns = (np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in x.shape[1:3])

    def rotate(key: jax.Array, image: jax.Array) -> jax.Array:
        angle = jax.random.uniform(key, (), jnp.float32, -most, most)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        row = cos * rows[:, None] + sin * columns[None] + (len(rows) - 1) / 2
        column = cos * columns[None] - sin * rows[:, None] + (len(columns) - 1) / 2
        return jax.vmap(lambda c: map_coordinates(c, [row, column], order=1), -1, -1)(image)

    with standard_promotion():
        y = jax.vmap(rotate)(_keys(key, x), wide(x))
    return (y if is_float(x) else jnp.round(y)).astype(x.dtype)


def normalize(x: jax.Array, mean: Any, std: Any) -> jax.Array:
    """Center and scale each channel: ``y = (x - mean) / std``.

    Shapes:
        x: floats (..., channels). mean, std: numbers, or arrays (channels,). y: as x.

    Args:
        mean: of each channel over the training data.
        std: standard deviation of each channel; positive.

    Raises:
        LayerError: x is of ints; mean or std of another shape, or a std that is not positive.

    Example:
        >>> x = jnp.ones((2, 4, 4, 3), jnp.uint8)
        >>> y = dp.data.normalize(x / 255, mean=[0.5, 0.5, 0.5], std=0.25)
        >>> y.shape, y.dtype
        ((2, 4, 4, 3), dtype('float32'))

    Source: LeCun et al. 1998, Efficient BackProp, section 4.3, doi:10.1007/3-540-49430-8_2.
    """
    x = arrays(x)
    check_array(x, 1, "(..., channels)")
    mean, std = (_of_channels(name, a, x) for name, a in (("mean", mean), ("std", std)))
    return ((wide(x) - mean) / std).astype(x.dtype)


def mixup(
    key: jax.Array, x: jax.Array, y: jax.Array, *, alpha: float = 0.2
) -> tuple[jax.Array, jax.Array]:
    """Mix each example with another: ``x_i = l x_i + (1 - l) x_j, y_i = l y_i + (1 - l) y_j``.

    j is a random permutation of the batch, and l is drawn for each example from
    Beta(alpha, alpha).

    Shapes:
        x: floats (batch, ...).
        y: floats (batch, ...), such as labels by `jax.nn.one_hot`.
        Returns both mixed, with their dtypes.

    Args:
        key: of the draws.
        alpha: strength; positive. A small one leaves most examples almost unmixed; at 1, l is
            uniform.

    Raises:
        LayerError: x or y of ints, or of different lengths; alpha is not positive.

    Example:
        >>> x, y = jnp.arange(8.0).reshape(4, 2), jax.nn.one_hot(jnp.array([0, 1, 2, 0]), 3)
        >>> x, y = dp.data.mixup(jax.random.key(0), x, y)
        >>> bool(jnp.allclose(y.sum(-1), 1))
        True

    Source: Zhang et al. 2018, arXiv:1710.09412, section 2.
    """
    check_key(key)
    x, y = arrays((x, y))
    check_array(x, 1, "(batch, ...)")
    if not is_float(y) or y.shape[:1] != x.shape[:1]:
        raise LayerError(f"y as floats with {x.shape[0]} examples, as x", show(y),
                         "encode the labels: jax.nn.one_hot(y, classes)")
    check_positive("alpha", alpha, "pass 0.2, for example, or leave mixup out")
    weight_key, order_key = jax.random.split(key)
    weights = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha, dtype=jnp.float32))(
        _keys(weight_key, x))
    order = jax.random.permutation(order_key, x.shape[0])

    def mix(a: jax.Array) -> jax.Array:
        own = weights.astype(wide_dtype(a)).reshape(-1, *[1] * (a.ndim - 1))
        return (own * wide(a) + (1 - own) * wide(a[order])).astype(a.dtype)

    return mix(x), mix(y)


def _images(key: Any, x: Any) -> jax.Array:
    """x as an array, after a check that it is a batch of images."""
    check_key(key)
    x = arrays(x)
    check_array(x, 4, "(batch, height, width, channels)", floating=False)
    if x.ndim != 4:
        raise LayerError("images (batch, height, width, channels)", show(x),
                         "merge the leading axes, or map over them by vmap")
    return x


def _keys(key: jax.Array, x: jax.Array) -> jax.Array:
    """A key for each example."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(x.shape[0]))


def _of_channels(name: str, value: Any, x: jax.Array) -> Any:
    """One number or those of the channels, in the rank of x and in float32 or wider."""
    traced = isinstance(value, Tracer)
    value = value if traced else np.asarray(value)
    if value.shape not in ((), x.shape[-1:]):
        raise LayerError(f"{name} as one number, or {x.shape[-1]} for the channels", show(value),
                         "compute it over all axes but the last")
    if name == "std" and not traced and not (value > 0).all():
        raise LayerError("std of positive numbers", str(value),
                         "leave out channels that are constant")
    return jax.lax.broadcast_to_rank(jnp.asarray(value).astype(wide_dtype(x)), x.ndim)
