"""Mixed precision: computation in a narrow dtype, parameters and statistics in a wide one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.dtypes import cast, float_dtype
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, Wraps, as_layer
from diffprog.core.notation import code
from diffprog.core.plans import Params, Plan, State, remember

__all__ = ["mixed"]


@factory
def mixed(layer: Any, dtype: Any) -> Layer:
    """Compute a layer in another dtype: ``y = f(cast(params), cast(x))``, cast back.

    Floating-point inputs and side inputs are cast to `dtype`. Floating-point outputs are cast back
    to the dtype of x, to float32 if x holds only integers. The stored parameters keep their dtype,
    so that the optimizer adds small updates in float32. Running statistics keep theirs too; caches
    of a stream are in `dtype`. The kind and the names of the layer stay. A `mixed` inside another
    keeps its own dtype.

    The layers of the library get the stored parameters and cast them where they use them: an
    embedding after the lookup, a bias after the broadcast. So the gradient of a parameter that is
    used many times is summed in float32; in bfloat16 a sum of ones would stop at 256. The gradient
    of a kernel is one product per call, rounded once.

    A layer of your own gets parameters in `dtype`, and so does ``layers.x.params`` in a program.
    Its gradients are rounded once per call, and sums inside it are in `dtype`. If it broadcasts a
    parameter, pass ``casts=True`` and cast after the broadcast::

        def forward(params, x):
            return x * jnp.broadcast_to(params["scale"], x.shape).astype(x.dtype)

        scaling = dp.stateless(init, forward, casts=True)

    float16 has a smaller range than bfloat16: with it, scale the loss by ``loss_scale`` of
    `make_step`.

    Args:
        layer: any layer.
        dtype: a floating-point dtype, usually `jnp.bfloat16`.

    Raises:
        LayerError: at composition, if `dtype` is not a floating-point dtype.

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
        narrow_x, narrow_side = jax.eval_shape(lambda inputs: cast(inputs, dtype), (x, side))
        computed = inner.plan(narrow_x, **narrow_side)
        y = jax.eval_shape(lambda y: cast(y, float_dtype(x) or jnp.float32), computed.y)
        return Plan(stored.params, stored.state, y, computed.calls)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        narrow_x, side = cast((x, side), dtype)
        y, new = inner.apply(params, state, narrow_x, key=key, train=train, **side)
        new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)
        return cast(y, float_dtype(x) or jnp.float32), new

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        x, side = cast((x, side), dtype)
        return inner.start(params, state, x, length=length, **side)

    return dataclasses.replace(
        layer, apply=apply, start=layer.start and start, planner=planner,
        rebuild=lambda children: mixed(layer.rebuilt(children), dtype),
        within=lambda f: mixed(f(layer), dtype),
        wraps=Wraps(layer, dtype=dtype),
    )


def _narrowed(layer: Layer, dtype: Any) -> Layer:
    """The layer on stored parameters, with every layer in it computed in `dtype`."""
    if layer.wraps and layer.wraps.dtype is not None:
        narrowed = layer  # an inner `mixed` keeps its own dtype
    elif layer.within:
        narrowed = layer.within(lambda part: _narrowed(part, dtype))
    elif layer.bare and not layer.casts:
        narrowed = layer  # nothing to cast
    else:
        narrowed = _narrowed_leaf(layer, dtype)
    again = narrowed.rebuild
    rebuild = again and (lambda children: dataclasses.replace(again(children), dtype=dtype))
    return dataclasses.replace(narrowed, dtype=dtype, rebuild=rebuild)


def _narrowed_leaf(layer: Layer, dtype: Any) -> Layer:
    """The layer with its parameters cast to `dtype`, unless it casts them itself.

    In the latter case its output is cast, which may be float32 for integer input, as that of
    `embedding`.
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
    rebuild = again and (lambda children: _narrowed_leaf(again(children), dtype))
    return dataclasses.replace(
        layer, apply=apply, start=layer.start and start, planner=None, rebuild=again and rebuild)


def _floating(dtype: Any) -> bool:
    try:
        return dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False
