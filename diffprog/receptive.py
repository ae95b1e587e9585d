"""Receptive fields: how much of a net's input one place behind a convolution or a pool sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from diffprog.layer import Layer

_WINDOWS = frozenset({"conv", "depthwise_conv", "max_pool", "avg_pool"})


class Field(NamedTuple):
    """What one place sees, along each axis of space; empty before the first window.

    Attributes:
        size: how many places of the input it sees.
        stride: how many places of the input its neighbour looks further.
    """

    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


def behind(layer: Layer, x: Any, y: Any, field: Field | None) -> Field | None:
    """The field behind a layer without children; None where there is none any more.

    A window of K places at distance `dilation`, moved by `stride`, widens the field by
    ``(K - 1) * dilation`` strides. Position-wise layers keep it; what changes the places otherwise,
    or has a `start` and so may mix them, ends it.

    Source: Araujo, Norris, Sim 2019, Distill, "Computing receptive fields of convolutional neural
    networks", eq. 2.
    """
    if field is None or not is_window(layer):
        return field if _places(x) == _places(y) and layer.start is None else None
    size = _each(layer.settings["size"], layer.settings["dims"])
    dims = len(size)
    stride = _each(layer.settings["stride"] or size, dims)
    dilation = _each(layer.settings.get("dilation", 1), dims)
    if not field.size:
        field = Field((1,) * dims, (1,) * dims)
    if len(field.size) != dims:
        return None  # its axes are not those of the windows before it
    seen = zip(field.size, field.stride, size, dilation, strict=True)
    return Field(
        tuple(r + (k - 1) * d * s for r, s, k, d in seen),
        tuple(s * t for s, t in zip(field.stride, stride, strict=True)),
    )


def is_window(layer: Layer) -> bool:
    """Is it a convolution or a pool with a window?"""
    return layer.name in _WINDOWS and not layer.children


def repeated(before: Field | None, once: Field | None, times: int) -> Field | None:
    """The field behind `times` copies of what turns `before` into `once`."""
    if times == 1 or before is None or once is None or not once.size:
        return once
    first = before.size or (1,) * len(once.size)
    return Field(tuple(r + times * (n - r) for r, n in zip(first, once.size, strict=True)),
                 once.stride)


class Ways:
    """Which field the arrays inside a program carry; where ways met, the widest one."""

    def __init__(self, start: Field | None) -> None:
        self._known: dict[int, Field | None] = {}
        self._kept: list[Any] = []  # an id is that of an array only as long as the array lives
        self._seen = [start]

    def put(self, y: Any, field: Field | None) -> None:
        """Note the field of an array."""
        self._kept.append(y)
        self._known[id(y)] = field
        self._seen.append(field)

    def get(self, x: Any) -> Field | None:
        """The field of an array, or of what was computed from several."""
        return self._known[id(x)] if id(x) in self._known else _widest(self._seen)


def _widest(fields: list[Field | None]) -> Field | None:
    known = [field for field in fields if field is not None]
    if len(known) < len(fields):
        return None
    axes = max(len(field.size) for field in known)
    known = [field for field in known if len(field.size) == axes]
    return Field(tuple(map(max, zip(*(field.size for field in known), strict=True))),
                 tuple(map(max, zip(*(field.stride for field in known), strict=True))))


def _places(x: Any) -> Any:
    return [leaf.shape[:-1] for leaf in jax.tree.leaves(x)]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)
