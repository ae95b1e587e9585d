"""Heads: one layer mapped over stacked parameters, with the outputs concatenated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_copies
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.transforms.stacking import side_by_side

__all__ = ["heads"]


@factory
def heads(n: int, layer: Any) -> Layer:
    """Concatenate n copies of a layer on the same input: ``y = concatenate(f_1(x), ..., f_n(x))``.

    Each copy has its own parameters, stacked on a new first axis, and they run as one `jax.vmap`.

    Shapes:
        x: input of the layer; y: (..., n * F) if the output of the layer is (..., F).
        params, state: those of the layer with a leading axis n.

    Args:
        n: number of copies; positive.
        layer: a layer that returns one array.

    Raises:
        LayerError: at ``init``, if the layer does not return one array of at least one axis.

    Example:
        >>> net = dp.heads(4, dp.linear(5))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> params["kernel"].shape, net(params, jnp.ones((2, 3))).shape
        ((4, 3, 5), (2, 20))

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2.
    """
    check_copies(n)
    layer = as_layer(layer)

    def join(y: Any) -> jax.Array:
        one = jax.eval_shape(lambda y: jax.tree.map(lambda a: a[0], y), y)
        check_array(one, rank=1, floating=False)
        y = jnp.moveaxis(y, 0, -2)                                       # (..., n, F)
        return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])       # (..., n * F)

    return side_by_side(n, layer, join, lambda layer: heads(n, layer))
