"""A mask at the entrance of a net: what is no real entry is cleared before anything sees it."""

from __future__ import annotations

from typing import Any

import jax

from diffprog.core.arguments import check_array
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, stateless
from diffprog.core.masks import cleared

__all__ = ["hide"]


@factory
def hide() -> Layer:
    """Zero what is no real entry: ``y = where(mask, x, 0)``; x itself without a mask.

    At the entrance of a net it keeps even NaN out of all gradients: a later layer that works
    position by position multiplies the padding by zero, and zero times NaN is NaN.

    Shapes:
        x: any -> the same. mask: booleans of the leading axes of x, (batch,) or (batch, time).

    Raises:
        LayerError: the mask holds no booleans, or has not the shape of the leading axes of x.

    Example:
        >>> dp.hide()({}, jnp.array([[1.0], [jnp.nan]]), mask=jnp.array([True, False])).tolist()
        [[1.0], [0.0]]
    """

    def forward(params: Any, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        check_array(x, floating=False)
        return cleared(x, mask, reach=x.ndim)

    return stateless(None, forward, name="hide")
