"""Recurrence: one layer carried along time by `jax.lax.scan`.

What is carried is the layer's own streaming state, so any streaming layer of one time step is a
cell: `lstm`, a chain of them, copies of them, a residual block around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from diffprog.core.arguments import check_array, check_count, known
from diffprog.core.dtypes import outside
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, around, as_layer
from diffprog.core.loops import once
from diffprog.core.masks import NONE, begins, check_segments, cleared, last_real, widened
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


@factory
def recurrent(
    cell: Any, *, reverse: bool = False, bidirectional: bool = False, unroll: int = 1
) -> Layer:
    """Carry a cell along time: ``y[t], carry = cell(x[t], carry)``, from the cell's first carry.

    A cell is any streaming layer of one time step, its streaming state being the carry:
    ``recurrent(serial(linear(6), lstm(6), lstm(4)))`` is legal, and the same as three layers in
    sequence. The parameters are the cell's own, without a level of their own.

    To give an initial carry or to read the final one, stream: ``state = net.start(params, {}, x,
    length=n)`` holds the cell's state; overwrite in it what you want to set, and ``y, state =
    net.apply(params, state, x)`` returns the carry after the last step. The length matters only to
    cells that cache.

    Shapes:
        x: (batch, time, ...), floats with features on the last axis, or integers; a pytree of such
            with the same first two axes. The cell sees (batch, ...).
        y: what the cell gives, (batch, ...), with time as the second axis; of both directions
            (batch, time, 2 * features).
        params: the cell's; of both directions ``forward`` and ``backward``, each the cell's.
        state while streaming: the cell's, and ``#segment`` (batch,), in which the last step stands.
        mask: booleans (batch, time) or (batch,). A step that is not real keeps the carry and gives
            exactly 0; so the backward direction begins at each row's own end.
        segments: ints (batch, time). Wherever they change the carry is the first one again: so
            those of episodes are ``cumsum(done)``, done being True where one begins. A stream's
            first segment has the carry that it is given; a chunk without segments goes on with the
            last. The cell receives neither mask nor segments; every other side input reaches it
            whole, at every step.

    Args:
        cell: a layer with a `start`; what mixes nothing in time needs no recurrence, and a cell of
            one's own is shown in docs/cells.md.
        reverse: True goes from the last step to the first; y keeps the order of x.
        bidirectional: True goes both ways, with parameters for each, and concatenates the results.
        unroll: steps per turn of the loop; positive.

    Raises:
        LayerError: at composition, for reverse and bidirectional together, and for a cell without
            `start`, which has no memory; at ``init``, if x is
            nothing of that shape, the cell has running statistics, changes the form of its carry,
            gives something that does not begin with the batch, or carries one thing of all examples
            together, as layers that mix positions do; with a mask or segments, if a part of the
            carry has no batch axis; in ``start``, if it goes backwards.

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
                         "leave reverse out: bidirectional goes both ways")
    if cell.start is None:
        raise LayerError("a cell that carries something from step to step", f"{cell!r}, without "
                         "start", "leave recurrent out of what mixes nothing in time, or give your "
                         "cell the start of its carry: see docs/cells.md")
    if bidirectional:
        return _both_ways({"forward": recurrent(cell, unroll=unroll),
                           "backward": recurrent(cell, reverse=True, unroll=unroll)})

    own = {"mask", "segments"}  # of the side inputs, not the cell's

    def handed_on(side: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in side.items() if name not in own}

    def begun(params: Params, x: Any, side: dict[str, Any], length: int = 1) -> State:
        """The first carry, for a step of the shape and dtype of x: nothing else of x counts."""
        start = lambda params, side: cell.start(  # noqa: E731
            params, {}, blank(x), length=length, **side)
        return needed(start, params, side)

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        batch, time = _extent(x)
        jax.eval_shape(lambda mask: _real(mask, batch, time), side.get("mask"))
        if "segments" in own & side.keys():
            jax.eval_shape(lambda ids: check_segments(ids, (batch, time)), side["segments"])
        x, beside = _one_step(x), handed_on(side)
        one = cell.plan(x, **beside)
        if one.state:
            raise LayerError("a cell that holds nothing but its carry",
                             listed(paths(one.state)), "put batch norm and taps before "
                             "or after the recurrence: a cell has no place for them")
        carry = jax.eval_shape(begun, one.params, x, beside)
        run = lambda p, s, x, beside: cell.apply(p, s, x, **beside)[1]  # noqa: E731
        after = jax.eval_shape(run, one.params, carry, x, beside)
        if spec(after) != spec(carry):
            raise LayerError(f"a carry that keeps its form, {show(carry)}", show(after),
                             "let apply return the state as start made it")
        if any(leaf.shape[:1] != (batch,) for leaf in jax.tree.leaves(one.y)):
            raise _examples_not_first(batch, one)
        check_apart(one, x, beside, batch)
        y = jax.tree.map(lambda a: jax.ShapeDtypeStruct(
            (batch, time, *a.shape[1:]), a.dtype), one.y)
        return Plan(one.params, {}, y, one.calls)

    def check_apart(one: Plan, x: Any, side: dict[str, Any], batch: int) -> None:
        """Raise if examples mix: if what the carry holds of all of them is another with one more.

        Such a part has no axis of examples, and may not be computed from what has one.
        """

        def run(x: Any, side: dict[str, Any]) -> tuple[State, Any]:
            params = blank(one.params)
            y, after = cell.apply(params, begun(params, x, side), x, **side)
            return after, y

        def program(x: Any, side: dict[str, Any]) -> str:
            traced = jax.make_jaxpr(lambda *given: run(*given)[0])(x, side).jaxpr
            return str(partial_eval.dce_jaxpr(traced, of_all)[0])

        given = (x, side)
        try:
            axes, firsts = example_axes(run, batch, *given)
        except Exception:
            return  # a side input of all examples, as long as the batch by chance, cannot grow
        if any(jax.tree.leaves(firsts)):
            raise _examples_not_first(batch, one)
        of_all = [axis < 0 for axis in jax.tree.leaves(axes)]
        if any(of_all) and program(*given) != program(*one_more(batch, given)):
            held = (path for path, axis in paths(axes).items() if axis < 0)
            raise LayerError("a cell that keeps examples apart", f"{listed(held)} of all of them",
                             "put what mixes positions before or after the recurrence: the first "
                             "axis of a cell is that of examples")

    @remember
    def batch_axes(x: Any, side: dict[str, Any]) -> Any:
        """Of each part of the carry the axis of examples: the one that grows with the batch."""
        batch, _ = _extent(x)
        params = cell.plan(_one_step(x), **side).params

        def carry(size: int) -> Any:
            sized = lambda a: jax.ShapeDtypeStruct(  # noqa: E731
                (size, *a.shape[1:]) if a.shape[:1] == (batch,) else a.shape, a.dtype)
            return jax.eval_shape(begun, params, *jax.tree.map(sized, (_one_step(x), side)))

        def axis(less: Any, more: Any) -> int:
            found = grown(less, more)
            if found < 0 or less.shape[found] != batch:
                raise LayerError("a carry whose every part has one axis of examples, to keep it "
                                 "where the mask is False", show(less),
                                 "leave the mask out, or carry one for each example")
            return found

        return jax.tree.map(axis, carry(batch), carry(batch + 1))

    def room(params: Params, carry: State, x: Any, side: dict[str, Any]) -> int:
        """For how many steps a carry has room: of what length another one is like it."""
        one, two = (jax.eval_shape(lambda n=n: begun(params, x, side, n)) for n in (1, 2))
        for a, b, c in zip(*map(jax.tree.leaves, (one, two, carry)), strict=True):
            if (axis := grown(a, b)) >= 0:
                return 1 + (c.shape[axis] - a.shape[axis]) // (b.shape[axis] - a.shape[axis])
        return 1

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        return cell.init(key, _one_step(x), **handed_on(side))

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, mask: jax.Array | None = None, **side: Any) -> tuple[Any, State]:
        batch, time = _extent(x)
        real, one = _real(mask, batch, time), _one_step(x)
        note = note_of(state)
        state = without(state, note)
        mark, first, begin = _mark(state), None, None
        carry, last = without(state, {mark}), state.get(mark)
        segments, side = side.get("segments"), handed_on(side)
        if segments is not None:
            if state and last is None:
                raise LayerError("the state of a stream, as start gives it", listed(state),
                                 "pass that, with another carry in it: it knows its segment")
            segments = check_segments(segments, (batch, time))
            begin = _begins(segments, real, last, reverse)
            length = room(params, carry, one, side) if state else max(time, 1)
            first = begun(params, one, side, length)
        shapes = recalled(note) | spec(side)  # `batch_axes` calls `start` with it
        axes = None if real is None and begin is None else batch_axes(spec(x), shapes)
        x = jax.tree.map(lambda a: cleared(a, real, reach=2), x)
        carry = carry or begun(params, one, side, max(time, 1))
        held, inside = outside((params, first, side))  # what all steps read

        def chosen(where: jax.Array, these: State, those: State) -> State:
            def one(axis: int, a: jax.Array, b: jax.Array) -> jax.Array:
                spread = jnp.expand_dims(where, [i for i in range(a.ndim) if i != axis])
                a, b = beside(a, spread), beside(b, spread)
                return jnp.where(spread, beside(a, b), beside(b, a))

            return jax.tree.map(one, axes, these, those)

        def step(carry: State, at: Any) -> tuple[State, Any]:
            x, real, begin, count = at
            params, first, side = inside(held)
            if begin is not None:
                carry = chosen(begin, first, carry)
            y, new = cell.apply(
                params, carry, x, key=key_of_copy(key, count), train=train, **side)
            if real is None:
                return new, y
            return (chosen(real, new, carry),
                    jax.tree.map(lambda a: cleared(a, real, reach=1), y))

        counts = jnp.arange(time) if cell.random and key is not None else None
        xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, real, begin))
        carry = settled(lambda carry, at: step(carry, at)[0], carry, (*xs, counts))
        carry, y = jax.lax.scan(step, carry, (*xs, counts), reverse=reverse,
                                unroll=unroll if known(time) else 1)
        y = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), y)
        if not state:
            return y, note
        if last is None:
            return y, {**carry, **note}
        last = (jnp.where(last == NONE, 0, last) if segments is None else
                last_real(segments, real, last))
        return y, {**carry, mark: last, **note}

    first = once(lambda params, x, side, *, length: begun(
        params, _one_step(x), side, length), "length")

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        if reverse:
            raise LayerError("the whole input at once", "a streaming call",
                             "apply it without start: it looks ahead")
        batch, _ = _extent(x)
        carry = first(params, x, handed_on(side), length=length)
        mark = f"#{_mark(carry) or 'segment'}"
        return noted(cell, {**carry, mark: jnp.full(batch, NONE, jnp.int32)}, handed_on(side))

    return Layer(
        init, once(apply, "train"), start, cell.children,
        **around(cell, lambda cell: recurrent(cell, reverse=reverse, unroll=unroll), order="time"),
        name="recurrent", bare=cell.bare, random=cell.random, side=cell.side | own,
        kept=cell.kept, planner=planner, computed=cell.computed, stacks=cell.stacks,
    )


def _mark(state: State) -> str:
    """The name in a state of the segment: as no child has, nor a recurrence further inside."""
    return max((name for name in state if name.endswith("#segment")), key=len, default="")


def _begins(segments: jax.Array, real: Any, last: Any, reverse: bool) -> jax.Array:
    """Where a segment begins, (batch, time), on the way from the first step or from the last."""
    if not reverse:
        return begins(segments, real, last)
    back = lambda a: None if a is None else jnp.flip(a, 1)  # noqa: E731
    return jnp.flip(begins(jnp.flip(segments, 1), back(real)), 1)


def _examples_not_first(batch: int, one: Plan) -> LayerError:
    return LayerError(f"a cell that gives ({batch}, ...), the examples first", show(one.y),
                      "give it (batch, time, ...), or a cell that keeps the first axis")


def _both_ways(children: Mapping[str, Layer]) -> Layer:
    """Two recurrences on the same input, joined; shown as one call if their cells are alike."""

    def join(layers: Children, x: Any) -> jax.Array:
        return concatenate((layers.forward(x), layers.backward(x)))

    layer = wire(join, children, name="recurrent", rebuild=_both_ways)
    cell, unroll = (children["forward"].settings.get(name) for name in ("cell", "unroll"))
    call: dict[str, Any] = {"cell": cell, "unroll": unroll, "bidirectional": True}
    ways = [layer.described(recurrent, call | {"reverse": back, "bidirectional": False})
            for back in (False, True)]
    alike = list(map(repr, ways)) == list(map(repr, children.values()))
    return layer.described(recurrent, call | {"reverse": False}) if alike else layer


def _extent(x: Any) -> tuple[int, int]:
    """How many examples and steps x has, after a check that all its parts agree."""
    for leaf in (leaves := jax.tree.leaves(x)) or [x]:
        check_array(leaf, floating=False)
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        check_array(leaf, rank=2 + floats, floating=False,
                    axes=f"(batch, time{', features' if floats else ''})")
    if len({leaf.shape[:2] for leaf in leaves}) > 1:
        raise LayerError("parts of equal batch and time", show(x), "bring them to one length")
    return leaves[0].shape[:2]


def _one_step(x: Any) -> Any:
    """The shapes of one time step."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(
        (*a.shape[:1], *a.shape[2:]), a.dtype), x)


def _real(mask: Any, batch: int, time: int) -> Any:
    """The mask as (batch, time); None stays None."""
    if mask is None:
        return None
    return jnp.broadcast_to(widened(mask, (batch, time), reach=2), (batch, time))
