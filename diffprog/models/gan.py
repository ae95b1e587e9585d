"""DCGAN: a convolutional generator of images from noise, and a discriminator of real images.

Radford, Metz, Chintala 2015, "Unsupervised representation learning with deep convolutional
generative adversarial networks", arXiv:1511.06434: strides in place of pools, batch normalization
everywhere but at the images, and no fully connected hidden layers. `make_game` trains the two.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count
from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.layers.linear import linear
from diffprog.layers.norms.batch_norm import batch_norm
from diffprog.layers.reshape import flatten, reshape
from diffprog.layers.spatial.conv import conv, conv_transpose
from diffprog.wiring.combinators import serial

__all__ = ["dcgan_discriminator", "dcgan_generator"]


@known
def dcgan_generator(
    image_size: int = 64, features: int = 3, *, width: int = 128, smallest: int = 4
) -> Layer:
    """Generate an image from noise: ``y = tanh(up(... up(relu(norm(linear(x))))))``.

    Each ``up`` doubles height and width and halves the channels: a transposed 5 x 5 convolution,
    then batch normalization and ReLU. The last has neither, and its output goes through tanh.

    Shapes:
        x: (..., latent), usually standard normal -> (..., image_size, image_size, features) in
            (-1, 1), the range to which real images are scaled.
        params: ``project``, ``up_1``, ``up_2`` ... and ``image``; 18,855,043 parameters for a
            latent size of 100.

    Args:
        image_size: height and width in pixels, `smallest` times a power of two, at least 2.
        features: channels of the image.
        width: channels of the input to the last ``up``, doubled for each earlier one.
        smallest: height and width of the first feature map, to which the noise is projected.

    Raises:
        LayerError: image_size is not `smallest` times a power of two, at least 2.

    Example:
        >>> net = dp.models.dcgan_generator(8, 1, width=16)
        >>> net.plan(jax.ShapeDtypeStruct((2, 32), jnp.float32)).y.shape
        (2, 8, 8, 1)

    Source: Radford, Metz, Chintala 2015, arXiv:1511.06434, figure 1 and section 4.
    """
    check_count("features", features)
    widths = _widths(image_size, width, smallest)[::-1]
    shape = (smallest, smallest, widths[0])
    project = (linear(smallest**2 * widths[0], bias=False, kernel_init="normal")
               >> reshape(shape) >> batch_norm() >> jax.nn.relu)
    ups = {f"up_{i + 1}": _resized(conv_transpose, width) >> batch_norm() >> jax.nn.relu
           for i, width in enumerate(widths[1:])}
    return serial(project=project, **ups,
                  image=_resized(conv_transpose, features, bias=True) >> jnp.tanh)


@known
def dcgan_discriminator(
    image_size: int = 64, *, width: int = 128, smallest: int = 4
) -> Layer:
    """A logit, positive for real images: ``y = linear(down(... down(x)))``.

    Each ``down`` halves the sides: a 5 x 5 convolution of stride 2, batch normalization, and a
    leaky ReLU of slope 0.2. All but the first double the channels; the first has no normalization.

    Shapes:
        x: (..., image_size, image_size, features) in [-1, 1] -> (..., 1).
        params: ``down_1``, ``down_2`` ... and ``head``; 17,232,897 parameters for three channels.

    Args:
        image_size: side of the image in pixels, `smallest` doubled at least once.
        width: channels after the first halving.
        smallest: side in pixels of the last feature map, the input of the linear layer.

    Raises:
        LayerError: image_size is not `smallest` times a power of two.

    Example:
        >>> net = dp.models.dcgan_discriminator(8, width=16)
        >>> net.plan(jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)).y.shape
        (2, 1)

    Source: Radford, Metz, Chintala 2015, arXiv:1511.06434, sections 3 and 4.
    """
    leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)
    first, *others = _widths(image_size, width, smallest)
    downs = {f"down_{i + 2}": _resized(conv, width) >> batch_norm() >> leaky
             for i, width in enumerate(others)}
    return serial(down_1=_resized(conv, first, bias=True) >> leaky, **downs,
                  head=flatten() >> linear(1, kernel_init="normal"))


def _widths(image_size: int, width: int, smallest: int) -> list[int]:
    """The channels of the hidden feature maps, from the largest map to the smallest."""
    check_count("width", width)
    check_count("smallest", smallest)
    check_count("image_size", image_size, least=2 * smallest)
    times, rest = divmod(image_size, smallest)
    if rest or times & (times - 1):
        raise LayerError(f"image_size as {smallest} times a power of two", repr(image_size),
                         "resize the images: each step doubles the side")
    return [width * 2**i for i in range(times.bit_length() - 1)]


def _resized(convolution: Any, features: int, *, bias: bool = False) -> Layer:
    """A convolution that halves or doubles the sides; before a norm a bias has no effect."""
    return convolution(features, 5, stride=2, bias=bias, kernel_init="normal")
