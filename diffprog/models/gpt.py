"""GPT-2: a causal Transformer that predicts the next token.

Radford, Wu, Child, Luan, Amodei, Sutskever 2019, "Language models are unsupervised multitask
learners", section 2.3.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from diffprog.core.arguments import check_count
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.core.parameters import Initializer
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.embedding import embedding, unembed
from diffprog.layers.masking import hide
from diffprog.layers.positions.absolute import learned_positions
from diffprog.models.transformer import Activation, transformer_decoder
from diffprog.wiring.children import Children
from diffprog.wiring.program import program

__all__ = ["gpt"]


@known
def gpt(
    vocabulary: int = 50257, *, length: int = 1024, width: int = 768, depth: int = 12,
    heads: int = 12, hidden: int | None = None, activation: Activation = jax.nn.gelu,
    dropout: float = 0.0, eps: float = 1e-5, kernel_init: Initializer | None = None,
) -> Layer:
    """Predict the next token: ``y = trunk(embed(x) + position) @ embed.T``.

    y[t] are the logits of the token after x[:t + 1]. The trunk is `transformer_decoder` with
    pre-norm and without cross-attention. It streams, as `generate` needs.

    Shapes:
        x: ints (batch, time) in [0, vocabulary), time at most `length` -> (batch, time,
            vocabulary).
        mask, positions, segments, attention_mask, attention_bias: as in `self_attention` and
            `learned_positions`.
        params: ``embed``, ``positions`` and ``trunk``; 124,439,808 parameters by default, which is
            the smallest GPT-2. Embeddings and positions begin as ``normal``, so that the first
            loss of random tokens is about ``log(vocabulary) + width * 0.02**2 / 2``.

    Args:
        vocabulary: number of tokens.
        length: number of learned positions.
        width: size of the vectors; a multiple of heads.
        depth: number of blocks.
        heads: number of attention heads.
        hidden: hidden size of `ffn`; ``4 * width`` if None.
        activation: activation of `ffn`; the default is the tanh approximation of GELU, as in GPT-2.
        dropout: rate in `transformer_decoder` and on the embeddings, in [0, 1); 0.1 in GPT-2.
        eps: epsilon of the norms; positive.
        kernel_init: initializer of all kernels; None is GPT-2's: ``normal``, divided by
            ``sqrt(2 * depth)`` where a kernel ends a residual branch.

    Raises:
        LayerError: as `learned_positions` and `transformer_decoder`.

    Example:
        >>> net = dp.models.gpt(11, length=8, width=16, depth=2, heads=4)
        >>> net.plan(jnp.ones((2, 5), int)).y.shape
        (2, 5, 11)

    Source: Radford et al. 2019, section 2.3; the tied output: Press and Wolf 2017,
    arXiv:1608.05859.
    """
    check_count("depth", depth)
    inits: dict[str, Any] = {"kernel_init": kernel_init}
    if kernel_init is None:
        residual = 0.02 / math.sqrt(2 * depth)
        inits = {"kernel_init": "normal", "out_init": residual}
    trunk = transformer_decoder(
        depth, heads=heads, hidden=hidden or 4 * width, activation=activation, cross=False,
        norm_first=True, dropout=dropout, eps=eps, **inits)

    @program(hide=hide(), embed=embedding(vocabulary, width, embedding_init="normal"),
             positions=learned_positions(length), drop=dropping(dropout), trunk=trunk)
    def gpt(layers: Children, x: Any) -> jax.Array:
        tokens = layers.embed(layers.hide(x))                            # (batch, time, width)
        y = layers.drop(layers.positions(tokens))
        y = layers.trunk(y)                                              # (batch, time, width)
        return unembed(layers.embed.params, y)                           # (batch, time, vocabulary)

    return gpt
