"""Width by copies: one layer mapped over stacked parameters, on the same input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.errors import check_array, check_count
from diffprog.layer import Layer, Params, Plan, State, as_layer, factory, rebuilt, remember
from diffprog.transforms.stacking import init_copies, key_of_copy, stacked

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
    """
    check_count("n", n)
    layer = as_layer(layer)

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        one = layer.plan(x, **side)
        check_array(one.y, rank=1, floating=False)
        y = jax.eval_shape(joined, stacked(n, one.y))
        return Plan(stacked(n, one.params), stacked(n, one.state), y, one.calls)

    def joined(y: Any) -> jax.Array:
        y = jnp.moveaxis(y, 0, -2)
        return y.reshape(*y.shape[:-2], -1)

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        return init_copies(n, layer, key, x, side)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        def one(params: Params, state: State, i: Any) -> tuple[Any, State]:
            return layer.apply(params, state, x, key=key_of_copy(key, i), train=train, **side)

        counts = jnp.arange(n) if layer.random else None
        y, state = jax.vmap(one, axis_size=n)(params, state, counts)
        return joined(y), state

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        one = lambda p, s: begin(p, s, x, length=length, **side)  # noqa: E731
        return jax.vmap(one, axis_size=n)(params, state)

    begin: Any = layer.start
    return Layer(
        init, apply, begin and start, layer.children,
        lambda children: heads(n, rebuilt(layer, children)), name="heads",
        bare=layer.bare, random=layer.random, side=layer.side, planner=planner,
    )
