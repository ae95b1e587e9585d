"""Streams of which some rows begin anew while the others go on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.core.plans import Params, State, blank, difference, example_axes, spec
from diffprog.core.streams import parted

__all__ = ["restart"]


def restart(
    net: Layer, params: Params, state: State, x: Any, rows: Any, *, length: int, **side: Any
) -> State:
    """The state of a stream whose chosen rows begin anew: ``state[row] = start[row]``.

    So a text that ends makes room for the next one in its row of the batch, be it read, written or
    trained on by truncated back-propagation. What all rows share, such as running statistics or the
    next free slot of a cache, goes on: a cache of `length` steps holds those of all texts of a row.

    Shapes:
        rows: booleans (batch,), True for the rows that begin anew.
        x, side: as `start` takes them, of the whole batch; of x only shapes count to most layers.

    Args:
        net, params: the streaming layer and its parameters.
        state: of the stream, as `start` or `apply` returned it.
        length: as `start` was given it.

    Raises:
        LayerError: rows of another form, or a state that `start` would not give for this x and
            length.

    Example:
        >>> net, x = dp.recurrent(dp.gru(3)), jnp.ones((2, 5, 4))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> y, state = net.apply(params, net.start(params, state, x, length=5), x)
        >>> state = dp.training.restart(net, params, state, x, jnp.array([True, False]), length=5)
        >>> jnp.any(state["hidden"] != 0, axis=1).tolist()
        [False, True]
    """
    batch = jax.tree.leaves(x)[0].shape[0]
    rows = jnp.asarray(rows)
    if rows.shape != (batch,) or rows.dtype != bool:
        raise LayerError(f"rows as booleans ({batch},), one for each row of x", show(rows),
                         "pass jnp.array([True, False]), for example")
    rest = parted(net, state, lambda: net._shaped(x, side)[1])[0]
    begun = net.start(params, rest, x, length=length, **side)
    if wrong := difference("state", spec(begun), state, "pass x, length and side inputs as to the "
                           "start of this stream"):
        raise wrong

    shapes = spec((params, rest))

    def start(x: Any, side: dict[str, Any]) -> State:
        return net.start(*blank(shapes), x, length=length, **side)

    def chosen(axis: int, new: jax.Array, old: jax.Array) -> jax.Array:
        if axis < 0:
            return old
        return jnp.where(jnp.expand_dims(rows, [i for i in range(old.ndim) if i != axis]), new, old)

    return jax.tree.map(chosen, example_axes(start, batch, x, side), begun, state)
