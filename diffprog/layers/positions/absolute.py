"""Absolute position embeddings, sinusoidal and learned.

Positions are counted from 0, or passed as the side input `positions`. In a stream `follow` carries
the next position from chunk to chunk, for these layers and for rotary attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import as_int32, check_array, check_count, check_ints, known
from diffprog.core.dtypes import wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import begins, check_segments, last_valid, over_steps, valid_before
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, parameter
from diffprog.core.plans import Params, State
from diffprog.layers.embedding import rows
from diffprog.layers.positions.rotary import angles, check_base, frequencies

__all__ = ["learned_positions", "sinusoidal_positions"]


def follow(
    state: State, positions: jax.Array | None, mask: jax.Array | None, shape: tuple[int, ...],
    segments: jax.Array | None = None,
) -> tuple[jax.Array | None, State]:
    """The positions of the steps of x, and the new state; None means 0, 1, 2, ....

    By default the valid steps of each row are counted, from 0 in each segment, and masked steps
    have the position 0. A stream carries ``next``, the position after the last valid step of each
    row, and continues from it.

    Args:
        state: in a stream ``next`` and ``segment``, int32 of shape (batch...,); otherwise empty.
        positions: ints of `shape`, or None.
        mask: booleans of `shape`, or None.
        shape: (batch..., time), the shape of x without its features.
        segments: int32 of `shape`, or None.
    """
    following = state.get("next")  # (batch...,)
    if positions is not None:
        positions = _checked(positions, shape)
    if following is not None and following.shape != shape[:-1]:
        raise LayerError(f"a chunk with batch axes {following.shape}, as start saw",
                         f"{shape[:-1]}", "start a new stream for another batch")
    if positions is None:
        positions = _counted(state, mask, shape, segments)
    if following is None or positions is None:
        return positions, state
    state = state | {"next": last_valid(positions, mask, following - 1) + 1}
    if segments is not None:
        state = state | {"segment": last_valid(segments, mask, state["segment"])}
    return positions, state


def _checked(positions: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    check_ints("positions", positions, shape=shape,
               remedy="pass one for each step: jnp.broadcast_to(positions, x.shape[:-1])")
    return as_int32(positions)


def _counted(
    state: State, mask: jax.Array | None, shape: tuple[int, ...], segments: jax.Array | None
) -> jax.Array | None:
    """The positions by counting valid steps, (batch..., time); None if they are 0, 1, 2, ...."""
    following = state.get("next")
    if mask is None and segments is None and following is None:
        return None
    counts = jnp.arange(shape[-1], dtype=jnp.int32) if mask is None else valid_before(mask)
    counts = jax.lax.broadcast_to_rank(counts, len(shape))  # (batch... or 1..., time)
    if segments is not None:
        # The count at the first step of each segment is subtracted.
        first = 0 if following is None else -following[..., None]
        first = jnp.where(begins(segments, mask, state.get("segment")), counts, first)
        counts = counts - jax.lax.cummax(first, axis=first.ndim - 1)
    elif following is not None:
        counts = following[..., None] + counts
    return counts if mask is None else jnp.where(mask, counts, 0)


@factory
def sinusoidal_positions(*, base: float = 10000.0, first: int = 0) -> Layer:
    """Sinusoidal position embedding: ``y_t = x_t + p_t``, ``p_t[2i] = sin(t / base**(2i/D))``.

    ``p_t[2i+1]`` is the cosine of the same angle, so that the inner product of p_t and p_(t+k)
    depends on the distance k alone.

    Shapes:
        x: (batch..., time, D), D even -> the same, in the dtype of x.
        positions: ints (batch..., time); by default valid steps are counted from 0.
        mask: booleans (batch..., time) or (batch,), True = valid; masked steps are not counted.
        segments: ints (batch..., time); counting restarts from 0 in each segment.
        streaming state: ``next`` (batch...,), the position of the next step, and ``segment``
            (batch...,), the segment of the last step, initially 0. A chunk without positions
            continues after the last valid step; a chunk without segments continues the last
            segment.

    Args:
        base: greater than 1; wavelengths range from 2 pi to 2 pi * base steps.
        first: the i of the first pair in the exponent: 0 as in the paper, or 1 as in some lecture
            notes.

    Raises:
        LayerError: D is odd, or positions are not ints of shape (batch..., time).

    Example:
        >>> y = dp.sinusoidal_positions()({}, jnp.zeros((1, 2, 4)))
        >>> [round(number, 3) for number in y[0, 1].tolist()]
        [0.841, 0.54, 0.01, 1.0]

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    check_base(base)
    check_count("first", first, least=0)

    def waves(params: Params, positions: jax.Array | None, x: jax.Array, wide: Any) -> jax.Array:
        if x.shape[-1] % 2:
            raise LayerError("an even number of features", show(x), "add or drop a feature")
        steps = jnp.arange(x.shape[-2], dtype=jnp.int32) if positions is None else positions
        pairs = frequencies(base, x.shape[-1], first)
        # cos(a) = sin(a + 1/4 turn), so that one sine of (..., time, D) is enough.
        quarter_turns = np.tile([0, 0.25], len(pairs))  # (D,)
        return jnp.sin(angles(steps, np.repeat(pairs, 2), wide, quarter_turns))

    return _position_layer(lambda key, x: {}, waves)


@factory
def learned_positions(length: int, *, embedding_init: Initializer = "normal") -> Layer:
    """Learned position embedding: ``y_t = x_t + embedding[t]``.

    Shapes:
        x: (batch..., time, D), time at most `length` -> the same, in the dtype of x.
        positions: ints (batch..., time) in [0, length); by default valid steps are counted from 0.
            Other positions, and a stream that runs past `length`, return NaN, because an error
            cannot be raised under `jax.jit`.
        mask, segments, streaming state: as in `sinusoidal_positions`.
        params: ``embedding`` (length, D).

    Args:
        length: number of positions; positive.
        embedding_init: initializer; ``normal``, with standard deviation 0.02 (Radford et al. 2018,
            section 4.1; ViT: Dosovitskiy et al. 2021, arXiv:2010.11929, its code).

    Raises:
        LayerError: x or the stream is longer than `length`; positions are not ints of shape
            (batch..., time).

    Example:
        >>> net, x = dp.learned_positions(8), jnp.zeros((2, 5, 3))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> bool((net(params, x)[1] == params["embedding"][:5]).all())
        True

    Source: Gehring et al. 2017, arXiv:1705.03122, section 3.1.
    """
    check_count("length", length)

    def init(key: jax.Array, x: Any) -> Params:
        shape = (length, x.shape[-1])
        return {"embedding": parameter(key, "embedding", embedding_init, shape, x)}

    def vectors(params: Params, positions: jax.Array | None, x: jax.Array, wide: Any) -> jax.Array:
        table = params["embedding"].astype(wide)
        if table.shape != (length, x.shape[-1]):
            raise LayerError(f"params of {length} positions and {x.shape[-1]} features",
                             show(params), "pass what init returned")
        if positions is not None:
            return rows(table, positions)
        if not known(x.shape[-2]):
            return rows(table, jnp.arange(x.shape[-2], dtype=jnp.int32))
        _check_length(x.shape[-2], length)
        return table[: x.shape[-2]]

    return _position_layer(init, vectors, length)


def _position_layer(
    init: Callable[[jax.Array, Any], Params], vectors: Callable[..., jax.Array],
    longest: int | None = None,
) -> Layer:
    """The layer ``y = x + vectors(params, positions, x, wide)``, summed in the dtype `wide`."""

    def checked_init(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        check_array(x, rank=2, axes="(..., time, features)")
        return init(key, x), {}

    def apply(
        params: Params, state: State, x: jax.Array, *, positions: jax.Array | None = None,
        mask: jax.Array | None = None, segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=2, axes="(..., time, features)")
        shape = x.shape[:-1]
        segments = None if segments is None else check_segments(segments, shape)
        positions, state = follow(state, positions, over_steps(mask, x), shape, segments)
        wide = wide_dtype(x)
        embedding = vectors(params, positions, x, wide)  # (..., time, D) or (time, D)
        y = x.astype(wide) + jax.lax.broadcast_to_rank(embedding, x.ndim)
        return y.astype(x.dtype), state

    def start(params: Params, state: State, x: jax.Array, *, length: int, **_: Any) -> State:
        if longest is not None:
            _check_length(length, longest)
        return {name: jnp.zeros(x.shape[:-2], jnp.int32) for name in ("next", "segment")}

    return Layer(
        checked_init, apply, start, side=frozenset({"mask", "positions", "segments"}), casts=True)


def _check_length(time: int, length: int) -> None:
    if known(time) and time > length:
        raise LayerError(f"at most {length} steps", f"{time}", "learn more positions, or cut x")
