"""The law of symmetry: steps that are permuted permute the output, or leave it as it is."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from diffprog.core.dtypes import is_float
from diffprog.laws.sequences import SQUARE, TIMED
from diffprog.laws.trial import Trial


def symmetry(t: Trial) -> str | None:
    """With permuted steps, outputs and gradients are permuted, or the output stays as it is.

    Side inputs with a time axis are permuted too. In training as well, unless the layer has noise.
    """
    wanted = t.options.symmetry
    if wanted is None:
        return "symmetry=None"
    if t.steps < 2:
        return "there is one step"
    matters = False
    for key, train in t.modes[:1] if t.layer.random else t.modes:
        plain = t.call(key=key, train=train)
        for order in _generators(t.steps):
            def moved(a: Any, order: np.ndarray = order) -> np.ndarray:
                return np.take(np.asarray(a), order, 1)

            of_y = moved if wanted == "equivariant" else np.asarray
            permuted = t.call(
                x=jax.tree.map(moved, t.x), side=_moved_side(t, order), key=key, train=train,
                weights=[of_y(w) for w in t.weights])
            t.check_close(
                f"steps in the order {order.tolist()}, train={train}",
                (permuted.y, permuted.params_gradient, permuted.x_gradient),
                (jax.tree.map(of_y, plain.y), plain.params_gradient,
                 jax.tree.map(moved, plain.x_gradient)))
            matters |= t.differs(jax.tree.map(moved, plain.y), plain.y) if (
                wanted == "equivariant") else _changes(t, order)
    return None if matters else "the order of the steps of x does not matter"


def _generators(steps: int) -> list[np.ndarray]:
    """A transposition and a cycle, which generate all permutations of the steps."""
    swapped = np.arange(steps)
    swapped[:2] = 1, 0
    return [swapped] if steps == 2 else [swapped, np.roll(np.arange(steps), 1)]


def _changes(t: Trial, order: np.ndarray) -> bool:
    """Does the output depend on x, whose steps in this order differ from it?"""
    differs = any((np.take(np.asarray(a), order, 1) != a).any() for a in jax.tree.leaves(t.x))
    twice = jax.tree.map(lambda a: 2 * a if is_float(a) else a, t.x)
    return differs and t.differs(t.call(x=twice).y, t.inference.y)


def _moved_side(t: Trial, order: np.ndarray) -> dict[str, Any]:
    """The side inputs with their time axes permuted."""

    def moved(a: Any, axes: tuple[int, ...]) -> np.ndarray:
        a = np.asarray(a)
        for axis in axes:
            if a.ndim > axis and a.shape[axis] == t.steps:
                a = np.take(a, order, axis)
        return a

    side = dict(t.side)
    for name, value in t.side.items():
        if name in TIMED:
            side[name] = moved(value, (1,))
        elif name in SQUARE:
            side[name] = moved(value, (value.ndim - 2, value.ndim - 1))
    return side
