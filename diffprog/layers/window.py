"""What convolutions and pools share: a window that slides over the axes before the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from diffprog.errors import LayerError

Sides = tuple[int, ...]
Padding = str | Sequence[tuple[int, int]]

AXES = {1: "(..., length, channels)", 2: "(..., height, width, channels)",
        3: "(..., depth, height, width, channels)"}


def sides(name: str, value: Any, dims: int) -> Sides:
    """One int for all axes, or one for each: always as a tuple of `dims` positive ints."""
    whole = (value,) * dims if isinstance(value, int) else value
    good = isinstance(whole, tuple) and len(whole) == dims
    if not (good and all(type(side) is int and side > 0 for side in whole)):
        raise LayerError(f"{name} as a positive int or a tuple of {dims}", repr(value),
                         "for example 2")
    return whole


def window(size: Any, dims: int) -> Sides:
    """The sides of the window; a tuple sets the number of axes itself."""
    dims = len(size) if isinstance(size, tuple) else dims
    if dims not in AXES:
        raise LayerError("a window over 1, 2 or 3 axes", f"{dims}",
                         "give a size of 1, 2 or 3 numbers")
    return sides("size", size, dims)


def margins(padding: Any, dims: int) -> Padding:
    """Padding as XLA takes it: "SAME", "VALID", or one pair (before, after) for each axis."""
    if isinstance(padding, str) and padding in ("SAME", "VALID"):
        return padding
    if type(padding) is int and padding >= 0:
        return ((padding, padding),) * dims
    pairs = padding if isinstance(padding, (tuple, list)) else ()
    flat = [n for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2 for n in pair]
    if len(flat) != 2 * dims or not all(type(n) is int and n >= 0 for n in flat):
        raise LayerError(f"padding 'SAME', 'VALID', an int, or {dims} pairs of ints", repr(padding),
                         "for example padding=1")
    return tuple((before, after) for before, after in pairs)


def on_images(f: Callable[[jax.Array], jax.Array], x: jax.Array, dims: int) -> jax.Array:
    """Apply f, which wants one batch axis, to x with any number of them."""
    batch = x.shape[: x.ndim - dims - 1]
    if len(batch) == 1:
        return f(x)
    y = f(x.reshape(-1, *x.shape[len(batch) :]))
    return y.reshape(*batch, *y.shape[1:])


def cannot_stream(*_: Any, **__: Any) -> NoReturn:
    """The `start` of a layer that sees the whole input at once."""
    raise LayerError("the whole input at once", "a streaming call",
                     "apply it without start")


def check_fits(x: jax.Array, y: Any, what: str) -> None:
    """Raise if a window was larger than what it slides over, which leaves no position."""
    if 0 in y.shape and 0 not in x.shape:
        raise LayerError(f"input at least as large as the {what}", f"{x.shape}",
                         "pad, or take a smaller window")
