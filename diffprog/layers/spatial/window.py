"""What convolutions and pools share: a window that slides over the axes before the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from diffprog.core.errors import LayerError
from diffprog.core.masks import cleared, refuse_segments
from diffprog.core.notation import listed, show

Sides = tuple[int, ...]
Pairs = Sequence[tuple[int, int]]
Padding = str | Pairs

AXES = {1: "(..., length, channels)", 2: "(..., height, width, channels)",
        3: "(..., depth, height, width, channels)"}
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def sides(name: str, value: Any, dims: int, *, least: int = 1) -> Sides:
    """One int for all axes, or one for each: always as a tuple of `dims` ints from `least` on."""
    whole = (value,) * dims if isinstance(value, int) else value
    good = isinstance(whole, tuple) and len(whole) == dims
    if not (good and all(type(side) is int and side >= least for side in whole)):
        kind = "a positive" if least else "a non-negative"
        raise LayerError(f"{name} as {kind} int or a tuple of {dims}", repr(value),
                         "pass 2, for example")
    return whole


def window(size: Any, dims: int, name: str = "size") -> Sides:
    """The sides of the window; a tuple sets the number of axes itself."""
    dims = len(size) if isinstance(size, tuple) else dims
    if dims not in AXES:
        raise LayerError("a window over 1, 2 or 3 axes", f"{dims}",
                         "give a size of 1, 2 or 3 numbers")
    return sides(name, size, dims)


def extents(size: Sides, dilation: Sides) -> Sides:
    """How many places the window spans on each axis, those between its entries included."""
    return tuple(d * (n - 1) + 1 for n, d in zip(size, dilation, strict=True))


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
                         "pass padding=1, for example")
    return tuple((before, after) for before, after in pairs)


def pairs_for(margin: Padding, x: jax.Array, extent: Sides, stride: Sides) -> Pairs:
    """The pairs (before, after) that "SAME" or "VALID" means on x of one batch axis."""
    if isinstance(margin, str):
        return jax.lax.padtype_to_pads(x.shape[1:-1], extent, stride, margin)
    return margin


def check_mode(mode: Any) -> None:
    """Raise unless `mode` names a way to continue x beyond its borders."""
    if mode not in tuple(MODES):
        raise LayerError(f"padding_mode out of {listed(MODES)}", repr(mode),
                         "choose 'zeros', the usual one")


def continued(x: jax.Array, pairs: Pairs, mode: str) -> jax.Array:
    """x of one batch axis, continued beyond its borders by its own values."""
    for side, pair in zip(x.shape[1:-1], pairs, strict=True):
        room = {"reflect": side - 1, "circular": side}.get(mode, max(pair))
        if max(pair) > room:
            raise LayerError(f"{mode} padding of at most {room} places on a side of {side}",
                             f"{pair}", "pad less, or choose padding_mode='replicate'")
    return jnp.pad(x, [(0, 0), *pairs, (0, 0)], mode=MODES[mode])


def on_images(f: Callable[..., jax.Array], dims: int, *arrays: jax.Array) -> jax.Array:
    """Apply f, which wants one batch axis, to arrays with the same, of any number."""
    batch = arrays[0].shape[: arrays[0].ndim - dims - 1]
    if len(batch) == 1:
        return f(*arrays)
    y = f(*(a.reshape(math.prod(batch), *a.shape[len(batch) :]) for a in arrays))
    return y.reshape(*batch, *y.shape[1:])


def takes(dims: int) -> frozenset[str]:
    """The side inputs: a mask where the one axis is time; segments too, if only to refuse them."""
    return frozenset({"mask", "segments"} if dims == 1 else {"segments"})


def check_length(
    mask: Any, x: Any, margin: Padding, extent: Sides, stride: Sides, mode: str = "zeros"
) -> None:
    """Raise if what is made of real steps would depend on how many others come after them."""
    if mask is None or mask.ndim < x.ndim - 1:  # one of whole examples
        return
    if mode != "zeros" and margin != "VALID":
        raise LayerError("padding_mode='zeros' with a mask", repr(mode), "pass it: the border of x "
                         "is not that of its real steps")
    firsts = {jax.lax.padtype_to_pads((side,), extent, stride, "SAME")[0][0]
              for side in range(1, stride[0] + 1)}
    if margin == "SAME" and len(firsts) > 1:
        raise LayerError("padding in numbers where a mask meets a stride", "'SAME'",
                         "pass padding=1, for example: how much 'SAME' puts before the first step "
                         "depends on how long x is")


def reach_back(
    segments: Any, margin: Padding, extent: Sides, stride: Sides, mode: str = "zeros"
) -> int:
    """How many places before a step its window begins, if each step has one; else raise."""
    if extent[1:]:
        refuse_segments(segments, "an image has no steps")
    before, after = (jax.lax.padtype_to_pads(extent, extent, (1,), margin)
                     if isinstance(margin, str) else margin)[0]
    if (stride, mode, before + after) != ((1,), "zeros", extent[0] - 1):
        raise LayerError("a window of each step, in zeros, where there are segments",
                         f"stride={stride[0]}, padding={margin!r} and {mode!r}",
                         "pass stride=1 and padding='SAME', or give each sequence a row")
    return before


def apart(
    x: jax.Array, runs: jax.Array, size: int, dilation: int, back: int
) -> tuple[jax.Array, jax.Array]:
    """The windows of all steps side by side, (..., steps * size, C), and what counts in them.

    What does is of the same run, from 0 on, as the window's own step, `back` places after its first
    one; zeros stand in the place of the rest.
    """
    count = x.shape[-2] - dilation * (size - 1)
    parts = [slice(q * dilation, q * dilation + count) for q in range(size)]
    own = runs[..., back : back + count]
    same = jnp.stack([(runs[..., part] == own) & (own >= 0) for part in parts], -1)
    windows = cleared(jnp.stack([x[..., part, :] for part in parts], -2), same)
    same = same.reshape(*same.shape[:-2], count * size)
    return windows.reshape(*same.shape, x.shape[-1]), same


def cannot_stream(*_: Any, **__: Any) -> NoReturn:
    """The `start` of a layer that sees the whole input at once."""
    raise LayerError("the whole input at once", "a streaming call",
                     "apply it without start")


def check_fits(x: jax.Array, y: Any, what: str) -> None:
    """Raise if a window was larger than what it slides over, which leaves no position."""
    if 0 in y.shape and 0 not in x.shape:
        raise LayerError(f"input at least as large as the {what}", show(x),
                         "pad, or take a smaller window")
