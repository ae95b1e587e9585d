"""Reading activations: what a layer deep in a net gives is returned beside the result.

A tapped layer puts its output into the state, where every combinator carries it: stacked by
`repeat`, mapped by `heads`, recomputed by `remat`. Around the net the outputs are taken out again,
so that the state that comes back is the state that was given.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, around, as_layer
from diffprog.core.loops import listening, tell
from diffprog.core.nets import visits
from diffprog.core.notation import listed
from diffprog.core.plans import Params, Plan, State, blank, remember, spec
from diffprog.core.streams import note_of, noted, recalled, without
from diffprog.transforms.replace import edited

__all__ = ["tap"]

_COUNT = itertools.count()


@factory
def tap(layer: Any, pattern: str) -> Layer:
    """Return activations beside the result: ``y`` becomes ``(y, {path: activation})``.

    Gradients flow through the activations, so that a loss may speak of them. Inside `repeat`,
    `heads` and `ensemble` an activation has their leading axis. It keeps the kind and the names of
    what it wraps; parameters and state are the same. A value inside a program is seen through a
    child that does nothing, ``mark=lambda x: x``.

    Args:
        layer: a layer made of layers.
        pattern: of the paths of layers, in which ``*`` is one level and ``**`` any number.

    Raises:
        LayerError: the pattern matches no layer; at ``init``, if a matched layer is called several
            times, so that one path would stand for several activations, or not at all; at
            ``apply``, if it is not called in this mode.

    Example:
        >>> net = dp.tap(dp.repeat(3, dp.linear(4) >> jnp.tanh), "tanh~0")
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> y, seen = net(params, jnp.ones((2, 4)))
        >>> {path: activation.shape for path, activation in seen.items()}
        {'tanh~0': (3, 2, 4)}
    """
    layer = as_layer(layer)
    mark = f"#{next(_COUNT)}"  # what an output is called in the state: as no child and no other tap
    tapped: list[str] = []

    def watch(path: str, child: Layer) -> Layer:
        tapped.append(path)
        return _watched(child, path, mark)

    inner = edited(layer, pattern, watch)

    @remember
    def places(x: Any, side: dict[str, Any]) -> State:
        """Where in the state the outputs will stand, in shapes."""
        count = collections.Counter(visit.path for visit in visits(inner, x, side))
        for path in tapped:
            if count[path] != 1:
                raise LayerError(f"one call of {path}", f"{count[path]} calls",
                                 "tap a layer around it, or give each call a layer of its own")
        return _taps(inner.plan(x, **side).state, mark)

    def filled(state: State, x: Any, side: dict[str, Any]) -> State:
        return _merged(state, blank(places(spec(x), spec(side))), mark)

    def planner(x: Any, side: dict[str, Any]) -> Plan:
        plan = layer.plan(x, **side)
        return dataclasses.replace(plan, y=(plan.y, dict(_named(places(x, side), mark))))

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        note = note_of(state)
        full = filled(without(state, note), x, recalled(note) | side)
        with listening() as called:
            y, new = inner.apply(params, full, x, key=key, train=train, **side)
        if idle := [path for path in tapped if (mark, path) not in called]:
            raise LayerError(f"a call of {listed(idle)}", f"none with train={train}",
                             "tap a layer that is called in both modes")
        return (y, dict(_named(_taps(new, mark), mark))), {**_without(new, mark), **note}

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        full = filled(state, x, side)
        carried = inner.start(params, full, x, length=length, **side)
        return noted(layer, _without(carried, mark), side)

    return dataclasses.replace(
        layer, apply=apply, start=inner.start and start, planner=planner,
        **around(layer, lambda layer: tap(layer, pattern)),
    )


def is_output(name: str) -> bool:
    """Is this what `tap` calls an output in the state?"""
    return name[:1] == "#" and name[1:].isdecimal()


def _watched(layer: Layer, path: str, mark: str) -> Layer:
    """The layer, whose state holds its last output under the name `mark` as well."""

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        params, state = layer.init(key, x, **side)
        return params, {**state, mark: blank(layer.plan(x, **side).y)}

    def planner(x: Any, side: dict[str, Any]) -> Plan:
        plan = layer.plan(x, **side)
        return dataclasses.replace(plan, state={**plan.state, mark: plan.y})

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        tell((mark, path))
        y, new = layer.apply(params, _own(state, mark), x, key=key, train=train, **side)
        # In `mixed` y is narrower than the place for it, whose dtype must stay.
        return y, {**new, mark: jax.tree.map(lambda y, at: y.astype(at.dtype), y, state[mark])}

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        carried = layer.start(params, _own(state, mark), x, length=length, **side)
        return {**carried, mark: state[mark]}

    return dataclasses.replace(
        layer, init=init, apply=apply, start=layer.start and start, planner=planner,
        **around(layer, lambda layer: _watched(layer, path, mark)),
    )


def _own(state: State, mark: str) -> State:
    return {name: value for name, value in state.items() if name != mark}


def _taps(state: State, mark: str) -> State:
    """The part of a state that holds outputs."""
    parts = {name: _taps(part, mark) for name, part in _own(state, mark).items()
             if isinstance(part, dict)}
    found = {name: part for name, part in parts.items() if part}
    return found | {mark: state[mark]} if mark in state else found


def _without(state: State, mark: str) -> State:
    """The state without outputs; what becomes empty is left out."""
    parts = {name: _without(part, mark) if isinstance(part, dict) else part
             for name, part in _own(state, mark).items()}
    return {name: part for name, part in parts.items() if not isinstance(part, dict) or part}


def _merged(state: State, taps: State, mark: str) -> State:
    below = _own(taps, mark)
    parts = {name: _merged(state.get(name, {}), part, mark) for name, part in below.items()}
    return {**state, **parts, **({mark: taps[mark]} if mark in taps else {})}


def _named(taps: State, mark: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and output of every tapped layer."""
    for name, part in taps.items():
        if name == mark:
            yield path, part
        else:
            yield from _named(part, mark, f"{path}/{name}" if path else name)
