"""Receptive fields: the input positions that one output of a convolution or a pool depends on."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from diffprog.core.layer import Layer
from diffprog.core.nets import is_window


class Field(NamedTuple):
    """The receptive field along each spatial axis; empty before the first window.

    Attributes:
        size: of the field, in input positions.
        stride: between the fields of neighbouring outputs, in input positions.
    """

    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


class Reach(NamedTuple):
    """The first and last input position that output 0 depends on, and the stride.

    Where branches meet, their windows may lie side by side, so sizes alone do not suffice.
    """

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()

    @property
    def field(self) -> Field:
        """Its size and stride."""
        return Field(tuple(b - a + 1 for a, b in zip(self.first, self.last, strict=True)),
                     self.stride)


def behind(layer: Layer, x: Any, y: Any, reach: Reach | None) -> Reach | None:
    """The reach after a layer without children; None if it is unknown from here on.

    A window of K positions with `dilation` and `stride` starts earlier by the padding before it,
    and widens the field by ``(K - 1) * dilation`` strides. Position-wise layers keep the reach. A
    layer that changes positions otherwise, or may mix them as it has a `start`, ends it.

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
        return None  # other axes than those of the windows before
    wider = tuple((k - 1) * d for k, d in zip(size, dilation, strict=True))
    before = _before(layer.settings["padding"], wider, stride, x.shape[-dims - 1 : -1])
    first = tuple(a - b * s for a, b, s in zip(reach.first, before, reach.stride, strict=True))
    last = tuple(a + (w - b) * s
                 for a, w, b, s in zip(reach.last, wider, before, reach.stride, strict=True))
    return Reach(first, last, tuple(s * t for s, t in zip(reach.stride, stride, strict=True)))


def _before(
    padding: Any, wider: tuple[int, ...], stride: tuple[int, ...], sides: tuple[int, ...]
) -> tuple[int, ...]:
    """The padding before each axis."""
    if padding == "CAUSAL":
        return wider
    if isinstance(padding, str):
        pairs = jax.lax.padtype_to_pads(sides, [w + 1 for w in wider], stride, padding)
        return tuple(before for before, _ in pairs)
    if isinstance(padding, int):
        return (padding,) * len(wider)
    return tuple(before for before, _ in padding)


def repeated(before: Reach | None, once: Reach | None, times: int) -> Reach | None:
    """The reach after `times` copies of the layer that turns `before` into `once`."""
    if times == 1 or before is None or once is None or not once.stride:
        return once
    none = (0,) * len(once.stride)
    further = lambda old, new: tuple(  # noqa: E731
        a + times * (b - a) for a, b in zip(old or none, new, strict=True))
    return Reach(further(before.first, once.first), further(before.last, once.last), once.stride)


class Ways:
    """The reach of each array inside a program; where branches meet, their union."""

    def __init__(self, start: Reach | None) -> None:
        self._known: dict[int, Reach | None] = {}
        self._kept: list[Any] = []  # an id is unique only while its array is alive
        self._seen = [start]

    def put(self, y: Any, reach: Reach | None) -> None:
        """Note the reach of an array."""
        self._kept.append(y)
        self._known[id(y)] = reach
        self._seen.append(reach)

    def get(self, x: Any) -> Reach | None:
        """The reach of an array, or the union for a computed one."""
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
