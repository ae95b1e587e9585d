"""The diffusion Transformer: blocks on patches of a noisy image, modulated by time and class.

Peebles and Xie 2022, "Scalable diffusion models with Transformers", arXiv:2212.09748. The
condition scales and shifts the output of every norm and gates every residual branch; all gates
start at zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count
from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.layers.attention.attention import self_attention
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.linear import linear
from diffprog.layers.norms.norm import layer_norm
from diffprog.layers.spatial.resize import patches
from diffprog.layers.sublayer import ffn
from diffprog.models.denoiser import check_images, sinusoids, time_and_class
from diffprog.transforms.repeat import repeat
from diffprog.wiring.children import Children
from diffprog.wiring.program import program

__all__ = ["dit"]

_TIME_FEATURES = 256  # of the sinusoidal embedding of time, as in the paper's code


@known
def dit(
    features: int = 4, *, patch_size: int = 2, width: int = 1152, depth: int = 28,
    heads: int = 16, hidden: int | None = None, classes: int | None = None,
    dropout: float = 0.0, eps: float = 1e-6,
) -> Layer:
    """Denoise by attention: ``x += g * attend(s * N(x) + b); x += g * feed(s * N(x) + b)``.

    The scale s, shift b and gate g are linear maps of a vector from `time` and `condition`, with
    separate weights for each sublayer and block. s - 1, b and g start at zero, so that every block
    starts as the identity, and y at zero. Positions are sinusoids of row and column, so that images
    may have any size.

    Shapes:
        x: (..., H, W, C) -> (..., H, W, features), usually with C = features; H and W are multiples
            of patch_size.
        time: ints (...), the noise step, from 0; required.
        condition: ints (...) in [0, classes]; the default is ``classes``, which stands for no
            class.
        params: ``told``, ``patches``, ``blocks`` (stacked over depth) and ``head``; 674,834,720
            parameters for ``dit(8, classes=1000)`` on images of 4 channels, which is DiT-XL/2 with
            a variance output for each mean.

    Args:
        features: channels of y.
        patch_size: side of a patch in pixels.
        width: size of the vectors; a multiple of heads and of 4.
        depth: number of blocks.
        heads: number of attention heads.
        hidden: hidden size of `ffn`; ``4 * width`` if None.
        classes: number of classes of `condition`; None makes a net without condition.
        dropout: rate on attention weights and on each residual branch, in [0, 1).
        eps: epsilon of the norms; positive.

    Raises:
        LayerError: at composition, for a width that is not a multiple of 4; at ``init``, for sides
            that are not multiples of patch_size, without time, and for a condition without classes.

    Example:
        >>> net = dp.models.dit(1, width=16, depth=2, heads=4, classes=10)
        >>> time, condition = jnp.array([3, 70]), jnp.array([0, 9])
        >>> net.plan(jnp.ones((2, 8, 8, 1)), time=time, condition=condition).y.shape
        (2, 8, 8, 1)

    Source: Peebles and Xie 2022, arXiv:2212.09748, section 3.2 and figure 3 (adaLN-Zero).
    """
    for name, size in {"features": features, "patch_size": patch_size, "width": width}.items():
        check_count(name, size)
    if width % 4:
        raise LayerError("width as a multiple of 4", f"{width}",
                         "choose another: sine and cosine of row and column have a quarter each")
    block = _block(width, heads, hidden or 4 * width, dropout, eps)

    @program(told=time_and_class(_TIME_FEATURES, width, classes),
             patches=patches(patch_size) >> linear(width), blocks=repeat(depth, block),
             head=_head(patch_size**2 * features, width, eps))
    def dit(
        layers: Children, x: jax.Array, *, time: Any = None, condition: Any = None
    ) -> jax.Array:
        check_images(x, patch_size)
        vector = jax.nn.silu(layers.told(x, time=time, condition=condition))  # (..., width)
        height, breadth = x.shape[-3:-1]
        rows, columns = height // patch_size, breadth // patch_size
        positions = _positions(rows, columns, width, x.dtype)            # (patches, width)
        y = layers.patches(x) + jax.lax.broadcast_to_rank(positions, x.ndim - 1)
        y = layers.blocks(y, condition=vector)                           # (..., patches, width)
        y = layers.head(y, condition=vector)                             # (..., patches, pixels)
        return _unpatchify(y, rows, columns, patch_size)                 # (..., H, W, features)

    return dit


def _block(width: int, heads: int, hidden: int, dropout: float, eps: float) -> Layer:
    """Attention and a feed-forward net, each modulated by the condition (adaLN-Zero)."""

    @program(adapt=_adapt(6, width), norm=layer_norm(eps=eps, scale=False, bias=False),
             attend=self_attention(heads, dropout=dropout), feed=ffn(hidden, jax.nn.gelu),
             drop=dropping(dropout))
    def block(layers: Children, x: jax.Array, *, condition: Any = None) -> jax.Array:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = layers.adapt(condition)
        y = layers.attend((1 + scale_1) * layers.norm(x) + shift_1)
        x = x + gate_1 * layers.drop(y)
        y = layers.feed((1 + scale_2) * layers.norm(x) + shift_2)
        return x + gate_2 * layers.drop(y)

    return block


def _head(features: int, width: int, eps: float) -> Layer:
    """The pixels of each patch, from a norm that the condition scales and shifts."""

    @program(adapt=_adapt(2, width), norm=layer_norm(eps=eps, scale=False, bias=False),
             linear=linear(features, kernel_init="zeros"))
    def head(layers: Children, x: jax.Array, *, condition: Any = None) -> jax.Array:
        shift, scale = layers.adapt(condition)
        return layers.linear((1 + scale) * layers.norm(x) + shift)

    return head


def _adapt(count: int, width: int) -> Layer:
    """`count` vectors per image, shared by its patches: (..., D) -> each (..., 1, width)."""

    def split(y: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(y[..., None, :], count, axis=-1))

    return linear(count * width, kernel_init="zeros") >> split


def _positions(rows: int, columns: int, width: int, dtype: Any) -> jax.Array:
    """Sinusoids of the row and of the column of each patch: (rows * columns, width)."""
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)        # (rows * columns,) each
    halves = [sinusoids(n, width // 2, dtype) for n in (row, column)]
    return jnp.concatenate(halves, axis=-1)


def _unpatchify(y: jax.Array, rows: int, columns: int, size: int) -> jax.Array:
    """The inverse of `patches`: (..., patches, size * size * features) -> (..., H, W, features)."""
    batch, features = y.shape[:-2], y.shape[-1] // size**2
    y = y.reshape(*batch, rows, columns, size, size, features)
    y = jnp.moveaxis(y, -4, -3)                                          # rows, size, columns, size
    return y.reshape(*batch, rows * size, columns * size, features)
