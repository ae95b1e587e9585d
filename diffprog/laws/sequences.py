"""The laws of sequences: padding, segments, causality, streaming."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffprog.core.dtypes import is_float
from diffprog.core.errors import LayerError
from diffprog.laws.trial import Result, Trial, floats, over_trailing, with_floats

TIMED = ("mask", "positions", "segments", "token_types")  # side inputs with time on axis 1
SQUARE = ("attention_mask", "attention_bias")  # side inputs with time on the last two axes
_MORE = 2  # padded steps that are appended


def padding(t: Trial) -> str | None:
    """Masked entries, even NaN, change no valid entry, no gradient and no state."""
    mask = t.side.get("mask")
    if mask is None:
        return "no mask is given"
    if mask.all() or not mask.any():
        return "the mask is constant"
    weights = [_cleared(mask, w) for w in t.weights]
    all_valid = t.side | {"mask": np.ones_like(mask)}
    matters = False
    for key, train in t.modes:
        def results(value: float, side: Any = None, key: Any = key, train: bool = train) -> Any:
            """(valid outputs, state) and valid gradients with this value in the padding."""
            x = jax.tree.map(functools.partial(_filled, mask, value), t.x)
            result = t.call(x=x, side=side, key=key, train=train, weights=weights)
            return (_valid(mask, result.y), result.state), _valid(mask, result.gradients)

        outputs, gradients = results(0.0)
        for value in (7.0, float("nan")):
            t.check_close(f"valid entries with {value:g} in the padding, train={train}",
                          results(value)[0], outputs)
        t.check_close(f"gradients with other numbers in the padding, train={train}",
                      results(7.0)[1], gradients)
        matters |= t.differs(results(7.0, all_valid)[0], results(0.0, all_valid)[0])
    return None if matters else "valid entries do not depend on others"


def _filled(mask: Any, value: float, a: Any) -> Any:
    """The array with other values in its masked entries.

    Integers may be ids: they become the largest of the array, or the smallest for a value of 0.
    Floats become `value` times random numbers, since a norm maps equal ones to zero.
    """
    if not _has_axes_of(mask, a) or a.dtype == np.bool_:
        return a
    if is_float(a):
        other = value * np.random.default_rng(3).normal(size=a.shape)
    else:
        other = a.max() if value else a.min()
    return np.where(over_trailing(mask, a), a, other).astype(a.dtype)


def more_padding(t: Trial) -> str | None:
    """Additional padding changes no valid entry, no gradient and no state."""
    mask = t.side.get("mask")
    if mask is None:
        return "no mask is given"
    if mask.ndim < 2 or mask.shape[1] != t.steps:
        return "the mask has no time axis"
    x = jax.tree.map(_longer, t.x)
    side = {name: _longer_side(name, value) for name, value in t.side.items()}
    plan = t.layer.plan(t.x, **t.side)
    try:
        long_plan = t.layer.plan(x, **side)
    except LayerError:
        return "it takes no more steps"
    if long_plan.difference(plan.params):
        return "it takes no more steps"

    weights = [_cleared(mask, w) for w in t.weights]
    long_weights = [np.pad(w, [(0, n - m) for m, n in zip(w.shape, a.shape, strict=True)])
                    for w, a in zip(weights, floats(long_plan.y), strict=True)]
    all_valid = side | {"mask": np.concatenate([mask, np.ones_like(mask[:, :_MORE])], 1)}
    matters = False
    for key, train in t.modes[:1] if t.layer.random else t.modes:
        short = t.call(key=key, train=train, weights=weights)

        def valid(result: Result, short: Result = short) -> Any:
            """Outputs, state and gradients at the valid entries of the short sequence."""
            y = jax.tree.map(_cropped, result.y, short.y)
            gradients = jax.tree.map(_cropped, result.gradients, short.gradients)
            return _valid(mask, y), result.state, _valid(mask, gradients)

        long = t.call(x=x, side=side, key=key, train=train, weights=long_weights)
        t.check_close(f"valid entries with {_MORE} more steps of padding, train={train}",
                      valid(long), valid(short))
        unmasked = t.call(x=x, side=all_valid, key=key, train=train, weights=long_weights)
        matters |= t.differs(valid(unmasked), valid(short))
    return None if matters else "valid entries do not depend on later ones"


def _longer(a: Any, axes: Sequence[int] = (1,)) -> Any:
    """The array with more steps on its time axes: reflected ones, or False."""
    widths = [(0, _MORE * (axis in axes)) for axis in range(a.ndim)]
    return np.pad(a, widths) if a.dtype == np.bool_ else np.pad(a, widths, mode="reflect")


def _longer_side(name: str, value: Any) -> Any:
    """A side input with more steps, if it has a time axis."""
    if name in TIMED:
        return jax.tree.map(_longer, value)
    if name in SQUARE:
        return jax.tree.map(lambda a: _longer(a, (a.ndim - 2, a.ndim - 1)), value)
    return jax.tree.map(np.asarray, value)


def _cropped(a: Any, like: Any) -> Any:
    """The first entries of an array, as many on each axis as `like` has."""
    return a[tuple(slice(0, n) for n in like.shape)]


def segments(t: Trial) -> str | None:
    """Each segment of a packed sequence has the outputs and gradients that it has alone."""
    if "segments" not in t.layer.side:
        return "it takes no segments"
    if t.steps < 2:
        return "there is one step"
    mask = t.side.get("mask")
    if mask is not None and mask.shape[1:2] != (t.steps,):
        return "the mask has no time axis"
    half = t.steps // 2
    side = _two_segments(t, half)
    try:
        plan = t.layer.plan(t.x, **side)
    except LayerError:
        return "it refuses segments"
    if not all(a.shape[:2] == (t.examples, t.steps) for a in floats(plan.y)):
        return "its output has no time axis"

    weights = t.weights if mask is None else [_cleared(mask, w) for w in t.weights]
    packed = t.call(side=side)
    for number, part in enumerate([slice(0, half), slice(half, t.steps)]):
        def own(tree: Any, part: slice = part) -> Any:
            """The steps of the segment."""
            return jax.tree.map(lambda a: np.asarray(a)[:, part], tree)

        def valid(tree: Any, part: slice = part) -> Any:
            return tree if mask is None else _valid(mask[:, part], tree)

        own_side = {name: own(value) if name in TIMED else value
                    for name, value in side.items() if name != "segments"}
        alone = t.call(x=own(t.x), side=own_side, weights=own(weights))
        inside = np.zeros(t.steps, bool)
        inside[part] = True
        among = t.call(side=side, weights=[
            np.where(inside.reshape(-1, *[1] * (w.ndim - 2)), w, 0) for w in weights])
        t.check_close(
            f"segment {number} alone",
            (valid(alone.y), alone.params_gradient, valid(alone.x_gradient)),
            (valid(own(packed.y)), among.params_gradient, valid(own(among.x_gradient))))
    one = t.call(side=side | {"segments": np.zeros_like(side["segments"])})
    if not t.differs(one.y, packed.y):
        return "steps do not depend on each other"
    return None


def _two_segments(t: Trial, half: int) -> dict[str, Any]:
    """The side inputs of two segments, the second from step `half` on."""
    shape = t.examples, t.steps
    side = {name: value for name, value in t.side.items() if name not in SQUARE}
    side["segments"] = np.broadcast_to(np.arange(t.steps) >= half, shape).astype(np.int32)
    if "positions" in t.layer.side:
        positions = np.concatenate([np.arange(half), np.arange(t.steps - half)])
        side["positions"] = np.broadcast_to(positions, shape).astype(np.int32)
    return side


def causality(t: Trial) -> str | None:
    """A change of later inputs does not change a step."""
    if not t.options.causal:
        return "causal=False"
    if t.steps < 2:
        return "there is one step"
    rng = np.random.default_rng(2)
    matters = False
    for now in range(1, t.steps):
        x = jax.tree.map(lambda a, now=now: _changed_from(rng, a, now), t.x)
        results = t.call(x=x).y, t.inference.y
        before = jax.tree.map(lambda a, now=now: np.asarray(a)[:, :now], results)
        after = jax.tree.map(lambda a, now=now: np.asarray(a)[:, now:], results)
        t.check_close(f"steps before {now}, after changing the later ones", *before)
        matters |= t.differs(*after)
    return None if matters else "no step depends on the changed ones"


def streaming(t: Trial) -> str | None:
    """A stream in chunks has the outputs and gradients of one call."""
    if not t.options.causal:
        return "causal=False"
    if t.steps < 2:
        return "there is one step"
    if t.layer.start:
        params, state, x, side = t.given
        try:
            jax.eval_shape(lambda: t.layer.start(params, state, x, length=t.steps, **side))
        except LayerError as error:
            return f"it cannot stream: it wants {error.wants}"
    if all((np.asarray(a) == np.asarray(a)[:, :1]).all() for a in jax.tree.leaves(t.x)):
        return "all steps are equal"
    stream = _Stream(t)
    wanted = (t.inference.y, *t.inference.gradients)
    for name, cuts in (("chunks of 1", [*range(t.steps + 1)]),
                       ("chunks of 2", [*range(0, t.steps, 2), t.steps]),
                       ("mixed chunks", [0, *range(1, t.steps, 2), t.steps]),
                       ("one chunk", [0, t.steps])):
        t.check_close(name, stream.run(sorted(set(cuts))), wanted)
    return None


class _Stream:
    """A layer run in chunks, with gradients propagated backwards from chunk to chunk.

    Each size of chunk is thus compiled once, whatever the number of chunks.
    """

    def __init__(self, t: Trial) -> None:
        self.t = t
        self.start = jax.jit(self._start) if t.layer.start else None

    def run(self, cuts: Sequence[int]) -> Any:
        """(output, gradients by params, x and side) for chunks between these steps."""
        t, spans = self.t, list(itertools.pairwise(cuts))

        # Forward.
        first = self._chunk(*spans[0], kept=True)
        state = self.start(*first, None)[0] if self.start else t.state
        zeros = [np.zeros(leaf.shape) for leaf in floats(state)]
        calls, outputs = [], []
        for begin, end in spans:
            weights = [w[:, begin:end] for w in t.weights]
            call = functools.partial(self._vjp, self._chunk(begin, end), state, weights)
            calls.append(call)
            result = call(zeros)
            outputs.append(result.y)
            state = result.state

        # Backward: the gradient of the state of a chunk is the cotangent of the chunk before.
        cotangent, gradients = zeros, []
        for call in reversed(calls):
            result = call(cotangent)
            cotangent = jax.tree.leaves(result.state_gradient)
            gradients.insert(0, result.gradients)
        params, of_x, of_side = zip(*gradients, strict=True)
        if self.start:
            start_params, start_side = self.start(*first, cotangent)[1]
            params, of_side = (*params, start_params), (*of_side, start_side)

        def joined(*parts: Any) -> np.ndarray:
            return np.concatenate(parts, 1)

        side = {name: _sum([part[name] for part in of_side if name in part]) for name in t.side}
        return jax.tree.map(joined, *outputs), _sum(params), jax.tree.map(joined, *of_x), side

    def _chunk(self, begin: int, end: int, kept: bool = False) -> Any:
        """Steps of x and of the side inputs; `kept` adds the side inputs that only `start` takes.
        """

        def cut(a: Any) -> Any:
            return a[:, begin:end]

        side = {name: jax.tree.map(cut, value) if name in TIMED else value
                for name, value in self.t.side.items() if kept or name not in self.t.layer.kept}
        return jax.tree.map(cut, self.t.x), side

    def _vjp(self, chunk: Any, state: Any, weights: list[Any], cotangent: list[Any]) -> Result:
        x, side = chunk
        return self.t.vjp(self.t.params, state, x, side, None, False, [*weights, *cotangent])

    def _start(self, x: Any, side: Any, cotangent: Any) -> Any:
        """The initial state, and its gradients by parameters and side inputs."""
        given = (self.t.params, side)

        def initial(parts: list[Any]) -> Any:
            params, side = with_floats(given, parts)
            state = self.t.layer.start(params, self.t.state, x, length=self.t.steps, **side)
            return floats(state), state

        _, pullback, state = jax.vjp(initial, floats(given), has_aux=True)
        if cotangent is None:
            return state, None
        return state, with_floats(given, pullback(cotangent)[0], gaps=True)


def _sum(trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)


def _has_axes_of(mask: Any, a: Any) -> bool:
    """Are the leading axes of an array those of the mask?"""
    return a.shape[: mask.ndim] == mask.shape


def _cleared(mask: Any, a: Any) -> Any:
    """The array with zeros in its masked entries, if it has the axes of the mask."""
    return np.where(over_trailing(mask, a), a, 0) if _has_axes_of(mask, a) else a


def _valid(mask: Any, tree: Any) -> Any:
    """The tree with zeros in its masked entries."""
    return jax.tree.map(functools.partial(_cleared, mask), tree)


def _changed_from(rng: np.random.Generator, a: Any, now: int) -> Any:
    """The array with other values from step `now` on; integers stay among those of the array."""
    if is_float(a):
        new = a + rng.normal(size=a.shape)
    else:
        known = np.unique(a)
        new = known[(np.searchsorted(known, a) + 1) % len(known)]
    return np.concatenate([a[:, :now], new[:, now:].astype(a.dtype)], 1)
