"""The Vision Transformer: a Transformer encoder of the patches of an image.

Dosovitskiy et al. 2021, "An image is worth 16x16 words: Transformers for image recognition at
scale", arXiv:2010.11929.
"""

from __future__ import annotations

import jax

from diffprog.core.arguments import check_array, check_count
from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer, stateless
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer
from diffprog.core.plans import Params
from diffprog.layers.activation import gelu
from diffprog.layers.collapse import collapse
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.embedding import leading_token
from diffprog.layers.linear import linear
from diffprog.layers.positions.absolute import learned_positions
from diffprog.layers.spatial.conv import conv
from diffprog.models.transformer import transformer_encoder
from diffprog.wiring.combinators import serial

__all__ = ["vit"]


@known
def vit(
    classes: int = 1000, *, image_size: int = 224, patch_size: int = 16, width: int = 768,
    depth: int = 12, heads: int = 12, hidden: int | None = None, dropout: float = 0.0,
    eps: float = 1e-6, kernel_init: Initializer = "truncated_normal",
) -> Layer:
    """Classify images by attention: ``y = linear(body([token, patch_1 @ W, ...] + position)[0])``.

    Shapes:
        x: (..., image_size, image_size, C) -> (..., classes).
        params: ``patches``, ``token``, ``positions``, ``body`` and ``head``; 86,567,656 parameters
            by default, which is ViT-B/16. Patches begin as ``lecun_normal``, positions as
            ``truncated_normal``, the token with zeros.

    Args:
        classes: number of classes.
        image_size: side of the images in pixels; a multiple of patch_size.
        patch_size: side of a patch in pixels.
        width: size of the vectors; a multiple of heads.
        depth: number of blocks.
        heads: number of attention heads.
        hidden: hidden size of `ffn`; ``4 * width`` if None.
        dropout: rate in `transformer_encoder` and on the embeddings, in [0, 1).
        eps: epsilon of the norms; positive.
        kernel_init: initializer of the kernels of body and head; that of DeiT. The paper's own code
            has ``glorot_uniform`` in the body and ``zeros`` in the head.

    Raises:
        LayerError: patch_size does not divide image_size; images have another size; or as
            `transformer_encoder`.

    Example:
        >>> net = dp.models.vit(10, image_size=8, patch_size=2, width=16, depth=2, heads=4)
        >>> net.plan(jnp.ones((3, 8, 8, 1))).y.shape
        (3, 10)

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1 to 4; DeiT: Touvron et al. 2021,
    arXiv:2012.12877, section 6.
    """
    sizes = {"classes": classes, "image_size": image_size, "patch_size": patch_size}
    for name, size in sizes.items():
        check_count(name, size)
    if image_size % patch_size:
        raise LayerError(f"image_size as a multiple of patch_size={patch_size}", f"{image_size}",
                         "choose a patch_size that divides it, or crop or pad the images")
    body = transformer_encoder(depth, heads=heads, hidden=hidden or 4 * width, activation=gelu,
                               norm_first=True, dropout=dropout, eps=eps, kernel_init=kernel_init)
    patches = conv(width, patch_size, stride=patch_size, padding="VALID")
    count = (image_size // patch_size) ** 2
    return serial(
        images=_sized(image_size),                                       # (..., H, W, C)
        patches=patches, rows=_rows,                                     # (..., count, width)
        token=leading_token(),                                           # (..., count + 1, width)
        positions=learned_positions(count + 1, embedding_init="truncated_normal"),
        drop=dropping(dropout), body=body, first=collapse("first"),
        head=linear(classes, kernel_init=kernel_init))                   # (..., classes)


def _sized(side: int) -> Layer:
    """Images as they are; raises for another size, whose patches would get wrong positions."""

    def forward(params: Params, x: jax.Array) -> jax.Array:
        check_array(x, rank=3, axes="(..., height, width, channels)")
        if x.shape[-3:-1] != (side, side):
            raise LayerError(f"images of {side} x {side}", show(x),
                             "resize them, or set image_size=")
        return x

    return stateless(None, forward, name="images")


def _rows(y: jax.Array) -> jax.Array:
    """Patches in one sequence: (..., rows, columns, width) -> (..., rows * columns, width)."""
    return y.reshape(*y.shape[:-3], y.shape[-3] * y.shape[-2], y.shape[-1])
