"""Dtypes: what is stored wide and computed in 16 bits is cast where it is used, not before.

A cotangent has the dtype of what it belongs to, and is summed in it. A bias that is cast first and
then added to 4096 entries has a gradient summed in 16 bits, and bfloat16 counts no further than
256. So a parameter is cast after it was gathered, or spread over the entries that use it, and what
all steps of a loop read is cast inside the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.errors import LayerError
from diffprog.core.notation import show


def is_float(leaf: Any) -> bool:
    """Is it an array of floats?"""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_short(leaf: Any) -> bool:
    """Is it an array of floats of 16 bits or fewer?"""
    return is_float(leaf) and jnp.finfo(leaf.dtype).bits < 32


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floats in `dtype`; as it is if that is None."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Shapes and dtypes are joined as JAX does by default: for the code of other libraries."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def joint(*given: Any) -> Any:
    """The dtype that holds all of these, arrays or dtypes, whatever promotion the user allows."""
    with standard_promotion():
        return jnp.result_type(*given)


def along(leaf: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter in dtype and rank of x, for arithmetic with all its entries: ``x + along(b, x)``.

    For x in 16 bits it has the shape of x, so that its gradient is summed in float32.
    """
    if not is_short(x):
        return jax.lax.broadcast_to_rank(leaf.astype(x.dtype), x.ndim)
    wide = joint(leaf.dtype, jnp.float32)
    spread = jnp.broadcast_to(leaf.astype(wide), x.shape)
    # `jax.vmap` spreads what does not depend on the examples only where it meets them, after the
    # cast. This choice is one that XLA makes before it compiles; but it depends on x.
    spread = jax.lax.select(np.True_, spread, jax.lax.stop_gradient(x).astype(wide))
    return spread.astype(x.dtype)


def check_chunk(kept: Any, x: Any) -> None:
    """Raise for a chunk of a stream whose dtype is wider than that of what is kept of the past."""
    if joint(kept.dtype, x.dtype) != kept.dtype:
        raise LayerError(f"a chunk in {kept.dtype}, as start saw", show(x),
                         "start anew for another dtype: it would be rounded")


def outside(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What all steps of a loop read: in float32 for outside of it, and what narrows it inside.

    The cotangents of all steps are summed outside.
    """
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if is_short(a) else a, tree)

    def inside(wide: Any) -> Any:
        return jax.tree.map(lambda a, own: a.astype(own.dtype) if is_short(own) else a, wide, tree)

    return wide, inside
