"""The laws of sequences: of padding, segments, the future, and streams."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffprog.core.dtypes import is_float
from diffprog.core.errors import LayerError
from diffprog.laws.trial import Pulled, Trial, floats, over, with_floats

_TIMED = ("mask", "positions", "segments", "token_types")  # the second axis is time
_SQUARE = ("attention_mask", "attention_bias")  # the last two are
_MORE = 2  # steps of padding that are appended


def padding(t: Trial) -> str | None:
    """What stands in the padding, even NaN, reaches no real entry, no gradient and no statistic."""
    mask = t.side.get("mask")
    if mask is None:
        return "no mask is given"
    if mask.all() or not mask.any():
        return "the mask hides nothing"

    def filled(value: float) -> Any:
        def fill(a: Any) -> Any:
            if a.shape[: mask.ndim] != mask.shape or a.dtype == np.bool_:
                return a
            # Integers may be ids: what stands in their padding is one of those that x has. Floats
            # are no two alike, because a norm sees nothing in equal ones.
            other = (value * np.random.default_rng(3).normal(size=a.shape) if is_float(a)
                     else a.max() if value else a.min())
            return np.where(over(mask, a), a, other).astype(a.dtype)

        return jax.tree.map(fill, t.x)

    weights = [np.where(over(mask, w), w, 0) if _speaks_of(mask, w) else w for w in t.weights]
    mattered = False
    for key, train in t.modes:
        def results(value: float, side: Any = None, key: Any = key, train: bool = train) -> Any:
            found = t.pulled(x=filled(value), side=side, key=key, train=train, weights=weights)
            return (_real(mask, found.y), found.state), _real(mask, found.gradients)

        wanted, slope = results(0.0)
        for value in (7.0, float("nan")):
            t.close(f"real entries with {value:g} in the padding, train={train}",
                    results(value)[0], wanted)
        t.close(f"gradients with other numbers in the padding, train={train}",
                results(7.0)[1], slope)
        all_real = t.side | {"mask": np.ones_like(mask)}
        mattered |= t.apart(results(7.0, all_real)[0], results(0.0, all_real)[0])
    return None if mattered else "real entries depend on no others"


def more_padding(t: Trial) -> str | None:
    """How much padding there is changes no real entry, no gradient and no statistic."""
    mask = t.side.get("mask")
    if mask is None:
        return "no mask is given"
    if mask.ndim < 2 or mask.shape[1] != t.steps:
        return "the mask speaks of no time"

    def longer(a: Any, axes: Sequence[int] = (1,)) -> Any:
        widths = [(0, _MORE * (axis in axes)) for axis in range(a.ndim)]
        return np.pad(a, widths, mode="reflect") if a.dtype != np.bool_ else np.pad(a, widths)

    def beside(name: str, value: Any) -> Any:
        square = lambda a: longer(a, (a.ndim - 2, a.ndim - 1))  # noqa: E731
        grow = longer if name in _TIMED else square if name in _SQUARE else np.asarray
        return jax.tree.map(grow, value)

    x, side = jax.tree.map(longer, t.x), {n: beside(n, v) for n, v in t.side.items()}
    plan = t.layer.plan(t.x, **t.side)
    try:
        large = t.layer.plan(x, **side)
    except LayerError:
        return "it takes no more steps"
    if large.difference(plan.params):
        return "it takes no more steps"
    cut = lambda a, like: a[tuple(slice(0, n) for n in like.shape)]  # noqa: E731
    real = [np.where(over(mask, w), w, 0) if _speaks_of(mask, w) else w for w in t.weights]
    weights = [np.pad(w, [(0, n - m) for m, n in zip(w.shape, a.shape, strict=True)])
               for w, a in zip(real, floats(large.y), strict=True)]
    mattered = False
    for key, train in t.modes[:1] if t.layer.random else t.modes:
        usual = t.pulled(key=key, train=train, weights=real)

        def results(found: Pulled, usual: Pulled = usual) -> Any:
            """What is real of outputs and gradients."""
            y = jax.tree.map(cut, found.y, usual.y)
            slopes = jax.tree.map(cut, found.gradients, usual.gradients)
            return _real(mask, y), found.state, _real(mask, slopes)

        more = t.pulled(x=x, side=side, key=key, train=train, weights=weights)
        t.close(f"real entries with {_MORE} more steps of padding, train={train}",
                results(more), results(usual))
        counted = side | {"mask": np.concatenate([mask, np.ones_like(mask[:, :_MORE])], 1)}
        other = t.pulled(x=x, side=counted, key=key, train=train, weights=weights)
        mattered |= t.apart(results(other), results(usual))
    return None if mattered else "real entries depend on none that come after"


def segments(t: Trial) -> str | None:
    """Each segment of a packed sequence gives what it gives alone, in values and in gradients."""
    if "segments" not in t.layer.side:
        return "it takes no segments"
    if t.steps < 2:
        return "there is one step"
    mask = t.side.get("mask")
    if mask is not None and mask.shape[1:2] != (t.steps,):
        return "the mask speaks of no time"
    half = t.steps // 2
    parts = [slice(0, half), slice(half, t.steps)]
    side = {name: value for name, value in t.side.items() if name not in _SQUARE}
    side["segments"] = np.broadcast_to(np.arange(t.steps) >= half, (t.examples, t.steps)).astype(
        np.int32)
    if "positions" in t.layer.side:
        places = np.concatenate([np.arange(half), np.arange(t.steps - half)])
        side["positions"] = np.broadcast_to(places, (t.examples, t.steps)).astype(np.int32)
    try:
        plan = t.layer.plan(t.x, **side)
    except LayerError:
        return "it refuses segments"
    timed = [a.shape[:2] == (t.examples, t.steps) for a in floats(plan.y)]
    if not all(timed):
        return "its output has no axis of time"
    weights = t.weights if mask is None else [np.where(over(mask, w), w, 0) for w in t.weights]
    within = lambda a, part: np.asarray(a)[:, part]  # noqa: E731
    whole = t.pulled(side=side)
    for number, part in enumerate(parts):
        x = jax.tree.map(lambda a, part=part: within(a, part), t.x)
        beside = {name: within(value, part) if name in _TIMED else value
                  for name, value in side.items() if name != "segments"}
        alone = t.pulled(x=x, side=beside, weights=[within(w, part) for w in weights])
        here = np.zeros(t.steps, bool)
        here[part] = True
        among = t.pulled(side=side, weights=[
            np.where(here.reshape(-1, *[1] * (w.ndim - 2)), w, 0) for w in weights])
        own = lambda tree, part=part: jax.tree.map(lambda a: within(a, part), tree)  # noqa: E731
        real = lambda tree, part=part: tree if mask is None else _real(  # noqa: E731
            mask[:, part], tree)
        t.close(f"segment {number} alone",
                (real(alone.y), alone.params_gradient, real(alone.x_gradient)),
                (real(own(whole.y)), among.params_gradient, real(own(among.x_gradient))))
    one = t.pulled(side=side | {"segments": np.zeros_like(side["segments"])})
    if not t.apart(one.y, whole.y):
        return "steps do not depend on each other"
    return None


def causality(t: Trial) -> str | None:
    """Whatever comes later, a step gives what it gave."""
    if not t.options.causal:
        return "causal=False"
    if t.steps < 2:
        return "there is one step"
    draw = np.random.default_rng(2)
    mattered = False
    for now in range(1, t.steps):
        later = jax.tree.map(lambda a, now=now: _other_after(draw, a, now), t.x)
        y = t.pulled(x=later).y
        before, after = (jax.tree.map(lambda a, part=part: np.asarray(a)[:, part], (y, t.rest.y))
                         for part in (slice(0, now), slice(now, None)))
        t.close(f"steps before {now}, after changing the later ones", *before)
        mattered |= t.apart(*after)
    return None if mattered else "no step depends on what was changed"


def streaming(t: Trial) -> str | None:
    """Chunk by chunk gives what all at once gives, in values and in gradients."""
    if not t.options.causal:
        return "causal=False"
    if t.steps < 2:
        return "there is one step"
    if t.layer.start:
        params, state, x, side = t.given
        try:
            jax.eval_shape(lambda: t.layer.start(params, state, x, length=t.steps, **side))
        except LayerError as error:
            return f"it wants {error.wants}"  # it says by itself that it cannot
    if all((np.asarray(a) == np.asarray(a)[:, :1]).all() for a in jax.tree.leaves(t.x)):
        return "all steps are equal"
    stream = _Stream(t)
    wanted = (t.rest.y, *t.rest.gradients)
    for name, cuts in (("chunks of 1", [*range(t.steps + 1)]),
                       ("chunks of 2", [*range(0, t.steps, 2), t.steps]),
                       ("mixed chunks", [0, *range(1, t.steps, 2), t.steps]),
                       ("one chunk", [0, t.steps])):
        cuts = sorted(set(cuts))
        t.close(name, stream.run(cuts), wanted)
    return None


class _Stream:
    """A layer run chunk by chunk, and its gradients backwards from chunk to chunk.

    So each size of chunk is compiled once, however many chunks there are.
    """

    def __init__(self, t: Trial) -> None:
        self.t = t
        self.start = jax.jit(self._start) if t.layer.start else None

    def run(self, cuts: Sequence[int]) -> Any:
        """Output and gradients, as `Trial.rest` has them."""
        t, spans = self.t, list(itertools.pairwise(cuts))
        first = self._chunk(*spans[0], kept=True)
        state = self.start(*first, None)[0] if self.start else t.state
        quiet = [np.zeros(leaf.shape) for leaf in floats(state)]
        calls, outputs = [], []
        for begin, end in spans:
            weights = [w[:, begin:end] for w in t.weights]
            call = functools.partial(self._pull, self._chunk(begin, end), state, weights)
            calls.append(call)
            found = call(quiet)
            outputs.append(found.y)
            state = found.state
        slope, slopes = quiet, []
        for call in reversed(calls):
            back = call(slope)
            slope = jax.tree.leaves(back.state_gradient)
            slopes.insert(0, back.gradients)
        params, of_x, beside = zip(*slopes, strict=True)
        if self.start:
            of_params, of_side = self.start(*first, slope)[1]
            params, beside = (*params, of_params), (*beside, of_side)
        joined = lambda *parts: np.concatenate(parts, 1)  # noqa: E731
        side = {name: _added([part[name] for part in beside if name in part]) for name in t.side}
        return (jax.tree.map(joined, *outputs), _added(params), jax.tree.map(joined, *of_x), side)

    def _chunk(self, begin: int, end: int, kept: bool = False) -> Any:
        """A part of x, and of the side inputs what a chunk is given; with `kept` what start is."""
        cut = lambda a: a[:, begin:end]  # noqa: E731
        side = {name: jax.tree.map(cut, value) if name in _TIMED else value
                for name, value in self.t.side.items() if kept or name not in self.t.layer.kept}
        return jax.tree.map(cut, self.t.x), side

    def _pull(self, chunk: Any, state: Any, weights: list[Any], slope: list[Any]) -> Pulled:
        x, side = chunk
        return self.t.pull(self.t.params, state, x, side, None, False, [*weights, *slope])

    def _start(self, x: Any, side: Any, slope: Any) -> Any:
        """What is carried at the beginning, and the gradients that reach what it is made of."""
        given = (self.t.params, side)

        def carried(parts: list[Any]) -> Any:
            params, beside = with_floats(given, parts)
            state = self.t.layer.start(params, self.t.state, x, length=self.t.steps, **beside)
            return floats(state), state

        _, back, state = jax.vjp(carried, floats(given), has_aux=True)
        if slope is None:
            return state, None
        return state, with_floats(given, back(slope)[0], gaps=True)


def _added(parts: Any) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves), *parts)


def _speaks_of(mask: Any, a: Any) -> bool:
    return a.shape[: mask.ndim] == mask.shape


def _real(mask: Any, tree: Any) -> Any:
    """Zeros in place of what is not real, wherever the mask speaks of it."""
    return jax.tree.map(lambda a: np.where(over(mask, a), a, 0) if _speaks_of(mask, a) else a, tree)


def _other_after(draw: np.random.Generator, a: Any, now: int) -> Any:
    """Other numbers from step `now` on; integers may be ids: others of those that there are."""
    if is_float(a):
        new = a + draw.normal(size=a.shape)
    else:
        known = np.unique(a)
        new = known[(np.searchsorted(known, a) + 1) % len(known)]
    return np.concatenate([a[:, :now], new[:, now:].astype(a.dtype)], 1)
