"""Several opinions: one layer mapped over stacked parameters, the results side by side."""

from __future__ import annotations

from typing import Any

from diffprog.core.arguments import check_copies
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.transforms.stacking import side_by_side

__all__ = ["ensemble"]


@factory
def ensemble(n: int, layer: Any) -> Layer:
    """Run n copies of a layer on the same input: ``y = stack(f_1(x), ..., f_n(x))``.

    The copies have their own parameters, state and keys, stacked on a new first axis, and run as
    one `jax.vmap`. A function after it makes one result of theirs: their mean, their variance.

    Shapes:
        x: what the layer takes; y: what the layer gives, with a leading axis n.
        params, state: the layer's, with a leading axis n.

    Args:
        n: how many copies; positive.
        layer: any layer.

    Example:
        >>> net = dp.ensemble(5, dp.linear(3)) >> (lambda y: y.mean(0))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> params["ensemble_0"]["kernel"].shape, net(params, jnp.ones((2, 4))).shape
        ((5, 4, 3), (2, 3))

    Source: Lakshminarayanan, Pritzel, Blundell 2017, arXiv:1612.01474, section 2.4.
    """
    check_copies(n)
    layer = as_layer(layer)
    return side_by_side(n, layer, lambda y: y, lambda layer: ensemble(n, layer))
