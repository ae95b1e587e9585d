"""Positions: what tells a layer that works step by step where in the sequence a step stands.

Positions are counted from 0, or given as the side input `positions`. While streaming, every layer
that knows positions keeps the same books, `follow`, so that a prompt and the single steps after it
are one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import as_int32, check_array, check_count, known
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import begins, check_segments, last_real, over_steps, real_before
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
    """The positions of the steps of x, where None stands for 0, 1, 2, ..., and the state after.

    Positions that are not given count the real steps of each row, anew in each segment, so that
    padding shifts nothing; what is not real stands at 0. A stream carries `next`, the position of
    the next step of each row: it goes on from there, after the last real step.

    Args:
        state: `next` and `segment`, int32 of shape (batch...,), while streaming; without them
            nothing is carried.
        positions: ints of `shape`, or None.
        mask: booleans of `shape`, or None.
        shape: (batch..., time), that of x without its features.
        segments: int32 of `shape`, or None.
    """
    if positions is not None:
        ints = hasattr(positions, "dtype") and jnp.issubdtype(positions.dtype, jnp.integer)
        if not ints or positions.shape != shape:
            raise LayerError(f"positions as ints of shape {shape}", show(positions),
                             "give one to each step: jnp.broadcast_to(positions, x.shape[:-1])")
        positions = as_int32(positions)
    following = state.get("next")
    if following is not None and following.shape != shape[:-1]:
        raise LayerError(f"a chunk with batch axes {following.shape}, as start saw",
                         f"{shape[:-1]}", "start anew for another batch")
    counted = any(array is not None for array in (mask, segments, following))
    if positions is None and counted:
        counts = jnp.arange(shape[-1], dtype=jnp.int32) if mask is None else real_before(mask)
        counts = jax.lax.broadcast_to_rank(counts, len(shape))
        if segments is not None:  # less the steps before the segment's first one
            before = 0 if following is None else -following[..., None]
            before = jnp.where(begins(segments, mask, state.get("segment")), counts, before)
            counts = counts - jax.lax.cummax(before, axis=before.ndim - 1)
        elif following is not None:
            counts = following[..., None] + counts
        positions = counts if mask is None else jnp.where(mask, counts, 0)
    if following is None or positions is None:
        return positions, state
    state = state | {"next": last_real(positions, mask, following - 1) + 1}
    if segments is not None:
        state = state | {"segment": last_real(segments, mask, state["segment"])}
    return positions, state


@factory
def sinusoidal_positions(*, base: float = 10000.0, first: int = 0) -> Layer:
    """Add waves of the position: ``y_t = x_t + p_t``, ``p_t[2i] = sin(t / base**(2i/D))``.

    ``p_t[2i+1]`` is the cosine of the same, so that the product of p_t and p_(t+k) depends on the
    distance k alone.

    Shapes:
        x: (batch..., time, D), D even -> the same, in the dtype of x.
        positions: ints (batch..., time); if not given, real steps are counted from 0.
        mask: booleans (batch..., time) or (batch,), True = real; what is not real takes no
            position, and counts in none.
        segments: ints (batch..., time); wherever they change, steps are counted from 0 again.
        streaming state: ``next`` (batch...,), the position of the next step, and ``segment``
            (batch...,), in which the last one stands, 0 at the start. A chunk without positions
            goes on after the last real step, one without segments with the last.

    Args:
        base: wavelengths grow from 2 pi steps towards 2 pi * base steps; above 1.
        first: the i of the first pair. The paper counts i = 0 ... D/2 - 1; with 1 it is
            i = 1 ... D/2, as some lecture notes have it.

    Raises:
        LayerError: D is odd, or positions are no ints of the shape (batch..., time).

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
        # A cosine is a sine that is ahead by a quarter of a turn.
        return jnp.sin(angles(steps, np.repeat(pairs, 2), wide, np.tile([0, 0.25], len(pairs))))

    return _added(lambda key, x: {}, waves)


@factory
def learned_positions(length: int, *, embedding_init: Initializer = "normal") -> Layer:
    """Add a learned vector at each position: ``y_t = x_t + embedding[t]``.

    Shapes:
        x: (batch..., time, D), time at most `length` -> the same, in the dtype of x.
        positions: ints (batch..., time) in [0, length); if not given, real steps are counted from
            0. Others, and a stream that runs past `length`, give NaN, because nothing can be raised
            under `jax.jit`.
        mask, segments, streaming state: as in `sinusoidal_positions`.
        params: ``embedding`` (length, D).

    Args:
        length: how many positions there are.
        embedding_init: initializer; ``normal``, with standard deviation 0.02 (Radford et al. 2018,
            section 4.1; ViT: Dosovitskiy et al. 2021, arXiv:2010.11929, its code).

    Raises:
        LayerError: x, or the stream that is started, is longer than `length`; positions are no
            ints of the shape (batch..., time).

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
                             show(params), "pass what init gave")
        if positions is not None:
            return rows(table, positions)
        if not known(x.shape[-2]):
            return rows(table, jnp.arange(x.shape[-2], dtype=jnp.int32))
        _check_length(x.shape[-2], length)
        return table[: x.shape[-2]]

    return _added(init, vectors, length)


def _added(
    init: Callable[[jax.Array, Any], Params], vectors: Callable[..., jax.Array],
    longest: int | None = None,
) -> Layer:
    """The layer that adds ``vectors(params, positions, x, wide)`` to x, summed in dtype `wide`."""

    def begin(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
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
        wide = joint(x.dtype, jnp.float32)
        added = vectors(params, positions, x, wide)
        y = x.astype(wide) + jax.lax.broadcast_to_rank(added, x.ndim)
        return y.astype(x.dtype), state

    def start(params: Params, state: State, x: jax.Array, *, length: int, **_: Any) -> State:
        if longest is not None:
            _check_length(length, longest)
        return {name: jnp.zeros(x.shape[:-2], jnp.int32) for name in ("next", "segment")}

    return Layer(
        begin, apply, start, side=frozenset({"mask", "positions", "segments"}), casts=True)


def _check_length(time: int, length: int) -> None:
    if known(time) and time > length:
        raise LayerError(f"at most {length} steps", f"{time}", "learn more positions, or cut x")
