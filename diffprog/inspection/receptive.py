"""Receptive fields: how much of a net's input one place behind a convolution or a pool sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from diffprog.core.layer import Layer
from diffprog.core.nets import is_window


class Field(NamedTuple):
    """What one place sees, along each axis of space; empty before the first window.

    Attributes:
        size: how many places of the input it sees.
        stride: how many places of the input its neighbour looks further.
    """

    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


class Reach(NamedTuple):
    """From which place of the input to which the place 0 sees, and how far it moves.

    Where ways meet, their windows may stand beside each other: sizes alone would not tell.
    """

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()

    @property
    def field(self) -> Field:
        """What is shown of it."""
        return Field(tuple(b - a + 1 for a, b in zip(self.first, self.last, strict=True)),
                     self.stride)


def behind(layer: Layer, x: Any, y: Any, reach: Reach | None) -> Reach | None:
    """The reach behind a layer without children; None where there is none any more.

    A window of K places at distance `dilation`, moved by `stride`, begins as many strides earlier
    as are padded before it, and widens the field by ``(K - 1) * dilation`` strides. Position-wise
    layers keep it; what changes the places otherwise, or has a `start` and so may mix them, ends
    it.

    Source: Araujo, Norris, Sim 2019, Distill, "Computing receptive fields of convolutional neural
    networks", eq. 2.
    """
    if reach is None or not is_window(layer):
        return reach if _places(x) == _places(y) and layer.start is None else None
    size = _each(layer.settings["size"], layer.settings["dims"])
    dims = len(size)
    stride = _each(layer.settings["stride"] or size, dims)
    dilation = _each(layer.settings.get("dilation", 1), dims)
    if not reach.stride:
        reach = Reach((0,) * dims, (0,) * dims, (1,) * dims)
    if len(reach.stride) != dims:
        return None  # its axes are not those of the windows before it
    wider = tuple((k - 1) * d for k, d in zip(size, dilation, strict=True))
    before = _before(layer.settings["padding"], wider, stride, x.shape[-dims - 1 : -1])
    first = tuple(a - b * s for a, b, s in zip(reach.first, before, reach.stride, strict=True))
    last = tuple(a + (w - b) * s
                 for a, w, b, s in zip(reach.last, wider, before, reach.stride, strict=True))
    return Reach(first, last, tuple(s * t for s, t in zip(reach.stride, stride, strict=True)))


def _before(
    padding: Any, wider: tuple[int, ...], stride: tuple[int, ...], sides: tuple[int, ...]
) -> tuple[int, ...]:
    """How many places are padded before each axis."""
    if padding == "CAUSAL":
        return wider
    if isinstance(padding, str):
        pairs = jax.lax.padtype_to_pads(sides, [w + 1 for w in wider], stride, padding)
        return tuple(before for before, _ in pairs)
    if isinstance(padding, int):
        return (padding,) * len(wider)
    return tuple(before for before, _ in padding)


def repeated(before: Reach | None, once: Reach | None, times: int) -> Reach | None:
    """The reach behind `times` copies of what turns `before` into `once`."""
    if times == 1 or before is None or once is None or not once.stride:
        return once
    none = (0,) * len(once.stride)
    further = lambda old, new: tuple(  # noqa: E731
        a + times * (b - a) for a, b in zip(old or none, new, strict=True))
    return Reach(further(before.first, once.first), further(before.last, once.last), once.stride)


class Ways:
    """Which reach the arrays inside a program have; where ways met, all that they see together."""

    def __init__(self, start: Reach | None) -> None:
        self._known: dict[int, Reach | None] = {}
        self._kept: list[Any] = []  # an id is that of an array only as long as the array lives
        self._seen = [start]

    def put(self, y: Any, reach: Reach | None) -> None:
        """Note the reach of an array."""
        self._kept.append(y)
        self._known[id(y)] = reach
        self._seen.append(reach)

    def get(self, x: Any) -> Reach | None:
        """The reach of an array, or of what was computed from several."""
        return self._known[id(x)] if id(x) in self._known else _joined(self._seen)


def _joined(ways: list[Reach | None]) -> Reach | None:
    known = [reach for reach in ways if reach is not None]
    if len(known) < len(ways):
        return None
    axes = max(len(reach.stride) for reach in known)
    first, last, stride = (list(zip(*each, strict=True)) for each in zip(
        *(reach for reach in known if len(reach.stride) == axes), strict=True))
    return Reach(tuple(map(min, first)), tuple(map(max, last)), tuple(map(max, stride)))


def _places(x: Any) -> Any:
    return [leaf.shape[:-1] for leaf in jax.tree.leaves(x)]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)
