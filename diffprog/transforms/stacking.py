"""Copies of a layer: their parameters and state are stacked on a new first axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.layer import Layer, around
from diffprog.core.plans import Params, Plan, State, remember


def stacked(n: int, tree: Any) -> Any:
    """The shapes of n copies of a tree."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), tree)


def init_copies(n: int, layer: Layer, key: jax.Array, x: Any, side: Any) -> tuple[Params, State]:
    """Parameters and state of n copies; copy i is initialized from ``fold_in(key, i)``."""
    return jax.vmap(lambda i: layer.init(jax.random.fold_in(key, i), x, **side))(jnp.arange(n))


def key_of_copy(key: jax.Array | None, i: Any) -> jax.Array | None:
    """The key of copy i; None if there is no key, or the copies are not random."""
    return None if key is None or i is None else jax.random.fold_in(key, i)


def side_by_side(
    n: int, layer: Layer, join: Callable[[Any], Any],
    again: Callable[[Layer], Layer],
) -> Layer:
    """n copies on the same input as one `jax.vmap`, ``join`` applied to the stacked outputs."""

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        one = layer.plan(x, **side)
        y = jax.eval_shape(join, stacked(n, one.y))
        return Plan(stacked(n, one.params), stacked(n, one.state), y, one.calls)

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        return init_copies(n, layer, key, x, side)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        def one(params: Params, state: State, i: Any) -> tuple[Any, State]:
            return layer.apply(params, state, x, key=key_of_copy(key, i), train=train, **side)

        numbers = jnp.arange(n) if layer.random else None
        y, state = jax.vmap(one, axis_size=n)(params, state, numbers)
        return join(y), state

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        def one(params: Params, state: State) -> State:
            return layer.start(params, state, x, length=length, **side)

        return jax.vmap(one, axis_size=n)(params, state)

    return Layer(
        init, apply, layer.start and start, layer.children,
        **around(layer, again, times=n, order="width"), bare=layer.bare,
        random=layer.random, side=layer.side, kept=layer.kept, planner=planner,
        computed=layer.computed, stacks=layer.stacks + 1,
    )
