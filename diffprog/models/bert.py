"""BERT: a Transformer encoder of text, and the two heads of its pretraining.

Devlin, Chang, Lee, Toutanova 2018, "BERT: pre-training of deep bidirectional transformers for
language understanding", arXiv:1810.04805.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer
from diffprog.layers.activation import gelu
from diffprog.layers.collapse import collapse
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.embedding import embedding, unembed
from diffprog.layers.linear import linear, shift
from diffprog.layers.masking import hide
from diffprog.layers.norms.norm import layer_norm
from diffprog.layers.positions.absolute import learned_positions
from diffprog.models.transformer import transformer_encoder
from diffprog.wiring.children import Children
from diffprog.wiring.combinators import serial
from diffprog.wiring.program import program

__all__ = ["bert", "bert_pretraining"]


@known
def bert(
    vocabulary: int = 30522, *, length: int = 512, types: int = 2, width: int = 768,
    depth: int = 12, heads: int = 12, hidden: int | None = None, dropout: float = 0.0,
    eps: float = 1e-12, kernel_init: Initializer = "truncated_normal",
) -> Layer:
    """Encode text: ``y = body(N(embed(x) + embed(type) + position))``, and ``tanh(pool(y[0]))``.

    Shapes:
        x: ints (batch, time) in [0, vocabulary), time at most `length`, starting with the [CLS]
            token -> a pair: one vector per token, (batch, time, width), and one per sequence,
            (batch, width).
        token_types: ints (batch, time) in [0, types), the sentence of each token; default 0.
        mask, positions, segments, attention_mask, attention_bias: as in `self_attention` and
            `learned_positions`. Tokens attend across token_types, but not across `segments`; with
            segments the sequence vector is that of the first segment.
        params: ``embed``, ``types``, ``positions``, ``norm``, ``body`` and ``pool``; 109,482,240
            parameters by default, which is BERT-base. All embeddings begin as
            ``truncated_normal``.

    Args:
        vocabulary: number of tokens.
        length: number of learned positions.
        types: number of token types.
        width: size of the vectors; a multiple of heads.
        depth: number of blocks.
        heads: number of attention heads.
        hidden: hidden size of `ffn`; ``4 * width`` if None.
        dropout: rate in `transformer_encoder` and on the embeddings, in [0, 1); 0.1 in BERT.
        eps: epsilon of the norms; positive.
        kernel_init: initializer of all kernels; that of the paper's code.

    Raises:
        LayerError: token_types has another shape than x; or as `learned_positions` and
            `transformer_encoder`.

    Example:
        >>> net = dp.models.bert(11, length=8, width=16, depth=2, heads=4)
        >>> [part.shape for part in net.plan(jnp.ones((2, 5), int)).y]
        [(2, 5, 16), (2, 16)]

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3 and figure 2.
    """
    body = transformer_encoder(depth, heads=heads, hidden=hidden or 4 * width, activation=gelu,
                               dropout=dropout, eps=eps, kernel_init=kernel_init)
    pool = serial(first=collapse("first"), linear=linear(width, kernel_init=kernel_init),
                  tanh=jnp.tanh)
    begins: dict[str, Any] = {"embedding_init": "truncated_normal"}

    @program(hide=hide(), embed=embedding(vocabulary, width, **begins),
             types=embedding(types, width, **begins),
             positions=learned_positions(length, **begins), norm=layer_norm(eps=eps),
             drop=dropping(dropout), body=body, pool=pool)
    def bert(
        layers: Children, x: Any, *, token_types: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        token_types = jnp.zeros_like(x) if token_types is None else token_types
        if token_types.shape != x.shape:
            raise LayerError(f"token_types of the shape of x, {x.shape}", show(token_types),
                             "pass one per token")
        tokens = layers.embed(layers.hide(x))                            # (batch, time, width)
        types = layers.types(layers.hide(token_types))                   # (batch, time, width)
        y = layers.norm(layers.positions(tokens + types))
        y = layers.body(layers.drop(y))                                  # (batch, time, width)
        return y, layers.pool(y, segments=None)                          # and (batch, width)

    return bert


@known
def bert_pretraining(
    vocabulary: int = 30522, *, length: int = 512, types: int = 2, width: int = 768,
    depth: int = 12, heads: int = 12, hidden: int | None = None, dropout: float = 0.0,
    eps: float = 1e-12, kernel_init: Initializer = "truncated_normal",
) -> Layer:
    """Predict masked tokens and the next sentence: ``(N(gelu(W y)) @ embed.T + b, V p)``.

    y and p are the pair that `bert` returns. The objective is `masked_language`.

    Shapes:
        x, token_types, mask and others: as in `bert` -> a pair: logits of the tokens, (batch, time,
            vocabulary), and of the second sentence following the first, (batch, 2), with index 0
            for a sentence that follows, as in the published weights.
        params: ``encoder`` (`bert`), ``transform``, ``bias`` and ``follows``; 110,106,428
            parameters by default.

    Args:
        vocabulary, length, types, width, depth, heads, hidden, dropout, eps, kernel_init: as in
            `bert`.

    Raises:
        LayerError: as `bert`.

    Example:
        >>> net = dp.models.bert_pretraining(11, length=8, width=16, depth=2, heads=4)
        >>> [part.shape for part in net.plan(jnp.ones((2, 5), int)).y]
        [(2, 5, 11), (2, 2)]

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1.
    """
    encoder = bert(vocabulary, length=length, types=types, width=width, depth=depth, heads=heads,
                   hidden=hidden, dropout=dropout, eps=eps, kernel_init=kernel_init)
    transform = serial(linear=linear(width, kernel_init=kernel_init), gelu=gelu,
                       norm=layer_norm(eps=eps))

    @program(encoder=encoder, transform=transform, bias=shift(),
             follows=linear(2, kernel_init=kernel_init))
    def bert_pretraining(layers: Children, x: Any) -> tuple[jax.Array, jax.Array]:
        y, pooled = layers.encoder(x)              # (batch, time, width), (batch, width)
        logits = unembed(layers.encoder.params["embed"], layers.transform(y))
        return layers.bias(logits), layers.follows(pooled)   # (batch, time, vocabulary), (batch, 2)

    return bert_pretraining
