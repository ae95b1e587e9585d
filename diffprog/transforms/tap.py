"""Activations of inner layers, or attention weights, returned beside the output of a net.

A tapped layer writes its output into the state, which every combinator passes on: `repeat` stacks
it, `heads` maps it, `remat` recomputes it. Around the net the outputs are removed from the state
again, so that its structure does not change.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, Weighs, around, as_layer
from diffprog.core.loops import listening, tell
from diffprog.core.nets import visits
from diffprog.core.notation import listed
from diffprog.core.paths import joined, part_at, put
from diffprog.core.plans import Params, Plan, State, blank, remember, spec
from diffprog.core.streams import note_of, noted, recalled, without
from diffprog.transforms.replace import edited

__all__ = ["tap"]

_COUNT = itertools.count()


@factory
def tap(layer: Any, pattern: str, *, attention_weights: bool = False) -> Layer:
    """Return intermediate activations with the output: ``(y, {path: activation})``.

    An activation is the output of a matched layer. Gradients flow through it, so that a loss may
    use it. Inside `repeat`, `heads` and `ensemble` it gets their leading axis of copies. Names,
    parameters and state of the net are unchanged. To tap a value inside a program, call a named
    identity child on it, ``mark=lambda x: x``.

    With `attention_weights` it is the weights (..., heads, query, key) of a matched attention
    layer. Each row sums to 1, or is 0 if the query attends to no key; in training these are the
    weights after dropout. In a stream the keys are all slots of the cache, or the last window - 1
    steps and the chunk. The formula replaces cuDNN's kernel, which keeps no weights.

    Args:
        layer: a layer with children.
        pattern: paths of layers; ``*`` matches one level and ``**`` any number of levels.
        attention_weights: return the weights of the attention layers among them, and nothing of
            other layers.

    Raises:
        LayerError: at composition, if the pattern matches no layer, or no attention layer with
            `attention_weights`; at ``init``, unless every matched layer is called exactly once; at
            ``apply``, if one is not called in training, or at inference.

    Example:
        >>> net = dp.tap(dp.repeat(3, dp.linear(4) >> jnp.tanh), "tanh~0")
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> y, seen = net(params, jnp.ones((2, 4)))
        >>> {path: activation.shape for path, activation in seen.items()}
        {'tanh~0': (3, 2, 4)}
        >>> net = dp.tap(dp.models.gpt(7, width=8, depth=2, heads=4), "**", attention_weights=True)
        >>> params, state = net.init(jax.random.key(0), jnp.array([[3, 1, 2]]))
        >>> logits, seen = net(params, jnp.array([[3, 1, 2]]))
        >>> {path: weights.shape for path, weights in seen.items()}
        {'trunk/blocks/attend/body': (2, 1, 4, 3, 3)}
    """
    layer = as_layer(layer)
    net = _Tap(layer, pattern, attention_weights)
    return dataclasses.replace(
        layer, apply=net.apply, start=net.inner.start and net.start, planner=net.plan,
        **around(layer, lambda layer: tap(layer, pattern, attention_weights=attention_weights)),
    )


def is_output(name: str) -> bool:
    """Is this a name under which `tap` writes an output into the state?"""
    return name[:1] == "#" and name[1:].isdecimal()


class _Tap:
    """The functions of the layer `tap`: plan, apply and start."""

    def __init__(self, layer: Layer, pattern: str, weights: bool) -> None:
        self.layer = layer
        self.mark = f"#{next(_COUNT)}"  # the name of outputs in the state, different for each tap
        self.paths: list[str] = []
        self.weighs: dict[str, Weighs] = {}  # of attention layers whose weights are returned

        def tapped(path: str, child: Layer) -> Layer:
            if not weights:
                self.paths.append(path)
                return _tapped(child, path, self.mark)
            inmost = _inmost(child)
            if inmost.weighs is None:
                return child
            self.paths.append(path)
            self.weighs[path] = inmost.weighs
            return _weighed(child, path, self.mark)

        self.inner = edited(layer, pattern, tapped)
        if not self.paths:
            raise LayerError(
                f"a pattern that matches an attention layer ({listed(_attentions(layer, ''))})",
                repr(pattern), "correct it: * is one level, ** any number")
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
        outputs = self.outputs(spec(x), spec(side))
        for path, weighs in self.weighs.items():
            own = part_at(state, path)
            if own and "key" in own:  # the cache of a stream, which has keys of its own number
                place = part_at(outputs, path)[self.mark]
                *axes, steps, _ = place.shape
                place = jax.ShapeDtypeStruct(
                    (*axes, steps, weighs.keys(own, steps)), place.dtype)
                outputs = put(outputs, path, {self.mark: place})
        return _with_outputs(state, blank(outputs), self.mark)


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

    return dataclasses.replace(
        layer, init=init, apply=apply, start=layer.start and _keeping(layer, mark),
        planner=planner, **around(layer, lambda layer: _tapped(layer, path, mark)),
    )


def _inmost(layer: Layer) -> Layer:
    """The layer inside all wrappers."""
    while layer.wraps:
        layer = layer.wraps.layer
    return layer


def _attentions(layer: Layer, path: str) -> list[str]:
    """The paths of the attention layers in a layer."""
    found = [path] if _inmost(layer).weighs else []
    for name, child in layer.children.items():
        found += _attentions(as_layer(child), joined(path, name))
    return found


def _weighed(layer: Layer, path: str, mark: str) -> Layer:
    """An attention layer, also in wrappers, whose state holds its weights under the name `mark`."""
    if layer.weighs is None:
        assert layer.within is not None
        return layer.within(lambda part: _weighed(part, path, mark) if _inmost(part).weighs
                            else part)
    attend = layer.weighs.apply

    def planner(x: Any, side: dict[str, Any]) -> Plan:
        plan = layer.plan(x, **side)
        (_, weights), _ = jax.eval_shape(attend, plan.params, plan.state, x, **side)
        return dataclasses.replace(plan, state={**plan.state, mark: weights})

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        params, state = layer.init(key, x, **side)
        return params, {**state, mark: blank(planner(spec(x), spec(side)).state[mark])}

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        tell((mark, path))
        (y, weights), new = attend(
            params, without(state, (mark,)), x, key=key, train=train, **side)
        return y, {**new, mark: weights.astype(state[mark].dtype)}

    return dataclasses.replace(
        layer, init=init, apply=apply, start=layer.start and _keeping(layer, mark),
        planner=planner)


def _keeping(layer: Layer, mark: str) -> Callable[..., State]:
    """The `start` of a tapped layer, with the place of its output."""

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        carried = layer.start(params, without(state, (mark,)), x, length=length, **side)
        return {**carried, mark: state[mark]}

    return start


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
