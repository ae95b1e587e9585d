"""Depth without cost: one layer scanned over stacked parameters."""

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
    them, so time to trace and to compile does not grow with n. On CPU a layer with a convolution
    is written out: XLA's gradient of a convolution inside a loop is tens of times slower there.

    Shapes:
        x: whatever the layer keeps as it is. params, state: the layer's, with a leading axis n.

    Args:
        n: how often; positive.
        layer: a layer whose output has the shapes and dtypes of its input.
        unroll: copies per step of the loop; n removes the loop.
        remat: True, or a policy of `remat`, to compute the activations of each copy again for the
            gradient; the same as ``repeat(n, remat(layer))``.

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

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        one = layer.plan(x, **side)
        if spec(one.y) != spec(x):
            raise LayerError(f"a layer that keeps {show(x)} as it is", show(one.y),
                             "let its output have the shape and dtype of its input")
        return Plan(stacked(n, one.params), stacked(n, one.state), one.y, one.calls)

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        return init_copies(n, layer, key, x, side)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        shared, inside = outside(side)  # what all copies read
        key = key if layer.random else None

        def step(carry: Any, at: Any) -> tuple[Any, None]:
            x, states = carry
            i, own = at
            old = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), states)
            y, new = body.apply(
                own, old, x, key=key_of_copy(key, i), train=train, **inside(shared))
            put = lambda all, one: jax.lax.dynamic_update_index_in_dim(  # noqa: E731
                beside(all, one, below=1), one, i, 0)
            return (y, jax.tree.map(put, states, new)), None

        # State rides in the carry, where XLA updates it in place, not in the scan's outputs.
        counts = jnp.arange(n) if state or key is not None else None
        given = spec((params, state, x, key)), spec(side)
        return scan(step, (x, state), (counts, params), length=n, unroll=unroll,
                    convolving=lambda: known[train](*given))[0]

    def convolving(train: bool, given: Any, side: dict[str, Any]) -> bool:
        params, state, x, key = given
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (params, state))
        return convolves(functools.partial(layer.apply, train=train), *one, x, key=key, **side)

    # What is known of each mode stands by itself, for a mode has no shape.
    known = {train: remember(functools.partial(convolving, train)) for train in (False, True)}

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        def step(x: Any, own: Any) -> tuple[Any, State]:
            carried = layer.start(*own, x, length=length, **side)
            return layer.apply(*own, x, **side)[0], carried

        x = settled(lambda x, own: step(x, own)[0], x, (params, state))
        return jax.lax.scan(step, x, (params, state), length=n)[1]

    return Layer(
        init, once(apply, "train"), layer.start and once(start, "length"), layer.children,
        **around(layer, lambda layer: repeat(n, layer, unroll=unroll, remat=remat),
                 times=n, order="depth"),
        name="repeat",
        bare=layer.bare, random=layer.random, side=layer.side, kept=layer.kept, planner=planner,
        computed=layer.computed, stacks=layer.stacks + 1,
    )
