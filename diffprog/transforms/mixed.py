"""Mixed precision: compute in a narrow dtype, keep parameters and statistics in a wide one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.errors import LayerError
from diffprog.factories import factory, rebuilt
from diffprog.layer import Layer, as_layer
from diffprog.notation import code
from diffprog.plans import Params, Plan, State, remember

__all__ = ["mixed"]


@factory
def mixed(layer: Any, dtype: Any) -> Layer:
    """The same layer, computed in `dtype`: ``y = f(cast(params), cast(x))``, cast back.

    Parameters and floating-point inputs, side inputs too, are cast to `dtype`; floating-point
    outputs come back in the dtype that x had (float32 if x holds integers alone). Parameters are
    stored as they were, so the optimizer adds small updates to float32; running statistics keep
    their dtype; caches of a stream are made in `dtype`. It keeps the kind and the names of what it
    wraps.

    float16 underflows where bfloat16 does not: scale the loss there.

    Args:
        layer: any layer.
        dtype: a floating-point dtype, mostly `jnp.bfloat16`.

    Raises:
        LayerError: at composition, if `dtype` is no floating-point dtype.

    Example:
        >>> net = dp.mixed(dp.linear(3), jnp.bfloat16)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> params["kernel"].dtype, net(params, jnp.ones((2, 4))).dtype
        (dtype('float32'), dtype('float32'))

    Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.1.
    """
    layer = as_layer(layer)
    if not _floating(dtype):
        raise LayerError("a floating-point dtype", code(dtype), "pass jnp.bfloat16, for example")

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        stored = layer.plan(x, **side)
        narrow, beside = jax.eval_shape(lambda inputs: cast(inputs, dtype), (x, side))
        computed = layer.plan(narrow, **beside)
        y = jax.eval_shape(lambda y: cast(y, _dtype_of(x)), computed.y)
        return Plan(stored.params, stored.state, y, computed.calls)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        params, inputs, side = cast((params, x, side), dtype)
        y, new = layer.apply(params, state, inputs, key=key, train=train, **side)
        new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
        return cast(y, _dtype_of(x)), new

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        params, x, side = cast((params, x, side), dtype)
        return layer.start(params, state, x, length=length, **side)

    return dataclasses.replace(
        layer, apply=apply, start=layer.start and start, planner=planner,
        rebuild=lambda children: mixed(rebuilt(layer, children), dtype),
    )


def _floating(dtype: Any) -> bool:
    try:
        return dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floats in `dtype`; as it is if that is None."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if _is_float(leaf) else leaf, tree)


def _dtype_of(x: Any) -> Any:
    """The dtype of the floats in x; float32 if there are none."""
    floats = [leaf.dtype for leaf in jax.tree.leaves(x) if _is_float(leaf)]
    return jnp.result_type(*floats) if floats else jnp.dtype(jnp.float32)
