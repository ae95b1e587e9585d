"""Residual networks: blocks that add to what they are given.

He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", arXiv:1512.03385, table 1,
with the stride of a bottleneck in its 3x3 convolution, as everywhere since (Gross and Wilber 2016).
The blocks of a stage that are alike are one `repeat`.
"""

from __future__ import annotations

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
    zero_init: bool = True,
) -> Layer:
    """Stages of residual blocks: ``y = linear(mean(stage_4(... stage_1(stem(x)))))``.

    Shapes:
        x: (..., H, W, C) -> (..., classes); sides are divided by 32 (by 8 without the stem's 4).
        params: ``stem``, ``stage_1`` to ``stage_4`` with ``first`` and the stacked ``rest``,
            ``head``; 11,689,512 numbers at depth 18, 25,557,032 at depth 50.

    Args:
        depth: 18 or 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        classes: how many.
        width: channels of the first stage; every later stage has twice as many.
        stem: the layer before the stages; None is `image_stem`, for images of 224 x 224. It
            must give `width` channels.
        zero_init: the last normalization of each branch starts with scale 0, so that every block
            starts as the identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1).

    Raises:
        LayerError: at composition, for another depth; at ``init``, for a stem of other channels.

    Example:
        >>> net = dp.models.resnet(18, 10)
        >>> net.plan(jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)).y.shape
        (2, 10)

    Source: He, Zhang, Ren, Sun 2015, arXiv:1512.03385, table 1.
    """
    if depth not in _DEPTHS:
        raise LayerError(f"depth out of {', '.join(map(str, _DEPTHS))}", repr(depth),
                         "build others from image_stem and stages of diffprog.models.resnet")
    check_count("classes", classes)
    check_count("width", width)
    block, counts = _DEPTHS[depth]
    widths = [width * 2**i for i in range(len(counts))]
    before = image_stem(width) if stem is None else as_layer(stem)
    return serial(stem=before, **stages(block, counts, widths, zero_init=zero_init),
                  head=global_avg_pool() >> linear(classes))


def image_stem(width: int) -> Layer:
    """A convolution of 7 x 7 and a pool, each of stride 2."""
    return _conv_norm(width, 7, stride=2) >> jax.nn.relu >> max_pool(3, stride=2, padding=1)


def stages(
    block: Any, counts: Sequence[int], widths: Sequence[int], *, zero_init: bool = True
) -> dict[str, Layer]:
    """The stages by name: `counts` blocks each, all stages but the first halving the sides.

    A stage begins with a block that projects, unless it changes neither sides nor channels.
    """
    found = {}
    for i, (count, width) in enumerate(zip(counts, widths, strict=True)):
        project = i > 0 or block is bottleneck
        parts = {}
        if project:
            stride = 2 if i > 0 else 1
            parts["first"] = block(width, stride=stride, project=True, zero_init=zero_init)
        if count > len(parts):
            parts["rest"] = repeat(count - len(parts), block(width, zero_init=zero_init))
        found[f"stage_{i + 1}"] = serial(**parts)
    return found


def basic(
    width: int, *, stride: int = 1, project: bool = False, zero_init: bool = True
) -> Layer:
    """Two convolutions of 3 x 3: ``y = relu(x + f(x))``, figure 5 (left) of the paper."""
    body = (_conv_norm(width, 3, stride=stride) >> jax.nn.relu
            >> _conv_norm(width, 3, scale_init=_last(zero_init)))
    return _block(body, width, stride, project)


def bottleneck(
    width: int, *, stride: int = 1, project: bool = False, zero_init: bool = True
) -> Layer:
    """Down, across and up to 4 * width channels: ``y = relu(x + f(x))``, figure 5 (right)."""
    body = (_conv_norm(width, 1) >> jax.nn.relu
            >> _conv_norm(width, 3, stride=stride) >> jax.nn.relu
            >> _conv_norm(4 * width, 1, scale_init=_last(zero_init)))
    return _block(body, 4 * width, stride, project)


_DEPTHS = {
    18: (basic, (2, 2, 2, 2)), 34: (basic, (3, 4, 6, 3)), 50: (bottleneck, (3, 4, 6, 3)),
    101: (bottleneck, (3, 4, 23, 3)), 152: (bottleneck, (3, 8, 36, 3)),
}


def _block(body: Layer, features: int, stride: int, project: bool) -> Layer:
    shortcut = _conv_norm(features, 1, stride=stride) if project else None
    return residual(body, shortcut) >> jax.nn.relu


def _last(zero_init: bool) -> Initializer:
    return "zeros" if zero_init else "ones"


def _conv_norm(
    features: int, size: int, *, stride: int = 1, scale_init: Initializer = "ones"
) -> Layer:
    # Padding on both sides alike, as the published weights were trained; "SAME" pads more behind.
    # he_normal: He et al. 2015, "Delving deep into rectifiers", arXiv:1502.01852, eq. 10.
    convolution = conv(features, size, stride=stride, padding=size // 2, bias=False,
                       kernel_init="he_normal")
    return convolution >> batch_norm(scale_init=scale_init)
