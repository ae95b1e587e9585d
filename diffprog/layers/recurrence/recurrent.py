"""Recurrence: a cell, scanned over time by `jax.lax.scan`.

The carry is the cell's own streaming state, so that any streaming layer of one time step is a cell:
`lstm`, a chain of them, copies of them, a residual block around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from diffprog.core.arguments import check_array, check_count, known
from diffprog.core.dtypes import is_float, outside
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, around, as_layer
from diffprog.core.loops import once
from diffprog.core.masks import NONE, begins, check_segments, cleared, last_valid, widened
from diffprog.core.meshes import beside, settled
from diffprog.core.notation import listed, show
from diffprog.core.paths import paths
from diffprog.core.plans import (
    Params,
    Plan,
    State,
    blank,
    example_axes,
    grown,
    one_more,
    remember,
    spec,
)
from diffprog.core.streams import note_of, noted, recalled, without
from diffprog.transforms.needed import needed
from diffprog.transforms.stacking import key_of_copy
from diffprog.wiring.children import Children
from diffprog.wiring.merging import concatenate
from diffprog.wiring.program import wire

__all__ = ["recurrent"]

_OWN = frozenset({"mask", "segments"})  # side inputs of the recurrence; all others reach the cell


@factory
def recurrent(
    cell: Any, *, reverse: bool = False, bidirectional: bool = False, unroll: int = 1
) -> Layer:
    """Scan a cell over time: ``y[t], carry = cell(x[t], carry)``, from the cell's initial carry.

    A cell is any streaming layer of one time step; its streaming state is the carry. For example,
    ``recurrent(serial(linear(6), lstm(6), lstm(4)))`` equals three layers in sequence. The
    parameters are those of the cell, without another level.

    To set the initial carry or to read the final one, stream: ``state = net.start(params, {}, x,
    length=n)`` holds the cell's state; replace entries of it, and ``y, state = net.apply(params,
    state, x)`` returns the carry after the last step. The length matters only to cells with a
    cache.

    Shapes:
        x: (batch, time, ...), floats with features on the last axis, or integers; or a pytree of
            such arrays with the same first two axes. The cell gets (batch, ...).
        y: output of the cell, (batch, ...), with time as the second axis; for both directions
            (batch, time, 2 * features).
        params: those of the cell; for both directions ``forward`` and ``backward``, each with those
            of the cell.
        state while streaming: that of the cell, and ``#segment`` (batch,), that of the last step.
        mask: booleans (batch, time) or (batch,), True = valid. A masked step keeps the carry, and y
            is 0 there; so the backward direction starts at the last valid step of each row.
        segments: ints (batch, time). Wherever they change, the carry is reset to the initial one:
            ``cumsum(done)`` resets it at each episode, done being True at its first step. The first
            segment of a stream starts with the carry in its state; a chunk without segments
            continues the last one. The cell gets neither mask nor segments; all other side inputs
            are passed to it whole at every step.

    Args:
        cell: a layer with a `start`; layers that do not mix time steps need no recurrence. See
            docs/cells.md for how to write a cell.
        reverse: True goes from the last step to the first; y keeps the order of x.
        bidirectional: True goes in both directions, with parameters for each, and concatenates the
            outputs.
        unroll: steps in one iteration of the loop; positive.

    Raises:
        LayerError: at composition, for reverse and bidirectional together, and for a cell without
            `start`; at ``init``, if x has another shape, or the cell has running statistics,
            changes the shapes of its carry, returns another first axis than the batch axis, or
            carries a value that depends on all examples, as layers do that mix positions; with a
            mask or segments, if a part of the carry has no batch axis; in ``start``, if it goes
            backwards.

    Example:
        >>> net, x = dp.recurrent(dp.gru(3)), jnp.ones((2, 5, 4))
        >>> params, _ = net.init(jax.random.key(0), x)
        >>> state = net.start(params, {}, x, length=5)
        >>> state["hidden"] = jnp.full((2, 3), 0.5)  # an initial carry
        >>> y, state = net.apply(params, state, x)
        >>> y.shape, bool((state["hidden"] == y[:, -1]).all())
        ((2, 5, 3), True)

    Source: Elman 1990, Cognitive Science 14, 179-211; both directions: Schuster and Paliwal 1997,
    IEEE Transactions on Signal Processing 45, 2673-2681.
    """
    check_count("unroll", unroll)
    cell = as_layer(cell)
    if reverse and bidirectional:
        raise LayerError("reverse or bidirectional", "both",
                         "leave reverse out: bidirectional goes in both directions")
    if cell.start is None:
        raise LayerError("a cell that carries a state from step to step", f"{cell!r}, without "
                         "start", "leave recurrent out if the layer does not mix time steps, "
                         "otherwise give it a start: see docs/cells.md")
    if bidirectional:
        return _both_ways({"forward": recurrent(cell, unroll=unroll),
                           "backward": recurrent(cell, reverse=True, unroll=unroll)})
    loop = _Loop(cell, reverse, unroll)
    return Layer(
        loop.init, once(loop.apply, "train"), loop.start, cell.children,
        **around(cell, lambda cell: recurrent(cell, reverse=reverse, unroll=unroll), order="time"),
        name="recurrent", bare=cell.bare, random=cell.random, side=cell.side | _OWN,
        kept=cell.kept, planner=remember(loop.plan), computed=cell.computed, stacks=cell.stacks,
    )


class _Loop:
    """A cell in a loop over time, in one direction."""

    def __init__(self, cell: Layer, reverse: bool, unroll: int) -> None:
        self.cell, self.reverse, self.unroll = cell, reverse, unroll
        self.batch_axes = remember(self.find_batch_axes)
        self.initial_carry = once(self.carry_of_sequence, "length")

    def init(self, key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        return self.cell.init(key, _one_step(x), **_of_cell(side))

    def apply(
        self, params: Params, state: State, x: Any, *, key: jax.Array | None = None,
        train: bool = False, mask: jax.Array | None = None, **side: Any,
    ) -> tuple[Any, State]:
        batch, time = _extent(x)
        valid, one = _valid_steps(mask, batch, time), _one_step(x)
        note = note_of(state)  # shapes of the side inputs that the stream keeps
        state = without(state, note)
        mark = _mark(state)
        carry, last = without(state, {mark}), state.get(mark)  # last segment, (batch,)
        segments, side = side.get("segments"), _of_cell(side)
        initial = reset = axes = None
        if segments is not None:
            if state and last is None:
                raise LayerError("the state of a stream, as start returns it", listed(state),
                                 "replace only its carry: it also holds the last segment")
            segments = check_segments(segments, (batch, time))
            reset = _resets(segments, valid, last, self.reverse)  # (batch, time)
            length = self.length_of(params, carry, one, side) if state else max(time, 1)
            initial = self.carry_of_step(params, one, side, length)
        if valid is not None or reset is not None:
            axes = self.batch_axes(spec(x), recalled(note) | spec(side))
        x = jax.tree.map(lambda a: cleared(a, valid, reach=2), x)
        carry = carry or self.carry_of_step(params, one, side, max(time, 1))
        constants, narrowed = outside((params, initial, side))

        def step(carry: State, at: Any) -> tuple[State, Any]:
            x, valid, reset, count = at  # (batch, ...), (batch,), (batch,), ()
            params, initial, side = narrowed(constants)
            if reset is not None:
                carry = _chosen(reset, initial, carry, axes)
            y, new = self.cell.apply(
                params, carry, x, key=key_of_copy(key, count), train=train, **side)
            if valid is None:
                return new, y
            new = _chosen(valid, new, carry, axes)
            return new, jax.tree.map(lambda a: cleared(a, valid, reach=1), y)

        counts = jnp.arange(time) if self.cell.random and key is not None else None
        xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, valid, reset))  # time first
        carry = settled(lambda carry, at: step(carry, at)[0], carry, (*xs, counts))
        carry, y = jax.lax.scan(step, carry, (*xs, counts), reverse=self.reverse,
                                unroll=self.unroll if known(time) else 1)
        y = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), y)  # (batch, time, ...)
        if not state:
            return y, note
        if last is None:
            return y, {**carry, **note}
        return y, {**carry, mark: _last_segment(last, segments, valid), **note}

    def start(self, params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        if self.reverse:
            raise LayerError("the whole input at once", "a streaming call",
                             "apply it without start: it goes backwards")
        batch, _ = _extent(x)
        side = _of_cell(side)
        carry = self.initial_carry(params, x, side, length=length)
        mark = f"#{_mark(carry) or 'segment'}"
        return noted(self.cell, {**carry, mark: jnp.full(batch, NONE, jnp.int32)}, side)

    def plan(self, x: Any, side: dict[str, Any]) -> Plan:
        """Shapes of the recurrence, after a check that the layer is a cell."""
        batch, time = _extent(x)
        jax.eval_shape(lambda mask: _valid_steps(mask, batch, time), side.get("mask"))
        if "segments" in side:
            jax.eval_shape(lambda ids: check_segments(ids, (batch, time)), side["segments"])
        x, side = _one_step(x), _of_cell(side)
        one = self.cell.plan(x, **side)
        if one.state:
            raise LayerError("a cell whose only state is its carry", listed(paths(one.state)),
                             "put batch norm and taps before or after the recurrence")

        def next_carry(params: Params, carry: State, x: Any, side: dict[str, Any]) -> State:
            return self.cell.apply(params, carry, x, **side)[1]

        carry = jax.eval_shape(self.carry_of_step, one.params, x, side)
        new = jax.eval_shape(next_carry, one.params, carry, x, side)
        if spec(new) != spec(carry):
            raise LayerError(f"a carry that keeps its shapes and dtypes, {show(carry)}", show(new),
                             "let apply return the state in the form of start")
        if any(leaf.shape[:1] != (batch,) for leaf in jax.tree.leaves(one.y)):
            raise _batch_axis_not_first(batch, one)
        self.check_examples_apart(one, x, side, batch)
        y = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((batch, time, *a.shape[1:]), a.dtype), one.y)
        return Plan(one.params, {}, y, one.calls)

    def check_examples_apart(self, one: Plan, x: Any, side: dict[str, Any], batch: int) -> None:
        """Raise if the cell mixes examples.

        A part of the carry without a batch axis must not be computed from arrays with one: then
        the program that computes it changes with the batch size.
        """

        def run(x: Any, side: dict[str, Any]) -> tuple[State, Any]:
            params = blank(one.params)
            y, carry = self.cell.apply(params, self.carry_of_step(params, x, side), x, **side)
            return carry, y

        try:
            axes, axes_of_y = example_axes(run, batch, x, side)
        except Exception:
            return  # a side input without a batch axis is as long as the batch by chance
        if any(jax.tree.leaves(axes_of_y)):
            raise _batch_axis_not_first(batch, one)
        shared = [axis < 0 for axis in jax.tree.leaves(axes)]

        def program_of_shared(x: Any, side: dict[str, Any]) -> str:
            traced = jax.make_jaxpr(lambda *given: run(*given)[0])(x, side).jaxpr
            return str(partial_eval.dce_jaxpr(traced, shared)[0])

        if any(shared) and program_of_shared(x, side) != program_of_shared(
                *one_more(batch, (x, side))):
            names = (path for path, axis in paths(axes).items() if axis < 0)
            raise LayerError("a cell that keeps examples apart", f"{listed(names)} without a batch "
                             "axis", "put layers that mix positions before or after the "
                             "recurrence: the first axis of a cell is the batch axis")

    def carry_of_step(
        self, params: Params, x: Any, side: dict[str, Any], length: int = 1
    ) -> State:
        """The initial carry for a step x, of which only shapes and dtypes are read."""

        def start(params: Params, side: dict[str, Any]) -> State:
            return self.cell.start(params, {}, blank(x), length=length, **side)

        return needed(start, params, side)

    def carry_of_sequence(
        self, params: Params, x: Any, side: dict[str, Any], *, length: int
    ) -> State:
        """The initial carry for a sequence x."""
        return self.carry_of_step(params, _one_step(x), side, length)

    def length_of(self, params: Params, carry: State, x: Any, side: dict[str, Any]) -> int:
        """The length for which a carry was started, read off its cache; 1 if it has none."""
        one, two = (jax.eval_shape(lambda n=n: self.carry_of_step(params, x, side, n))
                    for n in (1, 2))
        for a, b, c in zip(*map(jax.tree.leaves, (one, two, carry)), strict=True):
            axis = grown(a, b)
            if axis >= 0:
                return 1 + (c.shape[axis] - a.shape[axis]) // (b.shape[axis] - a.shape[axis])
        return 1

    def find_batch_axes(self, x: Any, side: dict[str, Any]) -> Any:
        """The batch axis of each leaf of the carry: the one that grows with the batch."""
        batch, _ = _extent(x)
        x = _one_step(x)
        params = self.cell.plan(x, **side).params
        carry = jax.eval_shape(self.carry_of_step, params, x, side)
        larger = jax.eval_shape(self.carry_of_step, params, *one_more(batch, (x, side)))

        def axis(leaf: Any, more: Any) -> int:
            found = grown(leaf, more)
            if found < 0 or leaf.shape[found] != batch:
                raise LayerError("a carry with a batch axis in each leaf, to keep it at masked "
                                 "steps", show(leaf),
                                 "leave the mask out, or carry one value for each example")
            return found

        return jax.tree.map(axis, carry, larger)


def _both_ways(children: Mapping[str, Layer]) -> Layer:
    """Two recurrences on the same input, joined; shown as one call if their cells are alike."""

    def join(layers: Children, x: Any) -> jax.Array:
        return concatenate((layers.forward(x), layers.backward(x)))

    layer = wire(join, children, name="recurrent", rebuild=_both_ways)
    cell, unroll = (children["forward"].settings.get(name) for name in ("cell", "unroll"))
    call: dict[str, Any] = {"cell": cell, "unroll": unroll, "bidirectional": True}
    ways = [layer.described(recurrent, call | {"reverse": reverse, "bidirectional": False})
            for reverse in (False, True)]
    alike = list(map(repr, ways)) == list(map(repr, children.values()))
    return layer.described(recurrent, call | {"reverse": False}) if alike else layer


def _of_cell(side: dict[str, Any]) -> dict[str, Any]:
    """The side inputs that the cell gets."""
    return {name: value for name, value in side.items() if name not in _OWN}


def _mark(state: State) -> str:
    """The name of the segment in a state: the longest, since the cell may hold a recurrence."""
    return max((name for name in state if name.endswith("#segment")), key=len, default="")


def _resets(segments: jax.Array, valid: Any, last: Any, reverse: bool) -> jax.Array:
    """True where the carry is reset: at the first step of a segment in the direction of the loop.
    """
    if not reverse:
        return begins(segments, valid, last)
    segments = jnp.flip(segments, 1)
    valid = None if valid is None else jnp.flip(valid, 1)
    return jnp.flip(begins(segments, valid), 1)


def _last_segment(last: jax.Array, segments: Any, valid: Any) -> jax.Array:
    """The segment of the last step, (batch,); 0 for a stream without segments so far."""
    if segments is None:
        return jnp.where(last == NONE, 0, last)
    return last_valid(segments, valid, last)


def _chosen(condition: jax.Array, these: State, those: State, axes: Any) -> State:
    """One carry where the condition (batch,) is True, the other where it is False."""

    def choose(axis: int, a: jax.Array, b: jax.Array) -> jax.Array:
        spread = jnp.expand_dims(condition, [i for i in range(a.ndim) if i != axis])
        a, b = beside(a, spread), beside(b, spread)
        return jnp.where(spread, beside(a, b), beside(b, a))

    return jax.tree.map(choose, axes, these, those)


def _batch_axis_not_first(batch: int, one: Plan) -> LayerError:
    return LayerError(f"a cell that returns ({batch}, ...), with the batch axis first", show(one.y),
                      "pass (batch, time, ...), or a cell that keeps the first axis")


def _extent(x: Any) -> tuple[int, int]:
    """The sizes of batch and time axis, after a check that all leaves of x agree."""
    leaves = jax.tree.leaves(x)
    for leaf in leaves or [x]:
        check_array(leaf, floating=False)
        floats = is_float(leaf)
        check_array(leaf, rank=2 + floats, floating=False,
                    axes=f"(batch, time{', features' if floats else ''})")
    if len({leaf.shape[:2] for leaf in leaves}) > 1:
        raise LayerError("leaves of equal batch and time axes", show(x),
                         "bring them to one length")
    return leaves[0].shape[:2]


def _one_step(x: Any) -> Any:
    """The shapes of one time step."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((*a.shape[:1], *a.shape[2:]), a.dtype), x)


def _valid_steps(mask: Any, batch: int, time: int) -> Any:
    """The mask as (batch, time); None stays None."""
    if mask is None:
        return None
    return jnp.broadcast_to(widened(mask, (batch, time), reach=2), (batch, time))
