"""The Transformer: attention and feed-forward nets in turn, with residual sums and norms.

Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762, figure 1. The encoder and the
decoder map vectors to vectors; `bert`, `gpt` and `vit` are made of them. The whole reads one
sequence of ids and scores the next id of another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.core.notation import show
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
) -> Layer:
    """Blocks in which all positions ask all: ``x = N(x + attend(x)); x = N(x + feed(x))``.

    With `norm_first` a block is ``x = x + attend(N(x)); x = x + feed(N(x))``, and a norm stands at
    the end. Without positions in x it is equivariant to permutations.

    Shapes:
        x: (..., T, D) -> (..., T, D), in the dtype of x.
        mask, segments, attention_mask, attention_bias: as in `self_attention`.
        params: ``blocks/attend`` and ``blocks/feed``, each ``body`` and ``norm``, stacked over
            depth; ``norm`` if `norm_first`.

    Args:
        depth: number of blocks; positive.
        heads: heads of attention; they divide D.
        hidden: size of the hidden axis of `ffn`, mostly 4 * D.
        activation: of `ffn`, a function of an array.
        norm_first: norms before each body, which trains deep nets without warm-up of the rate.
        dropout: share that is dropped in training, of attention's weights and of each body's
            values, in [0, 1).
        eps: of the norms; positive.

    Raises:
        LayerError: as `self_attention`, `ffn` and `repeat` do.

    Example:
        >>> dp.models.transformer_encoder(2, heads=4, hidden=32).plan(jnp.ones((2, 10, 16))).y.shape
        (2, 10, 16)

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1; norm_first: Xiong et al. 2020,
    arXiv:2002.04745.
    """
    around = _around(norm_first, dropout, eps)
    block = serial(attend=around(self_attention(heads, dropout=dropout)),
                   feed=around(ffn(hidden, activation)))
    return _stack(depth, block, norm_first, eps)


@known
def transformer_decoder(
    depth: int = 6, *, heads: int = 8, hidden: int = 2048, activation: Activation = jax.nn.relu,
    cross: bool = True, norm_first: bool = False, dropout: float = 0.0, eps: float = 1e-5,
) -> Layer:
    """Causal blocks that ask a memory too: ``x = N(x + attend(x)); x = N(x + cross(x)); ...``.

    ``x = N(x + feed(x))`` ends a block. It streams. Without `cross` there is no memory: the
    decoder of language models.

    Shapes:
        x: (..., T, D) -> (..., T, D), in the dtype of x.
        memory, memory_mask: as in `cross_attention`.
        mask, segments, attention_mask, attention_bias: as in `self_attention`, of x alone.
        params: as in `transformer_encoder`, and ``blocks/cross``.

    Args:
        cross: False leaves out the attention to memory.
        depth, heads, hidden, activation, norm_first, dropout, eps: as in `transformer_encoder`.

    Raises:
        LayerError: as `self_attention`, `cross_attention`, `ffn` and `repeat` do.

    Example:
        >>> net = dp.models.transformer_decoder(2, heads=4)
        >>> x, memory = jnp.ones((2, 3, 16)), jnp.ones((2, 7, 16))
        >>> net.plan(x, memory=memory).y.shape
        (2, 3, 16)

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
    """
    around = _around(norm_first, dropout, eps)
    attend = around(self_attention(heads, causal=True, dropout=dropout))
    feed = around(ffn(hidden, activation))
    if not cross:
        return _stack(depth, serial(attend=attend, feed=feed), norm_first, eps)

    @program(attend=attend, cross=around(cross_attention(heads, dropout=dropout)), feed=feed)
    def block(
        layers: Children, x: jax.Array, *, attention_mask: Any = None, attention_bias: Any = None
    ) -> jax.Array:
        # Named, because they speak of x and itself: cross attention must not take them.
        x = layers.attend(x, attention_mask=attention_mask, attention_bias=attention_bias)
        return layers.feed(layers.cross(x))

    return _stack(depth, block, norm_first, eps)


@known
def transformer(
    source_vocabulary: int, target_vocabulary: int, *, width: int = 512, depth: int = 6,
    heads: int = 8, hidden: int = 2048, activation: Activation = jax.nn.relu,
    norm_first: bool = False, dropout: float = 0.0,
) -> Layer:
    """Translate: ``y = decoder(embed(x), encoder(embed(source))) @ embed.T``.

    y[t] scores the id that follows x[:t + 1]. Positions are waves; the vectors that read the
    target score it too. As in the paper, but that each language has vectors of its own.

    Shapes:
        x: ints (batch, time) in [0, target_vocabulary) -> (batch, time, target_vocabulary).
        source: ints (batch, S) in [0, source_vocabulary); source_mask: booleans (batch, S), True =
            real.
        memory, memory_mask: what ``net.children["encoder"]`` makes of the source, in its place; of
            a net in `ema` and the like, what `tap` reads there. Streams begin with it, because the
            encoder sees all at once.
        mask: booleans (batch, time), True = real.

    Args:
        source_vocabulary, target_vocabulary: how many ids there are to read, and to write.
        width: size of the vectors; even, and a multiple of heads.
        depth: blocks of the encoder, and of the decoder.
        heads, hidden, activation, norm_first, dropout: as in `transformer_encoder`; dropout also
            acts on what enters the first blocks (0.1 in the paper).

    Raises:
        LayerError: source and memory are given both; and as `transformer_decoder` does.

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
                               "norm_first": norm_first, "dropout": dropout}

    encoder = serial(
        hide=hide(), embed=embedding(source_vocabulary, width), scaled=scaled(width),
        positions=sinusoidal_positions(), drop=dropping(dropout),
        body=transformer_encoder(depth, **options))

    @program(hide=hide(), embed=embedding(target_vocabulary, width), scaled=scaled(width),
             positions=sinusoidal_positions(), drop=dropping(dropout),
             body=transformer_decoder(depth, **options))
    def decoder(layers: Children, x: jax.Array) -> jax.Array:
        y = layers.positions(layers.scaled(layers.embed(layers.hide(x))))
        y = layers.body(layers.drop(y))
        return unembed(layers.embed.params, y)

    return encoder_decoder(encoder, decoder)


@known
def encoder_decoder(encoder: Layer, decoder: Layer) -> Layer:
    """``y = decoder(x, memory=encoder(source))``; streams begin with `memory` in place of source.

    Shapes:
        x: what the decoder takes; source: what the encoder takes; source_mask is its mask, and the
            mask of memory.
        mask, positions, segments, attention_mask, attention_bias: of x alone.

    Args:
        encoder: a layer of source, which may take mask.
        decoder: a layer that takes `memory` and `memory_mask`.

    Raises:
        LayerError: source and memory are given both; a source_mask without source.

    Example:
        >>> decoder = dp.models.transformer_decoder(1, heads=2, hidden=8)
        >>> net = dp.models.encoder_decoder(dp.linear(4), decoder)
        >>> x, source = jnp.ones((2, 3, 4)), jnp.ones((2, 7, 5))
        >>> net.plan(x, source=source).y.shape
        (2, 3, 4)

    Source: Cho et al. 2014, arXiv:1406.1078, section 2.2.
    """
    others = dict.fromkeys(("positions", "segments", "attention_mask", "attention_bias"))

    @program(encoder=encoder, decoder=decoder)
    def translate(
        layers: Children, x: Any, *, source: Any = None, source_mask: Any = None,
        memory: Any = None, memory_mask: Any = None,
    ) -> Any:
        if source is not None and memory is not None:
            raise LayerError("source or memory", f"both, {show(source)} and {show(memory)}",
                             "pass one of them: memory is what the encoder makes of source")
        if source is None and source_mask is not None:
            raise LayerError("source with its source_mask", "source_mask alone",
                             "pass source= too, or memory_mask= for a memory")
        if source is not None:
            memory = layers.encoder(source, **others | {"mask": source_mask})
            memory_mask = source_mask
        return layers.decoder(x, memory=memory, memory_mask=memory_mask)

    return translate


def _around(norm_first: bool, dropout: float, eps: float) -> Callable[[Layer], Layer]:
    """How a body is surrounded by its residual sum and its norm."""
    made = pre_norm if norm_first else add_norm
    return lambda body: made(body, layer_norm(eps=eps), dropout=dropout)


def _stack(depth: int, block: Layer, norm_first: bool, eps: float) -> Layer:
    """The block again and again; sums that nothing has normalized yet are at the end."""
    last = {"norm": layer_norm(eps=eps)} if norm_first else {}
    return serial(blocks=repeat(depth, block), **last)
