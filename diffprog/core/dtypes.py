"""Dtypes: float32 parameters are cast to 16 bits where they are used, not before.

A cotangent has the dtype of its primal, and is summed in it. If a bias is cast first and then added
to 4096 entries, its gradient is summed in 16 bits, and bfloat16 counts only to 256. So a parameter
is cast after it is gathered or broadcast to the entries that use it, and values that all steps of a
loop read are cast inside the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.errors import LayerError
from diffprog.core.notation import show


def is_float(leaf: Any) -> bool:
    """Is it an array of floats?"""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_int(leaf: Any) -> bool:
    """Is it an array of integers? Booleans are none."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.integer)


def is_inexact(leaf: Any) -> bool:
    """Is it an array of floats or of complex numbers?"""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_key(leaf: Any) -> bool:
    """Is it an array of typed keys, as `jax.random.key` makes them?"""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_short(leaf: Any) -> bool:
    """Is it an array of floats of 16 bits or fewer?"""
    return is_float(leaf) and jnp.finfo(leaf.dtype).bits < 32


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floats cast to `dtype`; unchanged if that is None."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """JAX's default promotion of shapes and dtypes, for the code of other libraries."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def joint(*given: Any) -> Any:
    """The common dtype of arrays or dtypes, whatever promotion the user allows."""
    with standard_promotion():
        return jnp.result_type(*given)


def float_dtype(tree: Any) -> Any:
    """The common dtype of the floats in a tree; None if it has none."""
    floats = [leaf.dtype for leaf in jax.tree.leaves(tree) if is_float(leaf)]
    return joint(*floats) if floats else None


def wide_dtype(x: Any) -> Any:
    """The dtype of reductions, parameters and statistics for input x: float32, or its own if wider.
    """
    return joint(x.dtype, jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """x in float32, or in its own dtype if that is wider."""
    x = jnp.asarray(x)  # NumPy's float64 is float32 in JAX
    return x.astype(wide_dtype(x))


def norm(arrays: Iterable[Any]) -> jax.Array:
    """The Euclidean norm of all entries, in float32 or wider, over the range of that dtype.

    Entries are divided by the largest first: the squares of 1e-30 and of 1e30 leave float32.
    """
    sizes = [wide(jnp.abs(a)) for a in arrays]
    most = jnp.stack([jnp.zeros(()), *(a.max(initial=0) for a in sizes)]).max()
    scale = jnp.where((most > 0) & jnp.isfinite(most), most, 1)
    return scale * jnp.sqrt(sum((jnp.square(a / scale).sum() for a in sizes), jnp.zeros(())))


def along(leaf: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter in the dtype and rank of x, as in ``x + along(b, x)``.

    For x in 16 bits it is broadcast to the shape of x first: its gradient is summed in float32.
    """
    if not is_short(x):
        return jax.lax.broadcast_to_rank(leaf.astype(x.dtype), x.ndim)
    wide = joint(leaf.dtype, jnp.float32)
    spread = jnp.broadcast_to(leaf.astype(wide), x.shape)
    # Under `jax.vmap`, an unmapped parameter is broadcast only where it meets mapped values, after
    # the cast. XLA removes this select before it compiles, but it makes the parameter depend on x.
    spread = jax.lax.select(np.True_, spread, jax.lax.stop_gradient(x).astype(wide))
    return spread.astype(x.dtype)


def check_chunk(kept: Any, x: Any) -> None:
    """Raise for a chunk of a stream with a wider dtype than the past steps that the state keeps."""
    if joint(kept.dtype, x.dtype) != kept.dtype:
        raise LayerError(f"a chunk in {kept.dtype}, as start saw", show(x),
                         "start again for another dtype: the chunk would be rounded")


def outside(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Values that all steps of a loop read, in float32, and the function that narrows them inside.

    So the cotangents of the steps are summed in float32.
    """
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if is_short(a) else a, tree)

    def inside(wide: Any) -> Any:
        return jax.tree.map(lambda a, own: a.astype(own.dtype) if is_short(own) else a, wide, tree)

    return wide, inside
