"""The state of a stream: what `start` put into it beside that which `init` gave.

Nothing here remembers which stream there was. Which names are carried follows from the shapes of a
call; what a call is not given again (`kept`), from the state itself.
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

_KEPT = "#kept"  # as no child is called


def carrying(start: Any) -> Callable[..., State]:
    """The shapes of what `start` gives, ``(params, state, x, side) -> carried``."""
    return remember(lambda params, state, x, side: jax.eval_shape(
        lambda *trees: start(*trees, length=1, **side), params, state, x))


def foreign(
    layer: Record, params: Params, state: State, rest: State, x: Any, side: dict[str, Any]
) -> set[str]:
    """The names in a state that neither stand in that at rest nor are carried by a stream."""
    names = state.keys() - rest.keys()
    if not names or not layer.start:
        return names
    given = {name: part for name, part in state.items() if name in rest}
    for beside in (side, {}):
        try:
            return names - layer._carried(*spec((params, given, x, beside))).keys()
        except LayerError:
            continue  # it cannot stream, or not with these
        except Exception:
            return set()  # on such an input `apply` fails as well, and explains it
    return set() if layer.kept - side.keys() else names


def parted(layer: Record, state: State, at_rest: Callable[[], State]) -> tuple[State, State]:
    """A state as what `init` gives, and what a stream carries beside it.

    Names tell them apart, but for leaves that stream and have a state at rest of their own: then
    ``at_rest()`` is asked, the plan, unless that would take inputs that this call is not given.
    """
    rest, carried = _split(state, _resting(layer, state))
    if carried:
        with contextlib.suppress(Exception):
            return _split(state, at_rest())
    return rest, carried


def miscounted(name: str, calls: int) -> LayerError:
    """What is wrong with a streaming call that makes other calls of a child than `start` made."""
    return LayerError(f"as many calls of {name} as start made", f"{calls}",
                      "start anew with the same inputs")


def noted(layer: Record, state: State, side: dict[str, Any]) -> State:
    """The state with the shapes of the side inputs that need not be passed again.

    They are those of arrays without entries: as shapes they stack, grow and shrink as other states
    do, and two streams of one net know each their own.
    """
    kept = {name: side[name] for name in layer.kept & side.keys()}
    if not kept:
        return state
    outermost = next(iter(note_of(state)), _KEPT[1:])
    return {**state, f"#{outermost}": jax.tree.map(
        lambda a: jnp.zeros((0, *a.shape), a.dtype), kept)}


def note_of(state: State) -> State:
    """What `noted` has put into a state, the outermost if there are several."""
    name = max((name for name in state if name.endswith(_KEPT)), key=len, default="")
    return {name: state[name]} if name else {}


def without(state: State, names: Collection[str]) -> State:
    """The state without what has one of these names."""
    return {name: part for name, part in state.items() if name not in names}


def recalled(note: State) -> dict[str, Any]:
    """The shapes in such a note."""
    (shapes,) = note.values() or ({},)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), shapes)


def _split(state: State, form: State) -> tuple[State, State]:
    """The state as what stands at the paths of `form`, and what does not."""
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
    """The part of a state at rest, told by names: a leaf that streams carries all that it has."""
    if not layer.start:
        return state
    marks = {own.mark for own in layer.computed if isinstance(own, (Computed, Expanded))}
    rest = {name: part for name, part in state.items() if name in marks}
    for name, child in layer.children.items():
        if below := _resting(child, state.get(name, {})):
            rest[name] = below
    return rest
