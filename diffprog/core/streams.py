"""The state of a stream: what `start` adds to what `init` returned.

Nothing here remembers a stream. The names that are carried follow from the shapes of a call; side
inputs that need not be passed again (`kept`) are recorded in the state itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.computed import Computed, Expanded
from diffprog.core.errors import LayerError
from diffprog.core.plans import Params, State, remember, spec
from diffprog.core.records import Record

_KEPT = "#kept"  # a reserved key: no child has this name


def carrying(start: Any) -> Callable[..., State]:
    """``(params, state, x, side) -> carried``, the shapes of what `start` returns."""
    return remember(lambda params, state, x, side: jax.eval_shape(
        lambda *trees: start(*trees, length=1, **side), params, state, x))


def foreign(
    layer: Record, params: Params, state: State, rest: State, x: Any, side: dict[str, Any]
) -> set[str]:
    """The names in a state that are neither in the initial state nor carried by a stream."""
    names = state.keys() - rest.keys()
    if not names or not layer.start:
        return names
    given = {name: part for name, part in state.items() if name in rest}
    for beside in (side, {}):
        try:
            return names - layer._carried(*spec((params, given, x, beside))).keys()
        except LayerError:
            continue  # no stream, or none with these side inputs
        except Exception:
            return set()  # `apply` fails on this input too, with a better error
    return set() if layer.kept - side.keys() else names


def parted(layer: Record, state: State, at_rest: Callable[[], State]) -> tuple[State, State]:
    """A state split into what `init` returns and what a stream carries.

    Names tell them apart, except in layers without children that stream and have an initial state:
    then ``at_rest()``, the planned state, decides, unless it needs inputs that this call lacks.
    """
    rest, carried = _split(state, _resting(layer, state))
    if carried:
        with contextlib.suppress(Exception):
            return _split(state, at_rest())
    return rest, carried


def miscounted(name: str, calls: int) -> LayerError:
    """The error for a streaming call whose number of calls of a child differs from `start`'s."""
    return LayerError(f"as many calls of {name} as start made", f"{calls}",
                      "start a new stream with the same inputs")


def noted(layer: Record, state: State, side: dict[str, Any]) -> State:
    """The state with the shapes of the side inputs that need not be passed again.

    They are stored as arrays without entries, which stack and split as other states do, so that
    each stream of a net has its own.
    """
    kept = {name: side[name] for name in layer.kept & side.keys()}
    if not kept:
        return state
    outermost = next(iter(note_of(state)), _KEPT[1:])
    return {**state, f"#{outermost}": jax.tree.map(
        lambda a: jnp.zeros((0, *a.shape), a.dtype), kept)}


def note_of(state: State) -> State:
    """The entry that `noted` has added to a state, the outermost if there are several."""
    name = max((name for name in state if name.endswith(_KEPT)), key=len, default="")
    return {name: state[name]} if name else {}


def without(state: State, names: Collection[str]) -> State:
    """The state without these names."""
    return {name: part for name, part in state.items() if name not in names}


def recalled(note: State) -> dict[str, Any]:
    """The shapes in an entry of `noted`."""
    (shapes,) = note.values() or ({},)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), shapes)


def _split(state: State, form: State) -> tuple[State, State]:
    """The state split into the parts at the paths of `form`, and the others."""
    inside, outside = {}, {}
    for name, part in state.items():
        if name not in form or isinstance(part, dict) > isinstance(form[name], dict):
            outside[name] = part
        elif isinstance(part, dict):
            below = _split(part, form[name])
            for tree, half in zip((inside, outside), below, strict=True):
                if half:
                    tree[name] = half
        else:
            inside[name] = part
    return inside, outside


def _resting(layer: Record, state: State) -> State:
    """The initial part of a state, by names: a layer without children carries all of its state."""
    if not layer.start:
        return state
    marks = {own.mark for own in layer.computed if isinstance(own, (Computed, Expanded))}
    rest = {name: part for name, part in state.items() if name in marks}
    for name, child in layer.children.items():
        if below := _resting(child, state.get(name, {})):
            rest[name] = below
    return rest
