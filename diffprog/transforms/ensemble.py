"""Ensembles: one layer mapped over stacked parameters, with the outputs stacked."""

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

    Each copy has its own parameters, state and key. Parameters and state are stacked on a new first
    axis, and the copies run as one `jax.vmap`. A function behind the ensemble can reduce the
    outputs, to their mean or variance.

    Shapes:
        x: input of the layer; y: output of the layer with a leading axis n.
        params, state: those of the layer with a leading axis n.

    Args:
        n: number of copies; positive.
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
