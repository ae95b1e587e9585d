"""Errors speak one grammar: ``<path> (<layer>): wants X, got Y; <remedy>``.

A layer raises `LayerError(wants, got, remedy)` without knowing its place in a net. The record adds
the layer, and each program on the way out prepends a name to the path. Other exceptions keep their
type and get the same place as a note.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffprog.core.notation import clip, show

__all__ = ["LayerError"]


class LayerError(ValueError):
    """The one error of the library: ``<path> (<layer>): wants X, got Y; <remedy>``.

    Attributes:
        wants: what is required.
        got: what arrived instead.
        remedy: how to fix it; may be empty.
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


class signed:
    """A block whose exceptions name the layer that raised them, and its input; the innermost wins.

    A block with the `name` of a child prepends it to the path.
    """

    def __init__(self, layer: Callable[[], str], given: Any = None, name: str = "") -> None:
        self.layer, self.given, self.name = layer, given, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RecursionError):
            with signed(self.layer, self.given, self.name):
                raise LayerError(
                    "a net nested less deeply",
                    "more levels than Python's stack holds",
                    "write repeat(n, layer) for copies, or "
                    "layer ** n for a chain: neither adds depth") from None
        if isinstance(error, LayerError):
            error.layer = error.layer or clip(self.layer())
            error.path = _below(self.name, error.path)
        elif isinstance(error, Exception):
            notes = getattr(error, "__notes__", [])
            at = [i for i, note in enumerate(notes) if isinstance(note, _Place)]
            if at:
                notes[at[0]] = _Place(notes[at[0]].what, _below(self.name, notes[at[0]].path))
            else:
                given = "" if self.given is None else f" given {show(self.given)}"
                error.add_note(_Place(clip(self.layer()) + given, self.name))


class _Place(str):
    """A note with the place of an exception other than `LayerError`."""

    def __new__(cls, what: str, path: str) -> _Place:
        return super().__new__(cls, f"at {path}: {what}" if path else f"at {what}")

    def __init__(self, what: str, path: str) -> None:
        self.what, self.path = what, path


def _below(name: str, path: str) -> str:
    whole = "/".join(filter(None, (name, path)))
    return whole if len(whole) <= 120 else f"{name}/.../{path.rpartition('/')[2]}"
