"""What attention keeps of the past while it streams: keys, values, and where they belong.

A cache holds the segment of each of its places, and a place that is empty, or holds padding, has
none: so one comparison says what a query may see.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffprog.errors import LayerError
from diffprog.layers.dot_product import Pattern
from diffprog.masks import real_before
from diffprog.plans import State

NONE = -(2**31)  # the segment of a place that no query sees


def empty_cache(
    key: jax.ShapeDtypeStruct, value: jax.ShapeDtypeStruct, length: int, window: int | None
) -> State:
    """A cache for `length` steps, or for the window - 1 last ones.

    `key` and `value` are the shapes of one chunk's, (batch..., heads, time, features).
    """
    batch, places = key.shape[:-3], length if window is None else window - 1
    zeros = lambda a: jnp.zeros((*a.shape[:-2], places, a.shape[-1]), a.dtype)  # noqa: E731
    state = {
        "key": zeros(key), "value": zeros(value),
        "segments": jnp.full((*batch, places), NONE, jnp.int32),
        "segment": jnp.zeros(batch, jnp.int32),
    }
    return state if window else state | {"index": jnp.zeros((), jnp.int32)}


def extended(
    state: State, key: jax.Array, value: jax.Array, mask: jax.Array | None,
    segments: jax.Array | None, window: int | None,
) -> tuple[jax.Array, jax.Array, Pattern, State]:
    """Keys and values of past and chunk, what the chunk's queries see of them, the new cache.

    A chunk without segments goes on with the segment in which the last one ended.
    """
    shape = (*key.shape[:-3], key.shape[-2])
    if segments is None:
        own = jnp.broadcast_to(state["segment"][..., None], shape)
        now = state["segment"]
    else:
        own = segments.astype(jnp.int32)
        now = _last_real(own, mask, state["segment"])
    stored = own if mask is None else jnp.where(mask, own, NONE)
    chunk = {"key": key, "value": value, "segments": stored}
    pattern, whole, kept = (_appended(state, chunk) if window is None else
                            _slid(state, chunk, mask, window))
    pattern = dataclasses.replace(
        pattern, segments=(own, whole["segments"]), empty=mask is not None)
    return whole["key"], whole["value"], pattern, {**state, **kept, "segment": now}


def overrun(state: State, steps: int) -> jax.Array | None:
    """True if so many steps more do not fit; None for a window, which never ends."""
    return state["index"] + steps > state["segments"].shape[-1] if "index" in state else None


def _appended(state: State, chunk: State) -> tuple[Pattern, State, State]:
    """Write the chunk behind the past, in place."""
    steps, places = chunk["segments"].shape[-1], state["segments"].shape[-1]
    if steps > places:
        raise LayerError(f"a chunk of at most length={places} steps", f"{steps}",
                         "start with a larger length, or pass on fewer steps at a time")
    index = state["index"]
    put = lambda name, axis: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
        state[name], chunk[name], index, axis)
    whole = {"key": put("key", -2), "value": put("value", -2), "segments": put("segments", -1)}
    orders = (index + jnp.arange(steps), jnp.arange(places))
    pattern = Pattern(causal=steps > 1, orders=orders)  # nothing stands behind a single step yet
    return pattern, whole, whole | {"index": index + steps}


def _slid(
    state: State, chunk: State, mask: jax.Array | None, window: int
) -> tuple[Pattern, State, State]:
    """Join past and chunk, and keep the last window - 1 real steps of both."""
    steps, past = chunk["segments"].shape[-1], window - 1
    join = lambda name, axis: jnp.concatenate([state[name], chunk[name]], axis)  # noqa: E731
    whole = {"key": join("key", -2), "value": join("value", -2), "segments": join("segments", -1)}
    order = jnp.arange(past + steps)
    pattern = Pattern(causal=True, window=window, orders=(order[past:], order))
    if mask is None:
        kept = {"key": whole["key"][..., steps:, :], "value": whole["value"][..., steps:, :],
                "segments": whole["segments"][..., steps:]}
        return pattern, whole, kept
    # The window counts real steps, so that padding pushes nothing out of it.
    places = real_before(mask)
    before = jnp.broadcast_to(jnp.arange(-past, 0, dtype=jnp.int32), (*mask.shape[:-1], past))
    pattern = dataclasses.replace(
        pattern, places=(places, jnp.concatenate([before, places], -1)))
    real = whole["segments"] != NONE
    last = jnp.argsort(real, -1, stable=True)[..., steps:]
    kept = {
        "segments": jnp.take_along_axis(whole["segments"], last, -1),
        **{name: jnp.take_along_axis(whole[name], last[..., None, :, None], -2)
           for name in ("key", "value")},
    }
    return pattern, whole, kept


def _last_real(segments: jax.Array, mask: jax.Array | None, before: jax.Array) -> jax.Array:
    """The segment of each row's last real step; `before` where the chunk has none."""
    if mask is None:
        return segments[..., -1]
    last = segments.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], -1)
    found = jnp.take_along_axis(segments, last[..., None], -1)[..., 0]
    return jnp.where(mask.any(-1), found, before)
