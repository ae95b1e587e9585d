"""Activations of inner layers, returned beside the output of a net.

A tapped layer writes its output into the state, which every combinator passes on: `repeat` stacks
it, `heads` maps it, `remat` recomputes it. Around the net the outputs are removed from the state
again, so that its structure does not change.
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
    """Return intermediate activations with the output: ``(y, {path: activation})``.

    An activation is the output of a matched layer. Gradients flow through it, so that a loss may
    use it. Inside `repeat`, `heads` and `ensemble` it gets their leading axis of copies. Names,
    parameters and state of the net are unchanged. To tap a value inside a program, call a named
    identity child on it, ``mark=lambda x: x``.

    Args:
        layer: a layer with children.
        pattern: paths of layers; ``*`` matches one level and ``**`` any number of levels.

    Raises:
        LayerError: at composition, if the pattern matches no layer; at ``init``, unless every
            matched layer is called exactly once; at ``apply``, if one is not called in training, or
            at inference.

    Example:
        >>> net = dp.tap(dp.repeat(3, dp.linear(4) >> jnp.tanh), "tanh~0")
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> y, seen = net(params, jnp.ones((2, 4)))
        >>> {path: activation.shape for path, activation in seen.items()}
        {'tanh~0': (3, 2, 4)}
    """
    layer = as_layer(layer)
    net = _Tap(layer, pattern)
    return dataclasses.replace(
        layer, apply=net.apply, start=net.inner.start and net.start, planner=net.plan,
        **around(layer, lambda layer: tap(layer, pattern)),
    )


def is_output(name: str) -> bool:
    """Is this a name under which `tap` writes an output into the state?"""
    return name[:1] == "#" and name[1:].isdecimal()


class _Tap:
    """The functions of the layer `tap`: plan, apply and start."""

    def __init__(self, layer: Layer, pattern: str) -> None:
        self.layer = layer
        self.mark = f"#{next(_COUNT)}"  # the name of outputs in the state, different for each tap
        self.paths: list[str] = []

        def tapped(path: str, child: Layer) -> Layer:
            self.paths.append(path)
            return _tapped(child, path, self.mark)

        self.inner = edited(layer, pattern, tapped)
        self.outputs = remember(self._outputs)  # (x, side) -> State

    def _outputs(self, x: Any, side: dict[str, Any]) -> State:
        """The shapes of the outputs, at their places in the state."""
        calls = collections.Counter(visit.path for visit in visits(self.inner, x, side))
        for path in self.paths:
            if calls[path] != 1:
                raise LayerError(f"one call of {path}", f"{calls[path]} calls",
                                 "tap a layer around it, or use a separate layer for each call")
        return _outputs_of(self.inner.plan(x, **side).state, self.mark)

    def plan(self, x: Any, side: dict[str, Any]) -> Plan:
        plan = self.layer.plan(x, **side)
        activations = dict(_by_path(self.outputs(x, side), self.mark))
        return dataclasses.replace(plan, y=(plan.y, activations))

    def apply(self, params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        note = note_of(state)
        state = self.with_places(without(state, note), x, recalled(note) | side)
        with listening() as called:
            y, state = self.inner.apply(params, state, x, key=key, train=train, **side)
        missing = [path for path in self.paths if (self.mark, path) not in called]
        if missing:
            raise LayerError(f"a call of {listed(missing)}", f"none with train={train}",
                             "tap a layer that is called in both modes")
        activations = dict(_by_path(_outputs_of(state, self.mark), self.mark))
        return (y, activations), {**_without_outputs(state, self.mark), **note}

    def start(
        self, params: Params, state: State, x: Any, *, length: int, **side: Any
    ) -> State:
        state = self.with_places(state, x, side)
        carried = self.inner.start(params, state, x, length=length, **side)
        return noted(self.layer, _without_outputs(carried, self.mark), side)

    def with_places(self, state: State, x: Any, side: dict[str, Any]) -> State:
        """The state with zeros in the places of the outputs."""
        return _with_outputs(state, blank(self.outputs(spec(x), spec(side))), self.mark)


def _tapped(layer: Layer, path: str, mark: str) -> Layer:
    """The layer, whose state also holds its last output under the name `mark`."""

    def planner(x: Any, side: dict[str, Any]) -> Plan:
        plan = layer.plan(x, **side)
        return dataclasses.replace(plan, state={**plan.state, mark: plan.y})

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        params, state = layer.init(key, x, **side)
        return params, {**state, mark: blank(layer.plan(x, **side).y)}

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        tell((mark, path))
        own = without(state, (mark,))
        y, new = layer.apply(params, own, x, key=key, train=train, **side)
        # In `mixed` y is narrower than the place in the state, whose dtype must not change.
        output = jax.tree.map(lambda y, place: y.astype(place.dtype), y, state[mark])
        return y, {**new, mark: output}

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        carried = layer.start(params, without(state, (mark,)), x, length=length, **side)
        return {**carried, mark: state[mark]}

    return dataclasses.replace(
        layer, init=init, apply=apply, start=layer.start and start, planner=planner,
        **around(layer, lambda layer: _tapped(layer, path, mark)),
    )


def _outputs_of(state: State, mark: str) -> State:
    """The part of a state that holds outputs."""
    outputs = {}
    for name, part in state.items():
        if name != mark and isinstance(part, dict):
            below = _outputs_of(part, mark)
            if below:
                outputs[name] = below
    if mark in state:
        outputs[mark] = state[mark]
    return outputs


def _without_outputs(state: State, mark: str) -> State:
    """The state without outputs, and without parts that held nothing else."""
    rest = {}
    for name, part in without(state, (mark,)).items():
        if isinstance(part, dict):
            part = _without_outputs(part, mark)
            if not part:
                continue
        rest[name] = part
    return rest


def _with_outputs(state: State, outputs: State, mark: str) -> State:
    """The state with outputs at their places."""
    state = dict(state)
    for name, part in outputs.items():
        state[name] = part if name == mark else _with_outputs(state.get(name, {}), part, mark)
    return state


def _by_path(outputs: State, mark: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """The path and the output of every tapped layer."""
    for name, part in outputs.items():
        if name == mark:
            yield path, part
        else:
            yield from _by_path(part, mark, f"{path}/{name}" if path else name)
