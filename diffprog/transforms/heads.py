"""Width by copies: one layer mapped over stacked parameters, the results joined."""

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
    """Join n copies of a layer on the same input: ``y = concatenate(f_1(x), ..., f_n(x))``.

    The copies have their own parameters, stacked on a new first axis, and run as one `jax.vmap`.

    Shapes:
        x: what the layer takes; y: (..., n * F) where the layer gives (..., F).
        params, state: the layer's, with a leading axis n.

    Args:
        n: how many copies; positive.
        layer: a layer that gives one array.

    Raises:
        LayerError: at ``init``, if the layer gives something else than one array with an axis.

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
        y = jnp.moveaxis(y, 0, -2)
        return y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])

    return side_by_side(n, layer, join, lambda layer: heads(n, layer))
