"""The Transformer: blocks of attention and feed-forward nets, each with a residual sum and a norm.

Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762, figure 1. The encoder and the
decoder map vectors to vectors; `bert`, `gpt` and `vit` are built from them. The Transformer encodes
one sequence of tokens and predicts the next token of another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer
from diffprog.layers.attention.attention import cross_attention, self_attention
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.embedding import embedding, scaled, unembed
from diffprog.layers.masking import hide
from diffprog.layers.norms.norm import layer_norm
from diffprog.layers.positions.absolute import sinusoidal_positions
from diffprog.layers.sublayer import add_norm, ffn, pre_norm
from diffprog.transforms.repeat import repeat
from diffprog.wiring.children import Children
from diffprog.wiring.combinators import serial
from diffprog.wiring.program import program

__all__ = ["encoder_decoder", "transformer", "transformer_decoder", "transformer_encoder"]

Activation = Callable[[jax.Array], jax.Array]


@known
def transformer_encoder(
    depth: int = 6, *, heads: int = 8, hidden: int = 2048, activation: Activation = jax.nn.relu,
    norm_first: bool = False, dropout: float = 0.0, eps: float = 1e-5,
    kernel_init: Initializer = "glorot_uniform",
) -> Layer:
    """Blocks of self-attention over all positions: ``x = N(x + attend(x)); x = N(x + feed(x))``.

    With `norm_first` (pre-norm) a block is ``x = x + attend(N(x)); x = x + feed(N(x))``, and one
    more norm follows the last block. Without positions in x it is equivariant to permutations.

    Shapes:
        x: (..., T, D) -> (..., T, D), in the dtype of x.
        mask, segments, attention_mask, attention_bias: as in `self_attention`.
        params: ``blocks/attend`` and ``blocks/feed``, each ``body`` and ``norm``, stacked over
            depth; ``norm`` if `norm_first`.

    Args:
        depth: number of blocks; positive.
        heads: number of attention heads, a divisor of D.
        hidden: hidden size of `ffn`, usually 4 * D.
        activation: activation of `ffn`, a function of an array.
        norm_first: pre-norm in place of post-norm; trains deep nets without learning rate warm-up.
        dropout: rate on attention weights and on the output of each sublayer, in [0, 1).
        eps: epsilon of the norms; positive.
        kernel_init: initializer of all kernels; that of the paper's code.

    Raises:
        LayerError: as `self_attention`, `ffn` and `repeat`.

    Example:
        >>> dp.models.transformer_encoder(2, heads=4, hidden=32).plan(jnp.ones((2, 10, 16))).y.shape
        (2, 10, 16)

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1; norm_first: Xiong et al. 2020,
    arXiv:2002.04745.
    """
    sublayer = functools.partial(_sublayer, norm_first=norm_first, dropout=dropout, eps=eps)
    block = serial(
        attend=sublayer(self_attention(heads, dropout=dropout, kernel_init=kernel_init)),
        feed=sublayer(ffn(hidden, activation, kernel_init=kernel_init)))
    return _blocks(depth, block, norm_first, eps)


@known
def transformer_decoder(
    depth: int = 6, *, heads: int = 8, hidden: int = 2048, activation: Activation = jax.nn.relu,
    cross: bool = True, norm_first: bool = False, dropout: float = 0.0, eps: float = 1e-5,
    kernel_init: Initializer = "glorot_uniform", out_init: Initializer | None = None,
) -> Layer:
    """Causal blocks with cross-attention: ``x = N(x + attend(x)); x = N(x + cross(x)); ...``.

    ``x = N(x + feed(x))`` ends a block. It streams. Without `cross` it is the decoder of language
    models, which has no encoder output to attend to.

    Shapes:
        x: (..., T, D) -> (..., T, D), in the dtype of x.
        memory, memory_mask: as in `cross_attention`.
        mask, segments, attention_mask, attention_bias: as in `self_attention`, of x alone.
        params: as in `transformer_encoder`, and ``blocks/cross``.

    Args:
        cross: whether blocks have cross-attention to the encoder output, `memory`.
        depth, heads, hidden, activation, norm_first, dropout, eps, kernel_init: as in
            `transformer_encoder`.
        out_init: initializer of the last kernel of each sublayer; kernel_init if None.

    Raises:
        LayerError: as `self_attention`, `cross_attention`, `ffn` and `repeat`.

    Example:
        >>> net = dp.models.transformer_decoder(2, heads=4)
        >>> x, memory = jnp.ones((2, 3, 16)), jnp.ones((2, 7, 16))
        >>> net.plan(x, memory=memory).y.shape
        (2, 3, 16)

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    """
    sublayer = functools.partial(_sublayer, norm_first=norm_first, dropout=dropout, eps=eps)
    inits: dict[str, Any] = {"kernel_init": kernel_init, "out_init": out_init}
    attend = sublayer(self_attention(heads, causal=True, dropout=dropout, **inits))
    feed = sublayer(ffn(hidden, activation, **inits))
    if not cross:
        return _blocks(depth, serial(attend=attend, feed=feed), norm_first, eps)

    cross_attend = sublayer(cross_attention(heads, dropout=dropout, **inits))

    @program(attend=attend, cross=cross_attend, feed=feed)
    def block(
        layers: Children, x: jax.Array, *, attention_mask: Any = None, attention_bias: Any = None
    ) -> jax.Array:
        # These two are for self-attention only; as arguments they do not reach cross-attention.
        x = layers.attend(x, attention_mask=attention_mask, attention_bias=attention_bias)
        x = layers.cross(x)
        return layers.feed(x)

    return _blocks(depth, block, norm_first, eps)


def _sublayer(body: Layer, *, norm_first: bool, dropout: float, eps: float) -> Layer:
    """``x + body(N(x))`` with `norm_first`, otherwise ``N(x + body(x))``."""
    residual = pre_norm if norm_first else add_norm
    return residual(body, layer_norm(eps=eps), dropout=dropout)


def _blocks(depth: int, block: Layer, norm_first: bool, eps: float) -> Layer:
    """The block `depth` times; pre-norm blocks need one more norm, of their last sum."""
    if norm_first:
        return serial(blocks=repeat(depth, block), norm=layer_norm(eps=eps))
    return serial(blocks=repeat(depth, block))


@known
def transformer(
    source_vocabulary: int, target_vocabulary: int, *, width: int = 512, depth: int = 6,
    heads: int = 8, hidden: int = 2048, activation: Activation = jax.nn.relu,
    norm_first: bool = False, dropout: float = 0.0, kernel_init: Initializer = "glorot_uniform",
) -> Layer:
    """Encoder-decoder Transformer: ``y = decoder(embed(x), encoder(embed(source))) @ embed.T``.

    y[t] are the logits of the token after x[:t + 1]. Positions are sinusoidal, and the target
    embedding is tied to the output projection. Unlike in the paper, source and target have separate
    embeddings.

    Shapes:
        x: ints (batch, time) in [0, target_vocabulary) -> (batch, time, target_vocabulary).
        source: ints (batch, S) in [0, source_vocabulary); source_mask: booleans (batch, S), True
            for valid tokens.
        memory, memory_mask: the output of ``net.children["encoder"]`` in place of source; inside
            `ema` and similar wrappers, get it with `tap`. For streaming, pass memory, because the
            encoder needs the whole source.
        mask: booleans (batch, time), True for valid tokens.

    Args:
        source_vocabulary, target_vocabulary: number of tokens of source and target.
        width: model dimension; even, and a multiple of heads.
        depth: number of blocks of the encoder, and of the decoder.
        heads, hidden, activation, norm_first, dropout, kernel_init: as in `transformer_encoder`;
            dropout also acts on the embeddings; 0.1 in the paper.

    Raises:
        LayerError: source and memory are both given; whatever `transformer_decoder` raises.

    Example:
        >>> net = dp.models.transformer(11, 13, width=16, depth=2, heads=4, hidden=32)
        >>> x, source = jnp.ones((2, 5), int), jnp.ones((2, 7), int)
        >>> params, state = net.init(jax.random.key(0), x, source=source)
        >>> net(params, x, source=source).shape
        (2, 5, 13)
        >>> memory = net.children["encoder"](params["encoder"], source)  # then streams
        >>> state = net.start(params, state, x, length=5, memory=memory)

    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    options: dict[str, Any] = {"heads": heads, "hidden": hidden, "activation": activation,
                               "norm_first": norm_first, "dropout": dropout,
                               "kernel_init": kernel_init}

    encoder = serial(
        hide=hide(), embed=embedding(source_vocabulary, width), scaled=scaled(width),
        positions=sinusoidal_positions(), drop=dropping(dropout),
        body=transformer_encoder(depth, **options))

    @program(hide=hide(), embed=embedding(target_vocabulary, width), scaled=scaled(width),
             positions=sinusoidal_positions(), drop=dropping(dropout),
             body=transformer_decoder(depth, **options))
    def decoder(layers: Children, x: jax.Array) -> jax.Array:
        tokens = layers.scaled(layers.embed(layers.hide(x)))             # (batch, time, width)
        y = layers.drop(layers.positions(tokens))
        y = layers.body(y)                                               # (batch, time, width)
        return unembed(layers.embed.params, y)                           # (batch, time, vocabulary)

    return encoder_decoder(encoder, decoder)


@known
def encoder_decoder(encoder: Layer, decoder: Layer) -> Layer:
    """``y = decoder(x, memory=encoder(source))``; streams start with `memory` in place of source.

    Shapes:
        x: input of the decoder; source: input of the encoder; source_mask: its mask, and the mask
            of the encoder output.
        mask, positions, segments, attention_mask, attention_bias: for x, not for source.

    Args:
        encoder: a layer of source, which may take mask.
        decoder: a layer that takes `memory` and `memory_mask`.

    Raises:
        LayerError: source and memory are both given; source_mask is given without source.

    Example:
        >>> decoder = dp.models.transformer_decoder(1, heads=2, hidden=8)
        >>> net = dp.models.encoder_decoder(dp.linear(4), decoder)
        >>> x, source = jnp.ones((2, 3, 4)), jnp.ones((2, 7, 5))
        >>> net.plan(x, source=source).y.shape
        (2, 3, 4)

    Source: Cho et al. 2014, arXiv:1406.1078, section 2.2.
    """
    # The encoder must not take these side inputs, which are for x.
    absent = dict.fromkeys(("positions", "segments", "attention_mask", "attention_bias"))

    @program(encoder=encoder, decoder=decoder)
    def translate(
        layers: Children, x: Any, *, source: Any = None, source_mask: Any = None,
        memory: Any = None, memory_mask: Any = None,
    ) -> Any:
        if source is not None and memory is not None:
            raise LayerError("source or memory", f"both, {show(source)} and {show(memory)}",
                             "pass one of them: memory is the encoder's output for source")
        if source is None and source_mask is not None:
            raise LayerError("source with its source_mask", "source_mask alone",
                             "pass source= too, or memory_mask= for a memory")
        if source is not None:
            memory = layers.encoder(source, mask=source_mask, **absent)
            memory_mask = source_mask
        return layers.decoder(x, memory=memory, memory_mask=memory_mask)

    return translate
