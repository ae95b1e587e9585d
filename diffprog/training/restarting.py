"""Streams in which some rows of the batch restart while the others continue."""

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
    """The state of a stream with the chosen rows restarted: ``state[row] = start[row]``.

    A new sequence can thus follow in the row of one that ended, when reading, generating, or
    training by truncated back-propagation. State that all rows share, such as running statistics or
    the next free slot of a cache, is kept: a cache of `length` steps holds all sequences of a row.

    Shapes:
        rows: booleans (batch,), True for the rows that restart.
        x, side: as `start` takes them, of the whole batch; most layers use only the shape of x.

    Args:
        net, params: the streaming layer and its parameters.
        state: of the stream, as `start` or `apply` returned it.
        length: as passed to `start`.

    Raises:
        LayerError: rows of another shape or dtype, or a state that does not match that of `start`
            for this x and length.

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
    net_state, _ = parted(net, state, lambda: net._shaped(x, side)[1])
    begun = net.start(params, net_state, x, length=length, **side)
    if wrong := difference("state", spec(begun), state, "pass x, length and side inputs as to the "
                           "start of this stream"):
        raise wrong

    shapes = spec((params, net_state))

    def start(x: Any, side: dict[str, Any]) -> State:
        return net.start(*blank(shapes), x, length=length, **side)

    def chosen(axis: int, new: jax.Array, old: jax.Array) -> jax.Array:
        if axis < 0:  # shared by all rows
            return old
        others = [i for i in range(old.ndim) if i != axis]
        return jnp.where(jnp.expand_dims(rows, others), new, old)

    return jax.tree.map(chosen, example_axes(start, batch, x, side), begun, state)
