"""The U-Net of diffusion models: down to coarser grids and up again, with skip connections.

Ho, Jain, Abbeel 2020, "Denoising diffusion probabilistic models", arXiv:2006.11239, appendix B.
Each block on the way up gets a feature map from the way down, concatenated to its input. Time and
class are side inputs; every residual block adds a linear map of them to its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

_MakeBlock = Callable[[int, int, bool], Layer]  # (input channels, output channels, attention?)


@known
def unet(
    features: int = 3, *, widths: Sequence[int] = (128, 256, 256, 256), depth: int = 2,
    attention: Sequence[int] = (2,), heads: int = 1, groups: int = 32,
    classes: int | None = None, dropout: float = 0.0, eps: float = 1e-6,
) -> Layer:
    """A U-Net denoiser for diffusion: ``y = up(middle(h), skips)`` with ``h, skips = down(x)``.

    A block is ``x + conv(silu(N(conv(silu(N(x))) + linear(silu(c)))))``, with `group_norm` N and a
    vector c from `time` and `condition`. Each level halves height and width. The last convolution
    of each block and of the net is initialized with zeros.

    Shapes:
        x: (..., H, W, C) -> (..., H, W, features), usually with C = features; H and W are multiples
            of ``2**(len(widths) - 1)``.
        time: ints (...), the diffusion step, counted from 0; required.
        condition: ints (...) in [0, classes]; the default is ``classes``, the null class of
            classifier-free guidance.
        params: ``told``, ``stem``, ``down_<i>``, ``middle``, ``up_<i>`` and ``head``; 35,746,307
            parameters by default on images of 3 channels, which is the net of Ho, Jain, Abbeel 2020
            for CIFAR-10.

    Args:
        features: channels of y.
        widths: channels of each level, the finest first; multiples of groups.
        depth: blocks per level on the way down; on the way up there is one more.
        attention: levels, counted from 1, with attention after each block; the middle always has
            attention.
        heads: number of attention heads.
        groups: groups of channels in the norms.
        classes: number of classes of `condition`; None makes an unconditional net.
        dropout: rate inside each block, in [0, 1); 0.1 in the paper.
        eps: epsilon of the norms; positive.

    Raises:
        LayerError: at composition, for attention at a level that does not exist; at ``init``, for
            height or width that cannot be halved so often, without time, and for a condition
            without classes.

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
    if wrong := [level for level in attention if level not in range(1, len(widths) + 1)]:
        raise LayerError(f"attention at levels from 1 to {len(widths)}", repr(wrong[0]),
                         "leave it out, or add widths")

    def block(inputs: int, width: int, attend: bool) -> Layer:
        body = _block(width, groups, dropout, eps, project=inputs != width)
        if attend:
            return serial(body=body, attend=_attend(heads, groups, eps))
        return serial(body=body)

    finest, coarsest = widths[0], widths[-1]
    down, skips = _down_path(block, widths, depth, attention)
    middle = serial(first=block(coarsest, coarsest, True), second=block(coarsest, coarsest, False))
    up = _up_path(block, widths, depth, attention, skips)
    head = serial(norm=group_norm(groups, eps=eps), silu=jax.nn.silu,
                  conv=conv(features, 3, kernel_init="zeros"))

    @program(told=time_and_class(finest, 4 * finest, classes), stem=conv(finest, 3), **down,
             middle=middle, **up, head=head)
    def unet(
        layers: Children, x: jax.Array, *, time: Any = None, condition: Any = None
    ) -> jax.Array:
        check_images(x, 2 ** (len(widths) - 1))
        vector = layers.told(x, time=time, condition=condition)          # (..., 4 * finest)
        skips = [layers.stem(x)]                                         # (..., H, W, finest)
        for name in down:
            skips += layers[name](skips[-1], condition=vector)
        y = layers.middle(skips[-1], condition=vector)
        for name in up:
            y, skips = layers[name]((y, skips), condition=vector)
        return layers.head(y)                                            # (..., H, W, features)

    return unet


def _down_path(
    block: _MakeBlock, widths: Sequence[int], depth: int, attention: Sequence[int]
) -> tuple[dict[str, Layer], list[int]]:
    """The levels on the way down, and the channels of all feature maps on it, stem first."""
    levels, skips = {}, [widths[0]]
    for level, width in enumerate(widths, start=1):
        parts = {}
        for i in range(depth):
            parts[f"block_{i + 1}"] = block(skips[-1], width, level in attention)
            skips.append(width)
        if level < len(widths):
            parts["shrink"] = conv(width, 3, stride=2)
            skips.append(width)
        levels[f"down_{level}"] = _down(parts)
    return levels, skips


def _up_path(
    block: _MakeBlock, widths: Sequence[int], depth: int, attention: Sequence[int],
    skips: Sequence[int],
) -> dict[str, Layer]:
    """The levels on the way up, whose blocks use the feature maps in reverse order."""
    levels, skips, channels = {}, list(skips), widths[-1]
    for level in range(len(widths), 0, -1):
        width, blocks = widths[level - 1], {}
        for i in range(depth + 1):
            blocks[f"block_{i + 1}"] = block(
                channels + skips.pop(), width, level in attention)
            channels = width
        grow = {"grow": upsample(2) >> conv(width, 3)} if level > 1 else {}
        levels[f"up_{level}"] = _up(blocks, grow)
    return levels


def _down(parts: Mapping[str, Layer]) -> Layer:
    """One level on the way down; returns the outputs of all its layers."""

    @program(**parts)
    def down(layers: Children, x: jax.Array) -> list[jax.Array]:
        outputs = []
        for layer in layers:
            x = layer(x)
            outputs.append(x)
        return outputs

    return down


def _up(blocks: Mapping[str, Layer], grow: Mapping[str, Layer]) -> Layer:
    """One level on the way up; each block takes the last skip, concatenated to its input."""

    @program(**blocks, **grow)
    def up(
        layers: Children, pair: tuple[jax.Array, list[jax.Array]]
    ) -> tuple[jax.Array, list[jax.Array]]:
        x, skips = pair[0], list(pair[1])
        for name in blocks:
            x = layers[name](concatenate((x, skips.pop())))
        for name in grow:
            x = layers[name](x)
        return x, skips

    return up


def _block(width: int, groups: int, dropout: float, eps: float, *, project: bool) -> Layer:
    """A residual block of two convolutions; the condition, a vector, is added between them."""
    shortcut = {"shortcut": conv(width, 1)} if project else {}

    @program(norm_1=group_norm(groups, eps=eps), conv_1=conv(width, 3), shift=linear(width),
             norm_2=group_norm(groups, eps=eps), drop=dropping(dropout),
             conv_2=conv(width, 3, kernel_init="zeros"), **shortcut)
    def block(layers: Children, x: jax.Array, *, condition: Any = None) -> jax.Array:
        y = layers.conv_1(jax.nn.silu(layers.norm_1(x)))                 # (..., H, W, width)
        y = y + layers.shift(jax.nn.silu(condition))[..., None, None, :]
        y = layers.conv_2(layers.drop(jax.nn.silu(layers.norm_2(y))))    # (..., H, W, width)
        return y + (layers.shortcut(x) if project else x)

    return block


def _attend(heads: int, groups: int, eps: float) -> Layer:
    """Self-attention over all positions of the grid: ``y = x + attention(N(x))``."""

    @program(norm=group_norm(groups, eps=eps), attend=self_attention(heads))
    def attend(layers: Children, x: jax.Array) -> jax.Array:
        *batch, height, width, channels = x.shape
        sequence = layers.norm(x).reshape(*batch, height * width, channels)
        return x + layers.attend(sequence).reshape(x.shape)

    return attend
