"""Recurrent sequence to sequence: an LSTM encoder and an LSTM decoder with attention.

Sutskever, Vinyals, Le 2014, arXiv:1409.3215, with the global attention of Luong, Pham, Manning
2015, arXiv:1508.04025, section 3.1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count
from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.layers.attention.attention import cross_attention
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.embedding import embedding, scaled, unembed
from diffprog.layers.linear import linear
from diffprog.layers.masking import hide
from diffprog.layers.recurrence.cells import lstm
from diffprog.layers.recurrence.recurrent import recurrent
from diffprog.models.transformer import encoder_decoder
from diffprog.wiring.children import Children
from diffprog.wiring.combinators import serial
from diffprog.wiring.program import program

__all__ = ["seq2seq"]


@known
def seq2seq(
    source_vocabulary: int, target_vocabulary: int, *, width: int = 256, depth: int = 1,
    dropout: float = 0.0,
) -> Layer:
    """Translate: ``h = LSTM(embed(x)); y = tanh([h, attend(h, memory)] @ W + b) @ embed.T``.

    ``memory = BiLSTM(embed(source))``. y[t] are the logits of the token after x[:t + 1]. The
    decoder starts from a zero state and reads the source by attention only. The attention output is
    not fed to the next step, so that all steps are trained in parallel.

    Shapes:
        x: ints (batch, time) in [0, target_vocabulary) -> (batch, time, target_vocabulary).
        source, source_mask, memory, memory_mask, mask: as in `transformer`.
        segments: of x, as in `recurrent`.
        params: ``encoder`` (``embed``, ``body``) and ``decoder`` (``embed``, ``body``, ``attend``,
            ``join``).

    Args:
        source_vocabulary, target_vocabulary: number of tokens of source and target.
        width: size of all vectors; even.
        depth: number of stacked LSTMs of the encoder, and of the decoder.
        dropout: rate on the embeddings and on the vectors before the output matrix, in [0, 1).

    Raises:
        LayerError: width is odd; source and memory are both given.

    Example:
        >>> net = dp.models.seq2seq(11, 13, width=16)
        >>> x, source = jnp.ones((2, 5), int), jnp.ones((2, 7), int)
        >>> params, state = net.init(jax.random.key(0), x, source=source)
        >>> net(params, x, source=source).shape
        (2, 5, 13)

    Source: Luong, Pham, Manning 2015, arXiv:1508.04025, eq. 5 to 8, without input feeding.
    """
    check_count("width", width)
    check_count("depth", depth)
    if width % 2:
        raise LayerError("width as an even int", f"{width}",
                         "choose another: each direction of the encoder has half of it")

    bidirectional = [recurrent(lstm(width // 2), bidirectional=True) for _ in range(depth)]
    encoder = serial(hide=hide(), embed=embedding(source_vocabulary, width), scaled=scaled(width),
                     drop=dropping(dropout), body=serial(*bidirectional))
    forward = [recurrent(lstm(width)) for _ in range(depth)]

    @program(hide=hide(), embed=embedding(target_vocabulary, width), scaled=scaled(width),
             drop=dropping(dropout), body=serial(*forward), attend=cross_attention(1),
             join=linear(width))
    def decoder(layers: Children, x: Any) -> jax.Array:
        tokens = layers.scaled(layers.embed(layers.hide(x)))             # (batch, time, width)
        h = layers.body(layers.drop(tokens))                             # (batch, time, width)
        context = layers.attend(h)                                       # (batch, time, width)
        y = jnp.tanh(layers.join(jnp.concatenate([h, context], axis=-1)))
        return unembed(layers.embed.params, layers.drop(y))              # (batch, time, vocabulary)

    return encoder_decoder(encoder, decoder)
