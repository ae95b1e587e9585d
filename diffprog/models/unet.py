"""The U-Net that removes noise: down to coarse grids and up again, told how noisy x is.

Ho, Jain, Abbeel 2020, "Denoising diffusion probabilistic models", arXiv:2006.11239, appendix B.
What was seen on the way down is shown again on the way up. Time and class are side inputs; every
residual block adds a linear map of them to its channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from diffprog.core.arguments import check_count
from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.layers.attention.attention import self_attention
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.linear import linear
from diffprog.layers.norms.norm import group_norm
from diffprog.layers.spatial.conv import conv
from diffprog.layers.spatial.resize import upsample
from diffprog.models.denoiser import check_images, time_and_class
from diffprog.wiring.children import Children
from diffprog.wiring.combinators import serial
from diffprog.wiring.merging import concatenate
from diffprog.wiring.program import program

__all__ = ["unet"]


@known
def unet(
    features: int = 3, *, widths: Sequence[int] = (128, 256, 256, 256), depth: int = 2,
    attention: Sequence[int] = (2,), heads: int = 1, groups: int = 32,
    classes: int | None = None, dropout: float = 0.0, eps: float = 1e-6,
) -> Layer:
    """Remove noise on finer and coarser grids: ``y = up(middle(down(x)), down(x))``.

    A block is ``x + conv(silu(N(conv(silu(N(x))) + linear(silu(c)))))``, N being `group_norm` and c
    what is made of `time` and `condition`. Each level halves the sides of the one before. The last
    convolution of a block and of the net begin at zero.

    Shapes:
        x: (..., H, W, C) -> (..., H, W, features), C = features mostly; H and W are multiples of
            ``2**(len(widths) - 1)``.
        time: ints (...), the step of the noise, from 0; always needed.
        condition: ints (...) in [0, classes], where ``classes`` is no class, as if it were absent.
        params: ``told``, ``stem``, ``down_<i>``, ``middle``, ``up_<i>`` and ``head``; 35,746,307
            numbers by default on images of 3 channels, which is the paper's net for CIFAR-10.

    Args:
        features: channels of y.
        widths: channels of the levels, the finest first; multiples of groups.
        depth: blocks of a level on the way down; on the way up there is one more.
        attention: the levels with attention behind each block, counted from 1; the middle has it
            always.
        heads: heads of attention.
        groups: groups of channels in the norms.
        classes: how many classes `condition` may name; None makes a net that takes no condition.
        dropout: share of a block's hidden values that is dropped in training, in [0, 1); 0.1 in
            the paper.
        eps: of the norms; positive.

    Raises:
        LayerError: at composition, for levels that there are not; at ``init``, for sides that
            cannot be halved so often, without time, and for a condition without classes.

    Example:
        >>> net = dp.models.unet(1, widths=(8, 16), depth=1, groups=4, classes=10)
        >>> time, condition = jnp.array([3, 70]), jnp.array([0, 9])
        >>> net.plan(jnp.ones((2, 8, 8, 1)), time=time, condition=condition).y.shape
        (2, 8, 8, 1)

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, appendix B; Ronneberger, Fischer, Brox 2015,
    arXiv:1505.04597, figure 1.
    """
    check_count("features", features)
    check_count("depth", depth)
    if isinstance(widths, int) or not widths:
        raise LayerError("widths as a sequence of sizes", show(widths), "pass (64, 128), for "
                         "example")
    levels = range(1, len(widths) + 1)
    if wrong := [level for level in attention if level not in levels]:
        raise LayerError(f"attention at levels from 1 to {len(widths)}", repr(wrong[0]),
                         "leave it out, or add widths")

    def block(width: int, before: int, attentive: bool) -> Layer:
        body = _block(width, groups, dropout, eps, project=before != width)
        return serial(body=body, **{"attend": _attend(heads, groups, eps)} if attentive else {})

    # The channels of each grid of the way down, which the way up takes off from the end.
    kept = [widths[0]]
    down, up = {}, {}
    for level, width in zip(levels, widths, strict=True):
        parts = {}
        for i in range(depth):
            parts[f"block_{i + 1}"] = block(width, kept[-1], level in attention)
            kept.append(width)
        if level < len(widths):
            parts["shrink"] = conv(width, 3, stride=2)
            kept.append(width)
        down[f"down_{level}"] = _down(parts)
    channels = widths[-1]
    for level in reversed(levels):
        parts, width = {}, widths[level - 1]
        for i in range(depth + 1):
            parts[f"block_{i + 1}"] = block(width, channels + kept.pop(), level in attention)
            channels = width
        up[f"up_{level}"] = _up(parts, {"grow": upsample(2) >> conv(width, 3)} if level > 1 else {})
    last = widths[-1]
    middle = serial(first=block(last, last, True), second=block(last, last, False))
    head = serial(norm=group_norm(groups, eps=eps), silu=jax.nn.silu,
                  conv=conv(features, 3, kernel_init="zeros"))

    @program(told=time_and_class(widths[0], 4 * widths[0], classes), stem=conv(widths[0], 3),
             **down, middle=middle, **up, head=head)
    def unet(
        layers: Children, x: jax.Array, *, time: Any = None, condition: Any = None
    ) -> jax.Array:
        check_images(x, 2 ** (len(widths) - 1))
        told = layers.told(x, time=time, condition=condition)
        kept = [layers.stem(x)]
        for name in down:
            kept += layers[name](kept[-1], condition=told)
        y = layers.middle(kept[-1], condition=told)
        for name in up:
            y, kept = layers[name]((y, kept), condition=told)
        return layers.head(y)

    return unet


def _down(parts: Mapping[str, Layer]) -> Layer:
    """One level of the way down; all that it makes is kept."""

    @program(**parts)
    def down(layers: Children, x: jax.Array) -> list[jax.Array]:
        kept = []
        for layer in layers:
            x = layer(x)
            kept.append(x)
        return kept

    return down


def _up(blocks: Mapping[str, Layer], grow: Mapping[str, Layer]) -> Layer:
    """One level of the way up; each block is shown the last that is kept, beside its channels."""

    @program(**blocks, **grow)
    def up(
        layers: Children, pair: tuple[jax.Array, list[jax.Array]]
    ) -> tuple[jax.Array, list[jax.Array]]:
        x, kept = pair[0], list(pair[1])
        for name in blocks:
            x = layers[name](concatenate((x, kept.pop())))
        for name in grow:
            x = layers[name](x)
        return x, kept

    return up


def _block(width: int, groups: int, dropout: float, eps: float, *, project: bool) -> Layer:
    """Two convolutions around the sum of x; the condition, a vector, shifts the hidden channels."""
    shortcut = {"shortcut": conv(width, 1)} if project else {}

    @program(norm_1=group_norm(groups, eps=eps), conv_1=conv(width, 3), shift=linear(width),
             norm_2=group_norm(groups, eps=eps), drop=dropping(dropout),
             conv_2=conv(width, 3, kernel_init="zeros"), **shortcut)
    def block(layers: Children, x: jax.Array, *, condition: Any = None) -> jax.Array:
        y = layers.conv_1(jax.nn.silu(layers.norm_1(x)))
        y = y + layers.shift(jax.nn.silu(condition))[..., None, None, :]
        y = layers.conv_2(layers.drop(jax.nn.silu(layers.norm_2(y))))
        return y + (layers.shortcut(x) if project else x)

    return block


def _attend(heads: int, groups: int, eps: float) -> Layer:
    """All places of the grid ask all: ``y = x + attention(N(x))``."""

    @program(norm=group_norm(groups, eps=eps), attend=self_attention(heads))
    def attend(layers: Children, x: jax.Array) -> jax.Array:
        rows = layers.norm(x).reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])
        return x + layers.attend(rows).reshape(x.shape)

    return attend
