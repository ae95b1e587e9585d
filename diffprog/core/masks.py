"""Masks mark valid entries; segments mark sequences that share a row.

A mask is booleans over leading axes, True where valid. A layer that mixes or averages entries
zeroes the invalid ones first, so that values in the padding, even NaN, reach no output. Segments
are one int for each time step: steps of equal number are one sequence, independent of the others.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_ints, known
from diffprog.core.errors import LayerError
from diffprog.core.meshes import beside
from diffprog.core.notation import show

NONE = -(2**31)  # the least int32: reserved, as neither a segment nor a position has it


def cleared(x: jax.Array, mask: jax.Array | None, *, reach: int | None = None) -> jax.Array:
    """x with zeros where the mask is False; x itself, as JAX's array, where there is no mask."""
    if mask is None:
        return jnp.asarray(x)
    return jnp.where(widened(mask, x.shape, reach=reach), x, jnp.zeros_like(x))


def widened(
    mask: jax.Array, shape: tuple[int, ...], *, reach: int | None = None
) -> jax.Array:
    """The mask with an axis of size 1 for each axis of `shape` that it does not cover.

    It may cover the first `reach` axes; None means all but the last, the features.
    """
    reach = len(shape) - 1 if reach is None else reach
    if not (hasattr(mask, "dtype") and mask.dtype == jnp.bool_):
        raise LayerError("a mask of booleans", show(mask),
                         "make it boolean: True marks valid entries")
    if not 1 <= mask.ndim <= reach or mask.shape != shape[: mask.ndim]:
        remedy = ("name mask in a program where the time axis changes length, and pass on the new "
                  "one")
        if mask.ndim > reach:
            remedy = ("give it one entry per position: attention_mask masks pairs of query and "
                      "key, target_mask masks targets")
        elif mask.ndim and mask.shape == shape[1 : 1 + mask.ndim]:
            whole = shape[: 1 + mask.ndim]
            remedy = f"give it a batch axis, as by jnp.broadcast_to(mask, {whole})"
        raise LayerError(f"a mask of the leading axes of {shape}", show(mask), remedy)
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))


def over_steps(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """The mask with one entry for each vector of x, (..., time); None stays None."""
    if mask is None:
        return None
    return jnp.broadcast_to(widened(mask, x.shape)[..., 0], x.shape[:-1])


def counted(valid: jax.Array, each: int = 1) -> jax.Array:
    """The number of valid entries, where each entry of the mask counts for several.

    A float if int32 may overflow: it is exact up to rounding.
    """
    kind = int if known(valid.size * each) and valid.size * each < 2**31 else float
    number = valid.sum(dtype=kind)
    return number if each == 1 else number * kind(each)


def valid_before(mask: jax.Array) -> jax.Array:
    """The number of valid steps before each step."""
    return jnp.cumsum(mask, -1, dtype=jnp.int32) - mask.astype(jnp.int32)


def last_valid(values: jax.Array, mask: jax.Array | None, otherwise: jax.Array) -> jax.Array:
    """The value at each row's last valid step; `otherwise` if it has none."""
    if values.shape[-1] == 0:
        return otherwise
    if mask is None:
        return values[..., -1]
    last = values.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], -1)
    found = jnp.take_along_axis(values, last[..., None], -1)[..., 0]
    return jnp.where(mask.any(-1), found, beside(otherwise, values))


def begins(
    segments: jax.Array, mask: jax.Array | None = None, last: jax.Array | None = None
) -> jax.Array:
    """True where a segment begins: at valid steps whose previous valid step has another segment.

    The segment before the first step is `last`, (...,); if it is `NONE`, the default, the first
    valid step begins no segment.
    """
    first = jnp.full(segments.shape[:-1], NONE, segments.dtype) if last is None else last
    first = beside(first, segments)
    before = jnp.concatenate([first[..., None], segments[..., :-1]], -1)
    if mask is not None:
        # The latest valid step before each, counted from 1; 0 is the step before the first.
        steps = jnp.where(mask, jnp.arange(1, mask.shape[-1] + 1, dtype=jnp.int32), 0)
        latest = jax.lax.cummax(steps, axis=mask.ndim - 1)
        latest = jnp.concatenate([jnp.zeros_like(latest[..., :1]), latest[..., :-1]], -1)
        known = jnp.concatenate([first[..., None], segments], -1)
        before = jnp.take_along_axis(known, latest, -1)
    new = (segments != before) & (before != NONE)
    return new if mask is None else new & mask


def check_segments(segments: Any, shape: tuple[int, ...]) -> jax.Array:
    """The segments as int32, after a check that each step of `shape` has one."""
    check_ints("segments", segments, "number the sequences that share a row", shape=shape)
    return jnp.asarray(segments).astype(jnp.int32)


def refuse_segments(segments: Any, why: str = "it mixes all steps of a row") -> None:
    """Raise if there are segments, in a layer that cannot keep them apart."""
    if segments is not None:
        raise LayerError("no segments", show(segments), f"give each sequence a row: {why}")
