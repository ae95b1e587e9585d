"""A net as a linear function of its parameters, around those that it has now."""

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
from diffprog.transforms.tap import is_output

__all__ = ["linearize"]


@factory
def linearize(layer: Any) -> Layer:
    """The first-order expansion in the parameters: ``y = f(origin) + J (params - origin)``.

    J is the Jacobian of the layer's output at `origin`, which is part of the state: the parameters
    that ``init`` gave, so that it begins as the layer itself. To expand around others, as those of
    a trained net, put copies of them there: ``state | {"origin": trained}``. In x it is as
    nonlinear as the layer. It costs three evaluations, its gradient as much as the layer's and two
    evaluations more.

    It keeps the kind and the names of what it wraps. The state that the layer returns, such as
    running statistics in training, is that at the origin. It does not stream.

    Shapes:
        x, y, params: those of the layer.
        state: that of the layer, and ``origin``, a tree like the parameters, if there are any.

    Args:
        layer: any layer through which forward mode gets.

    Raises:
        LayerError: at ``init``, if the layer's own state has the name ``origin``, or `ema` is in
            it, which goes around; at ``apply``, if there is no origin, or that of another net; at
            ``start``.

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
            raise LayerError("a layer without a state named origin", "one that has it",
                             "rename the child, or linearize once: twice is the same")
        if averages := idle(layer, plan.params):
            raise LayerError("a layer that computes with its parameters at rest",
                             f"one that averages {listed(averages)}",
                             "write ema(linearize(layer)): the average of its parameters moves "
                             "along the line")
        return dataclasses.replace(plan, state=_with(plan.params, plan.state))

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        params, state = layer.init(key, x, **side)
        copies = jax.tree.map(jnp.copy, params)  # donated buffers must be distinct
        return params, _with(copies, state)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        own = {name: value for name, value in state.items() if name != "origin"}
        origin = state.get("origin", {})
        if wrong := difference("origin", spec(params), spec(origin),
                               "put into the state the parameters around which to expand"):
            raise wrong
        moved = jax.tree.map(jnp.subtract, params, origin)

        def run(params: Params) -> tuple[Any, State]:
            return layer.apply(params, own, x, key=key, train=train, **side)

        (y, new), (slope, drift) = jax.jvp(run, (origin,), (moved,))
        return jax.tree.map(_sum, y, slope), _with(origin, _tapped(new, drift))

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        raise LayerError("the whole input at once", "a streaming call",
                         "apply it without start: its caches would have no derivative")

    return dataclasses.replace(
        layer, init=init, apply=apply, start=layer.start and start, planner=planner,
        computed=(Expanded(), *layer.computed), **computing(layer, linearize),
    )


def _with(origin: Params, state: State) -> State:
    """The state with the origin; what is empty is left out."""
    return {**state, "origin": origin} if origin else state


def _tapped(state: State, drift: Any) -> State:
    """The state at the origin, whose outputs that `tap` reads are on the line, as y is."""
    return {name: jax.tree.map(_sum, part, drift[name]) if is_output(name) else
            _tapped(part, drift[name]) if isinstance(part, dict) else part
            for name, part in state.items()}


def _sum(y: Any, slope: Any) -> Any:
    """An output and its change; integers do not change."""
    return y if slope.dtype == jax.dtypes.float0 else y + slope
