"""The key-value cache of a stream, with the segment of each cached key.

An empty or padded slot has no segment (`NONE`), so that one comparison of segments decides which
slots a query attends to.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core.arguments import at_most, known
from diffprog.core.errors import LayerError
from diffprog.core.masks import NONE, last_valid, valid_before
from diffprog.core.meshes import beside
from diffprog.core.plans import State
from diffprog.layers.attention.dot_product import Pattern

_TIME_AXES = {"key": -2, "value": -2, "segments": -1}


class Context(NamedTuple):
    """The keys and values for the queries of one call, the attention pattern, the new state.

    key: (..., kv_heads, S, head_dim); value: (..., kv_heads, S, value_dim).
    """

    key: jax.Array
    value: jax.Array
    pattern: Pattern
    state: State


def empty_cache(
    key: jax.ShapeDtypeStruct, value: jax.ShapeDtypeStruct, length: int, window: int | None
) -> State:
    """A cache of `length` time steps, or of the window - 1 last ones.

    `key` and `value` are the shapes of one chunk, (batch..., heads, time, features).
    """
    batch = key.shape[:-3]
    slots = length if window is None else window - 1

    def zeros(chunk: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((*chunk.shape[:-2], slots, chunk.shape[-1]), chunk.dtype)

    state = {
        "key": zeros(key),  # (batch..., heads, slots, head_dim)
        "value": zeros(value),  # (batch..., heads, slots, value_dim)
        "segments": jnp.full((*batch, slots), NONE, jnp.int32),
        "segment": jnp.zeros(batch, jnp.int32),  # of the last valid step
    }
    if window is None:
        state["index"] = jnp.zeros((), jnp.int32)  # number of slots written
    return state


def extended(
    state: State, key: jax.Array, value: jax.Array, mask: jax.Array | None,
    segments: jax.Array | None, window: int | None,
) -> Context:
    """The past and the chunk joined: keys, values, pattern, and the new cache.

    A chunk without segments continues the segment of the last valid step.
    """
    if segments is None:
        last = state["segment"]
        segments = jnp.broadcast_to(last[..., None], (*key.shape[:-3], key.shape[-2]))
    else:
        last = last_valid(segments, mask, state["segment"])
    stored = segments if mask is None else jnp.where(mask, segments, NONE)
    chunk = {"key": key, "value": value, "segments": stored}
    if window is None:
        pattern, whole, kept = _append(state, chunk)
    else:
        pattern, whole, kept = _slide(state, chunk, mask, window)
    pattern = dataclasses.replace(
        pattern, segments=(segments, whole["segments"]), empty=mask is not None)
    return Context(whole["key"], whole["value"], pattern, {**state, **kept, "segment": last})


def keys_of_stream(state: State, steps: int) -> int:
    """The number of keys among which a chunk of `steps` steps attends; the cache may be stacked.

    All slots of a cache or of memory; with a window the slots and the chunk.
    """
    slots = state["key"].shape[-2]
    return slots if state.keys() & {"index", "real"} else slots + steps


def overrun(state: State, steps: int) -> jax.Array | None:
    """Whether `steps` more do not fit; None for a state that has no length, as with a window."""
    if "index" not in state:
        return None
    return state["index"] + steps > state["segments"].shape[-1]


def _append(state: State, chunk: State) -> tuple[Pattern, State, State]:
    """Write the chunk behind the past, in place: the pattern, all slots, the new state."""
    steps, slots = chunk["segments"].shape[-1], state["segments"].shape[-1]
    _check_length(steps, slots)
    index = state["index"]
    whole = {}
    for name, axis in _TIME_AXES.items():
        past, new = beside(state[name], chunk[name]), beside(chunk[name], state[name])
        whole[name] = jax.lax.dynamic_update_slice_in_dim(past, new, index, axis)
    orders = (index + jnp.arange(steps, dtype=index.dtype), jnp.arange(slots, dtype=index.dtype))
    pattern = Pattern(causal=steps != 1, orders=orders)  # no slot after a single step is written
    return pattern, whole, whole | {"index": index + steps}


def _slide(
    state: State, chunk: State, mask: jax.Array | None, window: int
) -> tuple[Pattern, State, State]:
    """Append the chunk, and keep the last window - 1 valid steps: pattern, all, new state."""
    steps, past = chunk["segments"].shape[-1], window - 1
    whole = {}
    for name, axis in _TIME_AXES.items():
        parts = [beside(state[name], chunk[name]), beside(chunk[name], state[name])]
        whole[name] = jnp.concatenate(parts, axis)
    order = jnp.arange(past + steps)
    pattern = Pattern(causal=True, window=window, orders=(order[past:], order))
    if mask is None:
        kept = {name: jax.lax.slice_in_dim(whole[name], steps, past + steps, axis=axis)
                for name, axis in _TIME_AXES.items()}
        return pattern, whole, kept

    # The window counts valid steps alone, so that padding does not push any out of it.
    ranks = valid_before(mask)  # (..., steps)
    past_ranks = jnp.broadcast_to(jnp.arange(-past, 0, dtype=jnp.int32), (*mask.shape[:-1], past))
    all_ranks = jnp.concatenate([beside(past_ranks, ranks), ranks], -1)  # (..., past + steps)
    pattern = dataclasses.replace(pattern, ranks=(ranks, all_ranks))

    # A stable sort of booleans puts the valid steps last, in their order.
    valid = whole["segments"] != NONE
    last = jnp.argsort(valid, -1, stable=True)[..., steps:]  # (..., past)
    kept = {"segments": jnp.take_along_axis(whole["segments"], last, -1)}
    for name in ("key", "value"):
        kept[name] = jnp.take_along_axis(whole[name], last[..., None, :, None], -2)
    return pattern, whole, kept


def _check_length(steps: Any, slots: Any) -> None:
    if at_most(steps, slots):
        return
    if known(steps) and known(slots):
        got, remedy = f"{steps}", "start with a larger length, or pass fewer steps at a time"
    else:
        got = f"{steps}, which may be more"
        remedy = ("constrain the size where it is made: jax.export.symbolic_shape(..., "
                  f'constraints=["{steps} <= {slots}"])')
    raise LayerError(f"a chunk of at most length={slots} steps", got, remedy)
