"""What attention keeps of the past while it streams: keys, values, and where they belong.

A cache holds the segment of each of its slots, and a slot that is empty, or holds padding, has
none: so one comparison says what a query may see.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core.arguments import at_most, known
from diffprog.core.errors import LayerError
from diffprog.core.masks import NONE, last_real, real_before
from diffprog.core.meshes import beside
from diffprog.core.plans import State
from diffprog.layers.attention.dot_product import Pattern

_TIME = {"key": -2, "value": -2, "segments": -1}  # what has an entry for each slot: its axis


class Context(NamedTuple):
    """What queries meet: keys and values, who sees whom, and the state that is kept of it."""

    key: jax.Array
    value: jax.Array
    pattern: Pattern
    state: State


def empty_cache(
    key: jax.ShapeDtypeStruct, value: jax.ShapeDtypeStruct, length: int, window: int | None
) -> State:
    """A cache for `length` steps, or for the window - 1 last ones.

    `key` and `value` are the shapes of one chunk's, (batch..., heads, time, features).
    """
    batch, slots = key.shape[:-3], length if window is None else window - 1

    def zeros(chunk: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((*chunk.shape[:-2], slots, chunk.shape[-1]), chunk.dtype)

    state = {
        "key": zeros(key), "value": zeros(value),
        "segments": jnp.full((*batch, slots), NONE, jnp.int32),
        "segment": jnp.zeros(batch, jnp.int32),
    }
    return state if window else state | {"index": jnp.zeros((), jnp.int32)}


def extended(
    state: State, key: jax.Array, value: jax.Array, mask: jax.Array | None,
    segments: jax.Array | None, window: int | None,
) -> Context:
    """Keys and values of past and chunk, what the chunk's queries see of them, the new cache.

    A chunk without segments goes on with the segment in which the last one ended.
    """
    if segments is None:
        last = state["segment"]
        segments = jnp.broadcast_to(last[..., None], (*key.shape[:-3], key.shape[-2]))
    else:
        last = last_real(segments, mask, state["segment"])
    stored = segments if mask is None else jnp.where(mask, segments, NONE)
    chunk = {"key": key, "value": value, "segments": stored}
    pattern, whole, kept = (_appended(state, chunk) if window is None else
                            _slid(state, chunk, mask, window))
    pattern = dataclasses.replace(
        pattern, segments=(segments, whole["segments"]), empty=mask is not None)
    return Context(whole["key"], whole["value"], pattern, {**state, **kept, "segment": last})


def overrun(state: State, steps: int) -> jax.Array | None:
    """True if so many steps more do not fit; None where nothing can overrun, as in a window."""
    return state["index"] + steps > state["segments"].shape[-1] if "index" in state else None


def _appended(state: State, chunk: State) -> tuple[Pattern, State, State]:
    """Write the chunk behind the past, in place: the pattern, what is seen, what is kept."""
    steps, slots = chunk["segments"].shape[-1], state["segments"].shape[-1]
    if not at_most(steps, slots):
        said = known(steps) and known(slots)
        raise LayerError(f"a chunk of at most length={slots} steps",
                         f"{steps}" if said else f"{steps}, which may be more",
                         "start with a larger length, or pass on fewer steps at a time" if said
                         else "say so where the size is made: jax.export.symbolic_shape(..., "
                         f'constraints=["{steps} <= {slots}"])')
    index = state["index"]
    whole = {name: jax.lax.dynamic_update_slice_in_dim(
        beside(state[name], chunk[name]), beside(chunk[name], state[name]), index, axis)
             for name, axis in _TIME.items()}
    orders = (index + jnp.arange(steps, dtype=index.dtype), jnp.arange(slots, dtype=index.dtype))
    pattern = Pattern(causal=steps != 1, orders=orders)  # nothing stands behind a single step yet
    return pattern, whole, whole | {"index": index + steps}


def _slid(
    state: State, chunk: State, mask: jax.Array | None, window: int
) -> tuple[Pattern, State, State]:
    """Join past and chunk, and keep the last window - 1 real steps of both."""
    steps, past = chunk["segments"].shape[-1], window - 1
    whole = {name: jnp.concatenate([
        beside(state[name], chunk[name]), beside(chunk[name], state[name])], axis)
             for name, axis in _TIME.items()}
    order = jnp.arange(past + steps)
    pattern = Pattern(causal=True, window=window, orders=(order[past:], order))
    if mask is None:
        kept = {name: jax.lax.slice_in_dim(whole[name], steps, past + steps, axis=axis)
                for name, axis in _TIME.items()}
        return pattern, whole, kept
    # The window counts real steps, so that padding pushes nothing out of it.
    ranks = real_before(mask)
    past_ranks = jnp.broadcast_to(jnp.arange(-past, 0, dtype=jnp.int32), (*mask.shape[:-1], past))
    pattern = dataclasses.replace(
        pattern, ranks=(ranks, jnp.concatenate([beside(past_ranks, ranks), ranks], -1)))
    # The real ones come last, in their order: False sorts before True, and the sort is stable.
    real = whole["segments"] != NONE
    last = jnp.argsort(real, -1, stable=True)[..., steps:]
    kept = {
        "segments": jnp.take_along_axis(whole["segments"], last, -1),
        **{name: jnp.take_along_axis(whole[name], last[..., None, :, None], -2)
           for name in ("key", "value")},
    }
    return pattern, whole, kept
