"""Mixed precision: compute in a narrow dtype, keep parameters and statistics in a wide one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.dtypes import cast, is_float, joint
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, Wraps, as_layer
from diffprog.core.notation import code
from diffprog.core.plans import Params, Plan, State, remember

__all__ = ["mixed"]


@factory
def mixed(layer: Any, dtype: Any) -> Layer:
    """The same layer, computed in `dtype`: ``y = f(cast(params), cast(x))``, cast back.

    Floating-point inputs, side inputs too, are cast to `dtype`; floating-point outputs come back in
    the dtype that x had (float32 if x holds integers alone). Parameters are stored as they were, so
    the optimizer adds small updates to float32; running statistics keep their dtype; caches of a
    stream are made in `dtype`. It keeps the kind and the names of what it wraps. Inside another
    `mixed` it keeps its own dtype.

    The layers of the library are handed parameters as they are stored and cast them where they use
    them: an embedding after it was looked up, a bias after it was spread over the entries. So the
    gradient of what is used many times is summed in float32; bfloat16 would count no further than
    256. That of a kernel is one product for each call, which is rounded once.

    A layer of your own is handed parameters in `dtype`, and ``layers.x.params`` gives such. Its
    gradients are rounded once for each call, and each sum inside of it is in `dtype`. Where it
    broadcasts a parameter, let it say ``casts=True`` and cast behind that itself::

        def forward(params, x):
            return x * jnp.broadcast_to(params["scale"], x.shape).astype(x.dtype)

        scaling = dp.stateless(init, forward, casts=True)

    float16 underflows and overflows where bfloat16 does not: scale the loss there.

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
    inner = _narrowed(layer, dtype)

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        stored = layer.plan(x, **side)
        narrow, beside = jax.eval_shape(lambda inputs: cast(inputs, dtype), (x, side))
        computed = inner.plan(narrow, **beside)
        y = jax.eval_shape(lambda y: cast(y, _dtype_of(x)), computed.y)
        return Plan(stored.params, stored.state, y, computed.calls)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        inputs, side = cast((x, side), dtype)
        y, new = inner.apply(params, state, inputs, key=key, train=train, **side)
        new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
        return cast(y, _dtype_of(x)), new

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        x, side = cast((x, side), dtype)
        return inner.start(params, state, x, length=length, **side)

    return dataclasses.replace(
        layer, apply=apply, start=layer.start and start, planner=planner,
        rebuild=lambda children: mixed(layer.rebuilt(children), dtype),
        within=lambda f: mixed(layer, dtype),  # in another `mixed` it keeps to its own dtype
        wraps=Wraps(layer, dtype=dtype),
    )


def _narrowed(layer: Layer, dtype: Any) -> Layer:
    """The layer, given parameters as they are stored, whose leaves compute in `dtype`."""
    if layer.within:
        made = layer.within(lambda part: _narrowed(part, dtype))
    elif layer.bare and not layer.casts:
        made = layer  # a function, or what has nothing to cast
    else:
        made = _leaf(layer, dtype)
    again = made.rebuild
    return dataclasses.replace(made, dtype=dtype, rebuild=again and (
        lambda children: dataclasses.replace(again(children), dtype=dtype)))


def _leaf(layer: Layer, dtype: Any) -> Layer:
    """A layer that is handed its parameters in `dtype`; one that casts them itself, as they are.

    What such a one makes of integers, as `embedding` does, is cast behind it.
    """

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        own = params if layer.casts else cast(params, dtype)
        y, new = layer.apply(own, state, x, key=key, train=train, **side)
        return cast(y, dtype) if layer.casts else y, new

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        own = params if layer.casts else cast(params, dtype)
        return layer.start(own, state, x, length=length, **side)

    again = layer.rebuild
    return dataclasses.replace(
        layer, apply=apply, start=layer.start and start, planner=None,
        rebuild=again and (lambda children: _leaf(again(children), dtype)))


def _floating(dtype: Any) -> bool:
    try:
        return dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _dtype_of(x: Any) -> Any:
    """The dtype of the floats in x; float32 if there are none."""
    floats = [leaf.dtype for leaf in jax.tree.leaves(x) if is_float(leaf)]
    return joint(*floats) if floats else jnp.dtype(jnp.float32)
