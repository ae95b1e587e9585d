"""Memory for time: activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

import jax

from diffprog.layer import Layer, Params, State, as_layer, factory, rebuilt

__all__ = ["remat"]


@factory
def remat(layer: Any) -> Layer:
    """The same layer, whose activations are recomputed for the gradient: ``y = f(x)``.

    It keeps the kind and the names of what it wraps, so adding it renames no parameter.

    Args:
        layer: any layer.

    Example:
        >>> net = dp.repeat(12, dp.remat(dp.residual(dp.linear(4))))
        >>> net.plan(jnp.ones((2, 4))).y.shape
        (2, 4)

    Source: Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174.
    """
    layer = as_layer(layer)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        def run(params: Params, state: State, x: Any, key: Any, side: dict[str, Any]) -> Any:
            return layer.apply(params, state, x, key=key, train=train, **side)

        return jax.checkpoint(run)(params, state, x, key, side)

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        return begin(params, state, x, length=length, **side)

    begin: Any = layer.start
    return Layer(
        layer.init, apply, begin and start, layer.children,
        lambda children: remat(rebuilt(layer, children)), name=layer.name,
        bare=layer.bare, random=layer.random, side=layer.side,
        planner=lambda x, side: layer.plan(x, **side),
    )
