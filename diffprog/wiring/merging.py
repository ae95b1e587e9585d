"""Plain functions that merge the arrays of `branch` and `parallel` to one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array
from diffprog.core.errors import LayerError
from diffprog.core.notation import show

__all__ = ["add", "concatenate"]


def concatenate(xs: Any) -> jax.Array:
    """Concatenate arrays along their last axis: ``y = [x_1, ..., x_n]``.

    Example:
        >>> dp.concatenate((jnp.ones((2, 3)), jnp.ones((2, 1)))).shape
        (2, 4)
    """
    return jnp.concatenate(_alike(xs, slice(-1), "except on the last axis"), axis=-1)


def add(xs: Any) -> jax.Array:
    """The sum of arrays of equal shape, without broadcasting: ``y = x_1 + ... + x_n``.

    Example:
        >>> dp.add((jnp.ones(2), jnp.ones(2))).tolist()
        [2.0, 2.0]
    """
    first, *rest = _alike(xs, slice(None), "throughout")
    for x in rest:
        first = first + x
    return first


def _alike(xs: Any, part: slice, where: str) -> Any:
    if not isinstance(xs, (tuple, list)) or not xs:
        raise LayerError("a tuple of arrays", show(xs), "put branch or parallel before it")
    for x in xs:
        check_array(x, rank=1, floating=False)
        if x.shape[part] != xs[0].shape[part] or x.ndim != xs[0].ndim:
            raise LayerError(f"arrays of equal shape {where}", show(xs), "bring them to one shape")
    return xs
