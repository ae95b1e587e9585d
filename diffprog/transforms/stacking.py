"""Copies of a layer share one tree, whose leaves are stacked on a new first axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.layer import Layer, Params, State


def stacked(n: int, tree: Any) -> Any:
    """The shapes of n copies of a tree."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), tree)


def init_copies(n: int, layer: Layer, key: jax.Array, x: Any, side: Any) -> tuple[Params, State]:
    """Initialize n copies; the i-th as `layer` alone does from ``fold_in(key, i)``."""
    return jax.vmap(lambda i: layer.init(jax.random.fold_in(key, i), x, **side))(jnp.arange(n))


def key_of_copy(key: jax.Array | None, i: Any) -> jax.Array | None:
    """The key of the i-th copy; None where there is no key, or no copy is random."""
    return None if key is None or i is None else jax.random.fold_in(key, i)
