"""Depth by `jax.lax.scan`: one layer scanned over stacked parameters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_copies, check_count
from diffprog.core.dtypes import outside
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, around, as_layer
from diffprog.core.loops import convolves, once, scan
from diffprog.core.meshes import beside, settled
from diffprog.core.notation import show
from diffprog.core.plans import Params, Plan, State, remember, spec
from diffprog.transforms.remat import Policy
from diffprog.transforms.remat import remat as recomputed
from diffprog.transforms.stacking import init_copies, key_of_copy, stacked

__all__ = ["repeat"]


@factory
def repeat(
    n: int, layer: Any, *, unroll: int = 1, remat: bool | Policy = False
) -> Layer:
    """Apply a layer n times, each time with its own parameters: ``y = f_n(... f_2(f_1(x)))``.

    The parameters of the n copies are stacked on a new first axis and `jax.lax.scan` runs over
    them, so that the time to trace and compile does not grow with n. On CPU a layer with a
    convolution is unrolled, because XLA's gradient of a convolution inside a loop is tens of times
    slower there.

    Shapes:
        x, y: any input whose shapes and dtypes the layer keeps.
        params, state: those of the layer with a leading axis n.

    Args:
        n: number of copies; positive.
        layer: a layer whose output has the shapes and dtypes of its input.
        unroll: copies per iteration of the loop; n removes the loop.
        remat: True, or a policy of `remat`, to recompute the activations of each copy in the
            backward pass; the same as ``repeat(n, remat(layer))``.

    Raises:
        LayerError: at ``init``, if the layer does not keep shapes and dtypes.

    Example:
        >>> net = dp.repeat(12, dp.residual(dp.linear(4)))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> params["body"]["kernel"].shape
        (12, 4, 4)
    """
    check_copies(n)
    check_count("unroll", unroll)
    layer = body = as_layer(layer)
    if remat:
        body = recomputed(layer) if remat is True else recomputed(layer, policy=remat)
    net = _Repeat(n, layer, body, unroll)
    return Layer(
        net.init, once(net.apply, "train"), layer.start and once(net.start, "length"),
        layer.children,
        **around(layer, lambda layer: repeat(n, layer, unroll=unroll, remat=remat),
                 times=n, order="depth"),
        name="repeat",
        bare=layer.bare, random=layer.random, side=layer.side, kept=layer.kept, planner=net.plan,
        computed=layer.computed, stacks=layer.stacks + 1,
    )


class _Repeat:
    """The functions of the layer `repeat`: plan, init, apply and start."""

    def __init__(self, n: int, layer: Layer, body: Layer, unroll: int) -> None:
        self.n, self.layer, self.unroll = n, layer, unroll
        self.body = body  # the layer, or its `remat`
        self.plan = remember(self._plan)  # (x, side) -> Plan
        # One function for each mode, because `remember` takes arrays only.
        self.convolves = {train: remember(functools.partial(self._convolves, train))
                          for train in (False, True)}

    def _plan(self, x: Any, side: dict[str, Any]) -> Plan:
        one = self.layer.plan(x, **side)
        if spec(one.y) != spec(x):
            raise LayerError(f"a layer that keeps the shape and dtype of x, {show(x)}",
                             show(one.y), "let its output have the shape and dtype of its input")
        return Plan(stacked(self.n, one.params), stacked(self.n, one.state), one.y, one.calls)

    def init(self, key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        return init_copies(self.n, self.layer, key, x, side)

    def apply(self, params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        shared, inside = outside(side)  # in float32, for the sum of cotangents of all copies
        key = key if self.layer.random else None

        def step(carry: tuple[Any, State], copy: Any) -> tuple[tuple[Any, State], None]:
            (x, states), (i, own_params) = carry, copy
            own_state = jax.tree.map(
                lambda all: jax.lax.dynamic_index_in_dim(all, i, keepdims=False), states)
            y, new = self.body.apply(own_params, own_state, x, key=key_of_copy(key, i),
                                     train=train, **inside(shared))

            def put(all: jax.Array, one: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_index_in_dim(
                    beside(all, one, below=1), one, i, 0)

            return (y, jax.tree.map(put, states, new)), None

        # State is in the carry, which XLA updates in place, not in the scan's outputs.
        numbers = jnp.arange(self.n) if state or key is not None else None
        shapes = spec((params, state, x, key)), spec(side)
        (y, state), _ = scan(
            step, (x, state), (numbers, params), length=self.n, unroll=self.unroll,
            convolving=lambda: self.convolves[train](*shapes))
        return y, state

    def _convolves(self, train: bool, given: Any, side: dict[str, Any]) -> bool:
        """Is there a convolution in the layer, applied to these shapes?"""
        params, state, x, key = given
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (params, state))
        apply = functools.partial(self.layer.apply, train=train)
        return convolves(apply, *one, x, key=key, **side)

    def start(
        self, params: Params, state: State, x: Any, *, length: int, **side: Any
    ) -> State:
        def step(x: Any, own: tuple[Params, State]) -> tuple[Any, State]:
            carried = self.layer.start(*own, x, length=length, **side)
            return self.layer.apply(*own, x, **side)[0], carried

        x = settled(lambda x, own: step(x, own)[0], x, (params, state))
        return jax.lax.scan(step, x, (params, state), length=self.n)[1]
