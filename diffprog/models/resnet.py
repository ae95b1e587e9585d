"""Residual networks: each block adds its output to its input.

He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", arXiv:1512.03385, table 1,
with the stride of a bottleneck in its 3x3 convolution, as is usual since Gross and Wilber 2016. The
identical blocks of a stage are one `repeat`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from diffprog.core.arguments import check_count
from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer, as_layer
from diffprog.core.parameters import Initializer
from diffprog.layers.linear import linear
from diffprog.layers.norms.batch_norm import batch_norm
from diffprog.layers.spatial.conv import conv
from diffprog.layers.spatial.pool import global_avg_pool, max_pool
from diffprog.transforms.repeat import repeat
from diffprog.wiring.combinators import residual, serial

__all__ = ["resnet"]



@known
def resnet(
    depth: int = 50, classes: int = 1000, *, width: int = 64, stem: Any = None,
    zero_init: bool = True, kernel_init: Initializer = "he_normal_fan_out",
) -> Layer:
    """Stages of residual blocks: ``y = linear(mean(stage_4(... stage_1(stem(x)))))``.

    Shapes:
        x: (..., H, W, C) -> (..., classes); the stem divides sides by 4, the
            stages by 8.
        params: ``stem``, ``stage_1`` to ``stage_4`` with ``first`` and the stacked ``rest``,
            ``head``; 11,689,512 parameters at depth 18, 25,557,032 at depth 50.

    Args:
        depth: 18 or 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        classes: number of classes.
        width: channels of the first stage; each later stage has twice as many.
        stem: the layer before the stages, with `width` output channels; None is `image_stem`, for
            images of 224 x 224.
        zero_init: initialize the last normalization of each block with scale 0, so that the block
            starts as the identity.
        kernel_init: initializer of the convolutions, but not of a `stem` of your own; normal with
            variance 2 / fan_out. The head begins as normal with standard deviation 0.01.

    Raises:
        LayerError: at composition, for another depth; at ``init``, for a stem with other channels.

    Example:
        >>> net = dp.models.resnet(18, 10)
        >>> net.plan(jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)).y.shape
        (2, 10)

    Source: He, Zhang, Ren, Sun 2015, arXiv:1512.03385, table 1; initial values: Goyal et al. 2017,
    arXiv:1706.02677, section 5.1.
    """
    if depth not in _DEPTHS:
        raise LayerError(f"depth out of {', '.join(map(str, _DEPTHS))}", repr(depth),
                         "build others from image_stem and stages of diffprog.models.resnet")
    check_count("classes", classes)
    check_count("width", width)
    block, counts = _DEPTHS[depth]
    widths = [width * 2**i for i in range(len(counts))]
    head = linear(classes, kernel_init=0.01)
    return serial(stem=image_stem(width, kernel_init) if stem is None else as_layer(stem),
                  **stages(block, counts, widths, zero_init=zero_init, kernel_init=kernel_init),
                  head=global_avg_pool() >> head)


def image_stem(width: int, kernel_init: Initializer = "he_normal_fan_out") -> Layer:
    """A 7 x 7 convolution and a max pool, each with stride 2."""
    convolution = _conv_norm(width, 7, stride=2, kernel_init=kernel_init)
    return convolution >> jax.nn.relu >> max_pool(3, stride=2, padding=1)


def stages(
    block: Any, counts: Sequence[int], widths: Sequence[int], **inits: Any
) -> dict[str, Layer]:
    """The stages by name, with `counts` blocks each; all but the first halve the sides.

    The first block of a stage has a projection shortcut if it changes sides or channels. `inits`
    are `zero_init` and `kernel_init`.
    """
    by_name = {}
    for i, (count, width) in enumerate(zip(counts, widths, strict=True)):
        blocks = {}
        if i > 0 or block is bottleneck:
            stride = 2 if i > 0 else 1
            blocks["first"] = block(width, stride=stride, project=True, **inits)
        rest = count - len(blocks)
        if rest > 0:
            blocks["rest"] = repeat(rest, block(width, **inits))
        by_name[f"stage_{i + 1}"] = serial(**blocks)
    return by_name


def basic(
    width: int, *, stride: int = 1, project: bool = False, zero_init: bool = True,
    kernel_init: Initializer = "he_normal_fan_out",
) -> Layer:
    """Two 3 x 3 convolutions: ``y = relu(x + f(x))``, figure 5 (left) of the paper."""
    conv_norm = functools.partial(_conv_norm, kernel_init=kernel_init)
    body = (conv_norm(width, 3, stride=stride) >> jax.nn.relu
            >> conv_norm(width, 3, scale_init=_last_scale(zero_init)))
    return _block(body, conv_norm(width, 1, stride=stride) if project else None)


def bottleneck(
    width: int, *, stride: int = 1, project: bool = False, zero_init: bool = True,
    kernel_init: Initializer = "he_normal_fan_out",
) -> Layer:
    """1 x 1, 3 x 3 and 1 x 1 convolutions: ``y = relu(x + f(x))``, figure 5 (right)."""
    conv_norm = functools.partial(_conv_norm, kernel_init=kernel_init)
    body = (conv_norm(width, 1) >> jax.nn.relu
            >> conv_norm(width, 3, stride=stride) >> jax.nn.relu
            >> conv_norm(4 * width, 1, scale_init=_last_scale(zero_init)))
    return _block(body, conv_norm(4 * width, 1, stride=stride) if project else None)


_DEPTHS = {
    18: (basic, (2, 2, 2, 2)), 34: (basic, (3, 4, 6, 3)), 50: (bottleneck, (3, 4, 6, 3)),
    101: (bottleneck, (3, 4, 23, 3)), 152: (bottleneck, (3, 8, 36, 3)),
}


def _block(body: Layer, shortcut: Layer | None) -> Layer:
    return residual(body, shortcut) >> jax.nn.relu


def _last_scale(zero_init: bool) -> Initializer:
    return "zeros" if zero_init else "ones"


def _conv_norm(
    features: int, size: int, *, stride: int = 1, kernel_init: Initializer = "he_normal_fan_out",
    scale_init: Initializer = "ones",
) -> Layer:
    # The padding is symmetric, as in the published weights; "SAME" pads more at the end.
    convolution = conv(features, size, stride=stride, padding=size // 2, bias=False,
                       kernel_init=kernel_init)
    return convolution >> batch_norm(scale_init=scale_init)
