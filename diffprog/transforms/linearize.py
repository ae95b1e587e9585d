"""Linearization: the first-order Taylor expansion of a net in its parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.computed import Expanded
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer, computing
from diffprog.core.nets import idle
from diffprog.core.notation import listed
from diffprog.core.plans import Params, Plan, State, difference, spec
from diffprog.core.streams import without
from diffprog.transforms.tap import is_output

__all__ = ["linearize"]


@factory
def linearize(layer: Any) -> Layer:
    """The first-order expansion in the parameters: ``y = f(origin) + J (params - origin)``.

    J is the Jacobian of the output at `origin`, which is part of the state. The origin is the
    parameters from ``init``, so that the output is that of the layer at first. To expand around
    other parameters, such as those of a trained net, replace it by a copy of them: ``state |
    {"origin": trained}``. The net stays nonlinear in x. A call costs three evaluations of the
    layer, its gradient two evaluations more than the layer's.

    The kind and the names of the layer stay. The returned state, such as running statistics in
    training, is that at the origin. It does not stream.

    Shapes:
        x, y, params: those of the layer.
        state: that of the layer and, if it has parameters, ``origin``, a tree like them.

    Args:
        layer: any layer that forward-mode differentiation supports.

    Raises:
        LayerError: at ``init``, if the layer's state has an entry ``origin``, or if it contains
            `ema`, which must be outside; at ``apply``, for a missing origin or that of another net;
            at ``start``.

    Example:
        >>> net, x = dp.linear(4) >> jnp.sin >> dp.linear(1), jnp.ones((2, 3))
        >>> expanded = dp.linearize(net)
        >>> params, state = expanded.init(jax.random.key(0), x)
        >>> twice = jax.tree.map(lambda p: 2 * p, params)
        >>> slope = jax.jvp(lambda p: net(p, x), (params,), (params,))[1]
        >>> bool(jnp.allclose(expanded(twice, x, state=state), net(params, x) + slope))
        True

    Source: Lee et al. 2019, arXiv:1902.06720, equation 5.
    """
    layer = as_layer(layer)

    def planner(x: Any, side: dict[str, Any]) -> Plan:
        plan = layer.plan(x, **side)
        if "origin" in plan.state:
            raise LayerError("a layer without origin in its state", listed(plan.state),
                             "rename the child, or linearize only once: twice is the same")
        if averages := idle(layer, plan.params):
            raise LayerError("a layer that uses its parameters in inference",
                             f"one that averages {listed(averages)}",
                             "write ema(linearize(layer)): average outside")
        return dataclasses.replace(plan, state=_with_origin(plan.params, plan.state))

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        params, state = layer.init(key, x, **side)
        origin = jax.tree.map(jnp.copy, params)  # donated buffers must be distinct
        return params, _with_origin(origin, state)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        own = without(state, ("origin",))
        origin = state.get("origin", {})
        if wrong := difference("origin", spec(params), spec(origin),
                               "put the parameters to expand around into the state"):
            raise wrong
        step = jax.tree.map(jnp.subtract, params, origin)

        def run(params: Params) -> tuple[Any, State]:
            return layer.apply(params, own, x, key=key, train=train, **side)

        (y, new), (y_dot, new_dot) = jax.jvp(run, (origin,), (step,))
        return jax.tree.map(_sum, y, y_dot), _with_origin(origin, _with_taps(new, new_dot))

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        raise LayerError("the whole input at once", "a streaming call",
                         "call it without start: its caches would have no derivative")

    return dataclasses.replace(
        layer, init=init, apply=apply, start=layer.start and start, planner=planner,
        computed=(Expanded(), *layer.computed), **computing(layer, linearize),
    )


def _with_origin(origin: Params, state: State) -> State:
    """The state with the origin, unless there are no parameters."""
    return {**state, "origin": origin} if origin else state


def _with_taps(state: State, tangent: Any) -> State:
    """The state at the origin, but with the outputs for `tap` expanded as y is."""
    new = {}
    for name, part in state.items():
        if is_output(name):
            new[name] = jax.tree.map(_sum, part, tangent[name])
        elif isinstance(part, dict):
            new[name] = _with_taps(part, tangent[name])
        else:
            new[name] = part
    return new


def _sum(y: Any, tangent: Any) -> Any:
    """``y + tangent``; integers have no tangent."""
    return y if tangent.dtype == jax.dtypes.float0 else y + tangent
