"""The law of examples: a batch is its examples."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffprog.core.dtypes import is_float
from diffprog.core.plans import grown
from diffprog.laws.trial import Pulled, Trial, floats


def examples(t: Trial) -> str | None:
    """Each example alone gives what it gives in the batch, in values and in gradients.

    In training too, where neither state nor noise may make it otherwise.
    """
    if reason := _alike(t):
        return reason
    once, beside = jax.tree.map(lambda a: a[:1], (t.x, t.side))
    axes = jax.tree.map(grown, t.layer.plan(once, **beside).y, t.layer.plan(t.x, **t.side).y)
    of_floats = [axis for axis, leaf in zip(jax.tree.leaves(axes), jax.tree.leaves(t.rest.y),
                                            strict=True) if is_float(leaf)]

    def weights(i: int) -> list[Any]:
        """Those of example i alone."""
        return [w if axis < 0 else _part(w, axis, i) for w, axis in zip(
            t.weights, of_floats, strict=True)]

    def picked(i: int) -> list[Any]:
        """Those of example i in the batch, and none of the others."""
        return [np.where(np.arange(t.examples).reshape(-1, *[1] * (w.ndim - axis - 1)) == i, w, 0)
                for w, axis in zip(t.weights, of_floats, strict=True)]

    def of(i: int, result: Pulled) -> Any:
        """What example i has in the result of the batch."""
        y = jax.tree.map(lambda a, axis: _part(a, axis, i), result.y, axes)
        own = jax.tree.map(lambda a: np.asarray(a)[i : i + 1],
                           (result.x_gradient, result.side_gradient))
        return y, result.params_gradient, own

    quiet = not (t.layer.random or jax.tree.leaves(t.state))
    for key, train in t.modes if quiet else t.modes[:1]:
        alone = []
        for i in range(t.examples):
            x, side = jax.tree.map(lambda a, i=i: a[i : i + 1], (t.x, t.side))
            one = t.pulled(x=x, side=side, key=key, train=train, weights=weights(i))
            alone.append((one.y, one.params_gradient, (one.x_gradient, one.side_gradient)))
            among = t.pulled(key=key, train=train, weights=picked(i))
            t.close(f"example {i} by itself, train={train}", alone[i], of(i, among))
        for times in (1e-3, 1e3, 1e6):
            x = jax.tree.map(lambda a, times=times: _first_times(a, times), t.x)
            i = t.examples - 1
            unlike = t.pulled(x=x, key=key, train=train, weights=picked(i))
            if all(np.isfinite(a).all() for a in floats(unlike)):
                t.close(f"example {i} beside one {times:g} times as large, train={train}",
                        of(i, unlike), alone[i])
    return None


def _alike(t: Trial) -> str | None:
    """Why examples cannot be told apart, if they cannot."""
    if not t.options.batched:
        return "batched=False"
    if t.examples < 2:
        return "there is one example"
    given = jax.tree.leaves((t.x, t.side))
    if all((np.asarray(a) == np.asarray(a)[:1]).all() for a in given):
        return "all examples are equal"
    return None


def _part(a: Any, axis: int, i: int) -> Any:
    return np.take(np.asarray(a), [i], axis) if axis >= 0 else a


def _first_times(a: Any, times: float) -> Any:
    """The first example that many times as large."""
    if not is_float(a):
        return a
    return np.concatenate([times * a[:1], a[1:]])
