"""A layer that sets masked entries to zero at the input of a net."""

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
    """Set masked entries to zero: ``y = where(mask, x, 0)``; ``y = x`` without a mask.

    As the first layer of a net it keeps NaN in the padding out of all gradients. A position-wise
    layer alone does not: its gradient multiplies the padding by zero, and zero times NaN is NaN.

    Shapes:
        x: any -> the same.
        mask: booleans with the leading axes of x, (batch,) or (batch, time); True = valid.

    Raises:
        LayerError: the mask is not boolean, or its shape is not that of the leading axes of x.

    Example:
        >>> dp.hide()({}, jnp.array([[1.0], [jnp.nan]]), mask=jnp.array([True, False])).tolist()
        [[1.0], [0.0]]
    """

    def forward(params: Any, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        check_array(x, floating=False)
        return cleared(x, mask, reach=x.ndim)

    return stateless(None, forward, name="hide")
