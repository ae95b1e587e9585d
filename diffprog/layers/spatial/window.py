"""Shared by convolutions and pools: a window that slides over the spatial axes of x."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from diffprog.core.errors import LayerError
from diffprog.core.masks import cleared, refuse_segments
from diffprog.core.notation import listed, show

Edges = tuple[int, ...]  # one int for each spatial axis
Pairs = Sequence[tuple[int, int]]  # (before, after) for each spatial axis
Padding = str | Pairs

AXES = {1: "(..., length, channels)", 2: "(..., height, width, channels)",
        3: "(..., depth, height, width, channels)"}
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def edges(name: str, value: Any, dims: int, *, least: int = 1) -> Edges:
    """A tuple of `dims` ints, each at least `least`, from one int for all axes or one for each."""
    whole = (value,) * dims if isinstance(value, int) else value
    good = isinstance(whole, tuple) and len(whole) == dims
    if not (good and all(type(edge) is int and edge >= least for edge in whole)):
        kind = "a positive" if least else "a non-negative"
        raise LayerError(f"{name} as {kind} int or a tuple of {dims}", repr(value),
                         "pass 2, for example")
    return whole


def window(size: Any, dims: int, name: str = "size") -> Edges:
    """The edges of the window; a tuple sets the number of axes itself."""
    dims = len(size) if isinstance(size, tuple) else dims
    if dims not in AXES:
        raise LayerError("a window over 1, 2 or 3 axes", f"{dims}",
                         "pass a size of 1, 2 or 3 numbers")
    return edges(name, size, dims)


def extents(size: Edges, dilation: Edges) -> Edges:
    """The number of positions that a window spans on each axis, gaps included."""
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


def pairs_for(margin: Padding, x: jax.Array, extent: Edges, stride: Edges) -> Pairs:
    """The pairs (before, after) of a margin on x with one batch axis."""
    if isinstance(margin, str):
        return jax.lax.padtype_to_pads(x.shape[1:-1], extent, stride, margin)
    return margin


def check_mode(mode: Any) -> None:
    """Raise unless `mode` names a padding mode."""
    if mode not in tuple(MODES):
        raise LayerError(f"padding_mode out of {listed(MODES)}", repr(mode),
                         "choose 'zeros', the default")


def continued(x: jax.Array, pairs: Pairs, mode: str) -> jax.Array:
    """x with one batch axis, padded by its own values."""
    for length, pair in zip(x.shape[1:-1], pairs, strict=True):
        most = {"reflect": length - 1, "circular": length}.get(mode, max(pair))
        if max(pair) > most:
            raise LayerError(f"{mode} padding of at most {most} on an axis of length {length}",
                             f"{pair}", "pad less, or choose padding_mode='replicate'")
    return jnp.pad(x, [(0, 0), *pairs, (0, 0)], mode=MODES[mode])


def on_images(f: Callable[..., jax.Array], dims: int, *arrays: jax.Array) -> jax.Array:
    """Apply f, a function of arrays with one batch axis, to arrays with any batch axes."""
    batch = arrays[0].shape[: arrays[0].ndim - dims - 1]
    if len(batch) == 1:
        return f(*arrays)
    y = f(*(a.reshape(math.prod(batch), *a.shape[len(batch) :]) for a in arrays))
    return y.reshape(*batch, *y.shape[1:])


def takes(dims: int) -> frozenset[str]:
    """The side inputs: a mask for one axis, time; segments, if only to raise with a reason."""
    return frozenset({"mask", "segments"} if dims == 1 else {"segments"})


def check_length(
    mask: Any, x: Any, margin: Padding, extent: Edges, stride: Edges, mode: str = "zeros"
) -> None:
    """Raise if outputs of valid steps depend on the number of padded steps after them."""
    if mask is None or mask.ndim < x.ndim - 1:  # a mask of examples leaves no padded steps
        return
    if mode != "zeros" and margin != "VALID":
        raise LayerError("padding_mode='zeros' with a mask", repr(mode), "pass it: the border of x "
                         "is not that of its valid steps")
    # "SAME" pads before the first step by an amount that may depend on the length of x.
    before = {jax.lax.padtype_to_pads((length,), extent, stride, "SAME")[0][0]
              for length in range(1, stride[0] + 1)}
    if margin == "SAME" and len(before) > 1:
        raise LayerError("padding as a number with a mask and a stride", "'SAME'",
                         "pass padding=1, for example: the 'SAME' padding before the first step "
                         "depends on the length of x")


def reach_back(
    segments: Any, margin: Padding, extent: Edges, stride: Edges, mode: str = "zeros"
) -> int:
    """The number of positions before a step in its window.

    Raises:
        LayerError: x is an image, or some steps have no window.
    """
    if extent[1:]:
        refuse_segments(segments, "an image has no steps")
    pairs = (jax.lax.padtype_to_pads(extent, extent, (1,), margin)
             if isinstance(margin, str) else margin)
    before, after = pairs[0]
    if (stride, mode, before + after) != ((1,), "zeros", extent[0] - 1):
        raise LayerError("one window for each step, padded by zeros, with segments",
                         f"stride={stride[0]}, padding={margin!r} and padding_mode={mode!r}",
                         "pass stride=1 and padding='SAME', or give each sequence a row")
    return before


def apart(
    x: jax.Array, runs: jax.Array, size: int, dilation: int, back: int
) -> tuple[jax.Array, jax.Array]:
    """The windows of all steps, cut off at their segments.

    Args:
        x: padded input (..., T + extent - 1, C).
        runs: segment of each padded step, numbered from 0 in each row; negative for none.
        size: entries of a window.
        dilation: steps between two entries.
        back: distance from the first entry of a window to its own step.

    Returns:
        The windows in sequence, (..., T * size, C), with zeros at entries of other segments; and
        True at the entries of the window's own segment, (..., T * size).
    """
    steps = x.shape[-2] - dilation * (size - 1)
    entries = [slice(q * dilation, q * dilation + steps) for q in range(size)]
    own = runs[..., back : back + steps]  # (..., T)
    same = jnp.stack([(runs[..., entry] == own) & (own >= 0) for entry in entries], -1)
    windows = jnp.stack([x[..., entry, :] for entry in entries], -2)  # (..., T, size, C)
    windows = cleared(windows, same)
    same = same.reshape(*same.shape[:-2], steps * size)  # (..., T * size)
    return windows.reshape(*same.shape, x.shape[-1]), same


def cannot_stream(*_: Any, **__: Any) -> NoReturn:
    """The `start` of a layer that needs the whole input at once."""
    raise LayerError("the whole input at once", "a streaming call",
                     "apply it without start")


def check_fits(x: jax.Array, y: Any, what: str) -> None:
    """Raise if the window was larger than x, so that y has no positions."""
    if 0 in y.shape and 0 not in x.shape:
        raise LayerError(f"input at least as large as the {what}", show(x),
                         "pad, or take a smaller window")
