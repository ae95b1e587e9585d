"""Errors speak one grammar: ``<path> (<layer>): wants X, got Y; <remedy>``.

A layer raises `LayerError(wants, got, remedy)` and knows nothing of where it stands. The layer that
runs it signs the error, and every program on the way out puts one name in front of the path. Other
exceptions keep their type and receive the same place as a note.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from diffprog.notation import clip, show


class LayerError(ValueError):
    """The one error of the library: ``<path> (<layer>): wants X, got Y; <remedy>``.

    Attributes:
        wants: what would have been right.
        got: what arrived instead.
        remedy: what to do about it; may be empty.
        path: the names of the children that lead to the layer, joined by ``/``.
        layer: the layer as its ``repr`` shows it.

    Example:
        >>> net = dp.serial(head=dp.residual(dp.linear(9)))
        >>> try:
        ...     net.init(jax.random.key(0), jnp.ones((2, 3)))
        ... except dp.LayerError as error:
        ...     print(error)
        head (residual(linear(9))): wants a body that keeps the shape of x,
        float32[2,3], got float32[2,9]; give it as many features, or a shortcut of the same shape
    """

    def __init__(self, wants: str, got: str = "", remedy: str = "") -> None:
        super().__init__(wants, got, remedy)
        self.wants, self.got, self.remedy = wants, got, remedy
        self.path = self.layer = ""

    def __str__(self) -> str:
        layer = f" ({self.layer})" if self.path and self.layer else self.layer
        where = f"{self.path}{layer}: " if self.path or layer else ""
        got = f", got {self.got}" if self.got else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{where}wants {self.wants}{got}{remedy}"


class _Place(str):
    """The note that tells where an exception that is no `LayerError` was raised."""

    path: tuple[str, ...]
    what: str

    @classmethod
    def of(cls, path: tuple[str, ...], what: str) -> _Place:
        place = cls(f"at {'/'.join(path)}: {what}" if path else f"at {what}")
        place.path, place.what = path, what
        return place


def sign(error: Exception, layer: str, given: Any = None) -> None:
    """Write into `error` which layer raised it, given what; the innermost layer signs first."""
    if isinstance(error, LayerError):
        error.layer = error.layer or clip(layer)
    elif not any(isinstance(note, _Place) for note in getattr(error, "__notes__", ())):
        error.add_note(_Place.of((), f"{clip(layer)} given {show(given)}"))


def lengthen(error: Exception, name: str) -> None:
    """Put one more name in front of the path that `error` carries."""
    if isinstance(error, LayerError):
        error.path = f"{name}/{error.path}" if error.path else name
        return
    notes = getattr(error, "__notes__", [])
    for i, note in enumerate(notes):
        if isinstance(note, _Place):
            notes[i] = _Place.of((name, *note.path), note.what)


def check_array(x: Any, rank: int = 0, axes: str = "", *, floating: bool = True) -> None:
    """Raise unless x is one array with at least `rank` axes, of floats unless told otherwise."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise LayerError("one array", show(x), "pick one part of it with a lambda")
    if len(x.shape) < rank:
        raise LayerError(f"at least {rank} axes{axes and ' '}{axes}", show(x),
                         "add the missing axes")
    if floating and not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError("floating-point input", show(x), "convert it: x.astype(jnp.float32)")


def check_features(wanted: int, x: Any) -> None:
    """Raise unless the last axis of x has the size that the parameters were made for."""
    if x.shape[-1] != wanted:
        raise LayerError(f"{wanted} features on the last axis, as init saw", show(x),
                         "init anew on input of this shape, or mend the layer before")


def check_leaves(params: Any, features: int) -> None:
    """Raise unless every leaf has `features` on its last axis: a single one would broadcast."""
    if any(leaf.shape[-1] != features for leaf in params.values()):
        raise LayerError(f"params of {features} features", show(params), "pass what init gave")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless `value` is a Python int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LayerError(f"{name}, an int of at least {least}", repr(value), "pass a Python int")


def check_share(name: str, value: Any) -> None:
    """Raise unless `value` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise LayerError(f"{name} in [0, 1)", repr(value), "pass a share, not a percentage")
