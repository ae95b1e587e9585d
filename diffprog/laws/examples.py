"""The law of the batch axis: examples do not mix."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffprog.core.dtypes import is_float
from diffprog.core.plans import grown
from diffprog.laws.trial import Result, Trial, floats


def examples(t: Trial) -> str | None:
    """Each example alone has the outputs and gradients that it has in the batch.

    In training too, unless the layer has state or noise.
    """
    if reason := _untried(t):
        return reason
    batch = _Batch(t)
    quiet = not (t.layer.random or jax.tree.leaves(t.state))
    for key, train in t.modes if quiet else t.modes[:1]:
        alone = []
        for i in range(t.examples):
            alone.append(batch.alone(i, key, train))
            among = t.call(key=key, train=train, weights=batch.weights_in_batch(i))
            t.check_close(f"example {i} by itself, train={train}", alone[i], batch.of(i, among))
        last = t.examples - 1
        for factor in (1e-3, 1e3, 1e6):
            x = jax.tree.map(lambda a, factor=factor: _scale_first(a, factor), t.x)
            among = t.call(x=x, key=key, train=train, weights=batch.weights_in_batch(last))
            if all(np.isfinite(a).all() for a in floats(among)):
                t.check_close(
                    f"example {last} beside one {factor:g} times as large, train={train}",
                    batch.of(last, among), alone[last])
    return None


def _untried(t: Trial) -> str | None:
    """The reason why examples cannot be distinguished, or None."""
    if not t.options.batched:
        return "batched=False"
    if t.examples < 2:
        return "there is one example"
    given = jax.tree.leaves((t.x, t.side))
    if all((np.asarray(a) == np.asarray(a)[:1]).all() for a in given):
        return "all examples are equal"
    return None


class _Batch:
    """The results of one example, alone and in the batch: outputs and gradients."""

    def __init__(self, t: Trial) -> None:
        self.t = t
        x, side = jax.tree.map(lambda a: a[:1], (t.x, t.side))
        # The batch axis of each leaf of y, -1 for a leaf without one.
        self.axes = jax.tree.map(
            grown, t.layer.plan(x, **side).y, t.layer.plan(t.x, **t.side).y)
        self.float_axes = [
            axis for axis, leaf in zip(
                jax.tree.leaves(self.axes), jax.tree.leaves(t.inference.y), strict=True)
            if is_float(leaf)]

    def alone(self, i: int, key: Any, train: bool) -> Any:
        """The results of example i by itself."""
        x, side = jax.tree.map(lambda a: a[i : i + 1], (self.t.x, self.t.side))
        weights = [_take(w, axis, i)
                   for w, axis in zip(self.t.weights, self.float_axes, strict=True)]
        result = self.t.call(x=x, side=side, key=key, train=train, weights=weights)
        return result.y, result.params_gradient, (result.x_gradient, result.side_gradient)

    def weights_in_batch(self, i: int) -> list[Any]:
        """The weights of y, zero for all examples but i."""

        def select(w: np.ndarray, axis: int) -> np.ndarray:
            numbers = np.arange(self.t.examples).reshape(-1, *[1] * (w.ndim - axis - 1))
            return np.where(numbers == i, w, 0)

        return [select(w, axis) for w, axis in zip(self.t.weights, self.float_axes, strict=True)]

    def of(self, i: int, result: Result) -> Any:
        """The results of example i in a call on the batch."""
        y = jax.tree.map(lambda a, axis: _take(a, axis, i), result.y, self.axes)
        gradients = jax.tree.map(lambda a: np.asarray(a)[i : i + 1],
                                 (result.x_gradient, result.side_gradient))
        return y, result.params_gradient, gradients


def _take(a: Any, axis: int, i: int) -> Any:
    """Entry i of the batch axis, which stays; a leaf whose axis is -1 has none."""
    return np.take(np.asarray(a), [i], axis) if axis >= 0 else a


def _scale_first(a: Any, factor: float) -> Any:
    """The batch with its first example times a factor."""
    if not is_float(a):
        return a
    return np.concatenate([factor * a[:1], a[1:]])
