"""LLaMA: a causal Transformer with RMS norms, rotary positions, SwiGLU and grouped queries.

Touvron et al. 2023, "LLaMA: open and efficient foundation language models", arXiv:2302.13971,
section 2.2; kv_heads as in "Llama 2", arXiv:2307.09288.
"""

from __future__ import annotations

from typing import Any

import jax

from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.layers.activation import swiglu
from diffprog.layers.attention.attention import self_attention
from diffprog.layers.embedding import embedding, unembed
from diffprog.layers.linear import linear
from diffprog.layers.masking import hide
from diffprog.layers.norms.norm import rms_norm
from diffprog.layers.positions.rotary import Rotary
from diffprog.layers.positions.rotary import rotary as rotary_embedding
from diffprog.layers.sublayer import pre_norm
from diffprog.transforms.repeat import repeat
from diffprog.wiring.children import Children
from diffprog.wiring.combinators import serial
from diffprog.wiring.program import program

__all__ = ["llama"]


@known
def llama(
    vocabulary: int = 32000, *, width: int = 4096, depth: int = 32, heads: int = 32,
    head_dim: int | None = None, kv_heads: int | None = None, hidden: int = 11008,
    window: int | None = None, rotary: Rotary | None = None, tied: bool = False,
    eps: float = 1e-5,
) -> Layer:
    """Predict the next token: ``y = head(trunk(embed(x)))``, without biases.

    y[t] are the logits of the token after x[:t + 1]. A block is ``x = x + attend(N(x)); x = x +
    down(silu(gate(N(x))) * up(N(x)))``, with the RMS norm N. It streams, as `generate` needs.

    Shapes:
        x: ints (batch, time) in [0, vocabulary) -> (batch, time, vocabulary).
        mask, positions, segments, attention_mask, attention_bias: as in `self_attention`.
        params: ``embed``, ``trunk`` and, unless tied, ``head``; 6,738,415,616 parameters by
            default, which is the smallest of 2023.

    Args:
        vocabulary: number of tokens.
        width: size of the vectors; a multiple of heads if there is no head_dim.
        depth: number of blocks.
        heads, head_dim, kv_heads: as in `self_attention`.
        hidden: hidden size of the gated feed-forward net, usually 8/3 * width.
        window: as in `self_attention`; None attends to all earlier positions.
        rotary: the rotary embedding of queries and keys; ``rotary()`` if None.
        tied: use the embedding as the output matrix in place of a head.
        eps: epsilon of the norms; positive.

    Raises:
        LayerError: as `self_attention`.

    Example:
        >>> net = dp.models.llama(11, width=16, depth=2, heads=4, kv_heads=2, hidden=32)
        >>> net.plan(jnp.ones((2, 5), int)).y.shape
        (2, 5, 11)

    Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; kv_heads: arXiv:2307.09288,
    section 2.2; window: Jiang et al. 2023, arXiv:2310.06825.
    """
    attention = self_attention(
        heads, head_dim=head_dim, kv_heads=kv_heads, causal=True, window=window,
        rotary=rotary_embedding() if rotary is None else rotary, bias=False)
    feed = serial(up=swiglu(hidden), down=linear(width, bias=False))
    block = serial(attend=pre_norm(attention, rms_norm(eps=eps)),
                   feed=pre_norm(feed, rms_norm(eps=eps)))
    trunk = serial(blocks=repeat(depth, block), norm=rms_norm(eps=eps))
    embed = embedding(vocabulary, width)
    if not tied:
        return serial(hide=hide(), embed=embed, trunk=trunk, head=linear(vocabulary, bias=False))

    @program(hide=hide(), embed=embed, trunk=trunk)
    def llama(layers: Children, x: Any) -> jax.Array:
        tokens = layers.embed(layers.hide(x))                            # (batch, time, width)
        y = layers.trunk(tokens)                                         # (batch, time, width)
        return unembed(layers.embed.params, y)                           # (batch, time, vocabulary)

    return llama
