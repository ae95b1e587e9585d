"""The diffusion Transformer: patches of a noisy image, in blocks whose norms obey time and class.

Peebles and Xie 2022, "Scalable diffusion models with Transformers", arXiv:2212.09748. A condition
scales and shifts what every norm gives, and gates what every body adds; all gates begin closed.
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
from diffprog.models.denoiser import check_images, time_and_class, waves
from diffprog.transforms.repeat import repeat
from diffprog.wiring.children import Children
from diffprog.wiring.program import program

__all__ = ["dit"]

_FREQUENCIES = 256  # features of the waves of time, as in the paper's code


@known
def dit(
    features: int = 4, *, patch_size: int = 2, width: int = 1152, depth: int = 28,
    heads: int = 16, hidden: int | None = None, classes: int | None = None,
    dropout: float = 0.0, eps: float = 1e-6,
) -> Layer:
    """Remove noise by attention: ``x += g * attend(s * N(x) + b); x += g * feed(s * N(x) + b)``.

    s, b and g are linear maps of what is made of `time` and `condition`, others in each line and
    block; s - 1, b and g begin at zero, so that every block begins as the identity, and y at zero.
    Places are told by waves of row and column, so that images may have any size.

    Shapes:
        x: (..., H, W, C) -> (..., H, W, features), C = features mostly; H and W are multiples of
            patch_size.
        time: ints (...), the step of the noise, from 0; always needed.
        condition: ints (...) in [0, classes], where ``classes`` is no class, as if it were absent.
        params: ``told``, ``patches``, ``blocks`` (stacked over depth) and ``head``; with
            ``dit(8, classes=1000)`` on images of 4 channels 674,834,720 numbers, which is DiT-XL/2
            with a variance beside each mean.

    Args:
        features: channels of y.
        patch_size: side of a patch in pixels.
        width: size of the vectors; a multiple of heads and of 4.
        depth: number of blocks.
        heads: heads of attention.
        hidden: size of the hidden axis of `ffn`; ``4 * width`` if None.
        classes: how many classes `condition` may name; None makes a net that takes no condition.
        dropout: share that is dropped in training, of attention's weights and of what each body
            adds, in [0, 1).
        eps: of the norms; positive.

    Raises:
        LayerError: at composition, for a width that is no multiple of 4; at ``init``, for sides
            that are no multiples of patch_size, without time, and for a condition without classes.

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
                         "choose another: sines and cosines of rows and of columns share it")
    block = _block(width, heads, hidden or 4 * width, dropout, eps)

    @program(told=time_and_class(_FREQUENCIES, width, classes),
             patches=patches(patch_size) >> linear(width), blocks=repeat(depth, block),
             head=_head(patch_size**2 * features, width, eps))
    def dit(
        layers: Children, x: jax.Array, *, time: Any = None, condition: Any = None
    ) -> jax.Array:
        check_images(x, patch_size)
        told = jax.nn.silu(layers.told(x, time=time, condition=condition))
        rows, columns = (side // patch_size for side in x.shape[-3:-1])
        places = _places(rows, columns, width, x.dtype)
        y = layers.patches(x) + jax.lax.broadcast_to_rank(places, x.ndim - 1)
        y = layers.head(layers.blocks(y, condition=told), condition=told)
        return _joined(y, rows, columns, patch_size)

    return dit


def _block(width: int, heads: int, hidden: int, dropout: float, eps: float) -> Layer:
    """Attention and a feed-forward net; the condition has a say before and behind each."""

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
    """What stands in each patch, by a norm that the condition scales and shifts."""

    @program(adapt=_adapt(2, width), norm=layer_norm(eps=eps, scale=False, bias=False),
             linear=linear(features, kernel_init="zeros"))
    def head(layers: Children, x: jax.Array, *, condition: Any = None) -> jax.Array:
        shift, scale = layers.adapt(condition)
        return layers.linear((1 + scale) * layers.norm(x) + shift)

    return head


def _adapt(count: int, width: int) -> Layer:
    """So many vectors for all patches of an image, zero at first."""
    return linear(count * width, kernel_init="zeros") >> (
        lambda y: tuple(jnp.split(y[..., None, :], count, axis=-1)))


def _places(rows: int, columns: int, width: int, dtype: Any) -> jax.Array:
    """Waves of the row beside waves of the column, for each patch: (rows * columns, width)."""
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    return jnp.concatenate([waves(n, width // 2, dtype) for n in (row, column)], axis=-1)


def _joined(y: jax.Array, rows: int, columns: int, size: int) -> jax.Array:
    """Patches put together: what `patches` takes apart."""
    batch = y.shape[:-2]
    y = y.reshape(*batch, rows, columns, size, size, y.shape[-1] // size**2)
    return jnp.moveaxis(y, -4, -3).reshape(*batch, rows * size, columns * size, y.shape[-1])
