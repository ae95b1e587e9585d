"""Penalties: functions of the parameters alone, which `penalized` adds to a loss.

Weight decay belongs to the optimizer (`optax.adamw`, with `tree.mask`); a penalty is for terms that
have no such form, or that should show among the metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import is_number
from diffprog.core.dtypes import wide
from diffprog.core.errors import LayerError
from diffprog.core.notation import show
from diffprog.core.paths import select
from diffprog.core.plans import Params
from diffprog.losses.values import magnitude

__all__ = ["l1", "l2"]


def l1(params: Params, *patterns: str) -> jax.Array:
    """``sum |w|`` over the leaves that match the patterns, in float32 or wider; gradient 0 at 0.

    Args:
        params: parameters of a net, taken as they are; for a net with computed parameters pass the
            result of `merge`.
        patterns: of paths, as in `tree.select`; all kernels if there are none.

    Raises:
        LayerError: a pattern matches nothing.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([9.0])}
        >>> float(dp.losses.l1(params))
        7.0
    """
    return _sum(magnitude, params, patterns)


def l2(params: Params, *patterns: str) -> jax.Array:
    """``sum w**2`` over the leaves that match the patterns, in float32 or wider; no factor 1/2.

    The gradient of ``rate * l2(params)`` is ``2 * rate * w``.

    Args:
        params, patterns: as in `l1`.

    Raises:
        LayerError: as `l1` does.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([9.0])}
        >>> float(dp.losses.l2(params)), float(dp.losses.l2(params, "**"))
        (25.0, 106.0)
    """
    return _sum(jnp.square, params, patterns)


def _sum(f: Callable[[jax.Array], jax.Array], params: Params, patterns: tuple[str, ...]) -> Any:
    if is_number(params):
        raise LayerError("params of a net", show(params),
                         "write lambda params: rate * dp.losses.l2(params) for a penalty with a "
                         "rate")
    leaves = select(params, *(patterns or ("**/kernel",))).values()
    return sum(f(wide(w)).sum() for w in leaves)
