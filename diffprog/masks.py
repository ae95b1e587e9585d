"""Masks say which entries are real: booleans over leading axes, True where real.

What mixes or averages entries clears the others first, so that what stands in the padding, even
NaN, reaches nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffprog.errors import LayerError
from diffprog.notation import show

NONE = -(2**31)  # no segment and no position is this, the least int32


def cleared(x: jax.Array, mask: jax.Array | None, *, reach: int | None = None) -> jax.Array:
    """x with zeros where the mask is False; x itself where there is no mask."""
    if mask is None:
        return x
    return jnp.where(widened(mask, x.shape, reach=reach), x, jnp.zeros_like(x))


def widened(
    mask: jax.Array, shape: tuple[int, ...], *, reach: int | None = None
) -> jax.Array:
    """The mask with an axis of size 1 for each axis of `shape` that it does not speak of.

    It may speak of the first `reach` axes: all but the last, the features, if None.
    """
    reach = len(shape) - 1 if reach is None else reach
    if not (hasattr(mask, "dtype") and mask.dtype == jnp.bool_):
        raise LayerError("a mask of booleans", show(mask),
                         "make it boolean: True marks what is real")
    if not 1 <= mask.ndim <= reach or mask.shape != shape[: mask.ndim]:
        raise LayerError(f"a mask of the leading axes of {shape}", show(mask),
                         "give it an entry for each position: who sees whom is attention_mask"
                         if mask.ndim > reach else "name mask in a program where the time axis "
                         "changes length, and pass on the new one")
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))


def over_steps(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """The mask with one entry for each vector of x, (..., time); None stays None."""
    if mask is None:
        return None
    return jnp.broadcast_to(widened(mask, x.shape)[..., 0], x.shape[:-1])


def counted(real: jax.Array, each: int = 1) -> jax.Array:
    """How many entries are real, each of the mask standing for so many.

    A float where int32 may not hold the number, which is never wrong by more than rounding.
    """
    kind = int if real.size * each < 2**31 else float
    number = real.sum(dtype=kind)
    return number if each == 1 else number * kind(each)


def real_before(mask: jax.Array) -> jax.Array:
    """How many real steps stand before each step."""
    return jnp.cumsum(mask, -1, dtype=jnp.int32) - mask
