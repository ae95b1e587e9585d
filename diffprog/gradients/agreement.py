"""Derivatives in three ways: reverse mode, forward mode and central finite differences.

All of it happens in float64, whatever the session's default: in float32, rounding hides a gradient
that is wrong by a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.dtypes import is_float
from diffprog.core.errors import LayerError
from diffprog.core.notation import show
from diffprog.core.paths import paths

__all__ = ["check_gradients"]

_STEP = 1e-5  # of central differences: truncation and rounding both stay near 1e-10


class Derivative(NamedTuple):
    """One derivative along a random direction in one leaf, computed in three ways."""

    path: str
    reverse: float
    forward: float
    difference: float
    error: float

    def __str__(self) -> str:
        return (f"{self.path}: reverse {self.reverse:.10g}, forward {self.forward:.10g}, "
                f"difference {self.difference:.10g}, error {self.error:.1e}")


class Gradients(NamedTuple):
    """The derivatives along all leaves; prints as a table."""

    rows: list[Derivative]

    @property
    def worst(self) -> Derivative:
        """The leaf on which the three ways differ most."""
        return max(self.rows, key=lambda row: row.error)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))


def check_gradients(
    f: Callable[..., Any], *args: Any, tolerance: float = 1e-6, seed: int = 0
) -> Gradients:
    """Compare reverse mode, forward mode and central finite differences of f, in float64.

    Outputs are projected on a random vector; each floating-point leaf of the arguments is moved
    along one random direction, so that every entry of its gradient takes part.

    Args:
        f: a function of pytrees; it must be differentiable at `args`.
        args: its arguments; floats are converted to float64, all else is kept constant.
        tolerance: the largest error allowed, as a share of the derivative (of the largest
            derivative over all leaves divided by a thousand, where that is more).
        seed: of the directions.

    Returns:
        The derivatives of each leaf; `worst` is the one with the largest error.

    Raises:
        LayerError: the three ways disagree, naming the worst leaf; f gives float32, because it
            closes over arrays of that dtype.

    Example:
        >>> print(dp.gradients.check_gradients(jnp.sin, jnp.array(0.0)).worst.error < 1e-8)
        True
    """
    with jax.enable_x64(True):
        draw = np.random.default_rng(seed)
        wide = jax.tree.map(widened, args)
        leaves, structure = jax.tree.flatten(wide)
        places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
        names = list(paths(wide[0] if len(args) == 1 else wide))
        if not places:
            raise LayerError("at least one floating-point argument", show(args),
                             "convert one: x.astype(jnp.float32)")
        moved = [leaves[i] for i in places]

        def along(moved: list[Any], weights: list[Any]) -> Any:
            whole = list(leaves)
            for i, leaf in zip(places, moved, strict=True):
                whole[i] = leaf
            outputs = [y for y in jax.tree.leaves(f(*structure.unflatten(whole))) if is_float(y)]
            return sum(map(jnp.vdot, weights, outputs), jnp.zeros(()))

        shapes = [y for y in jax.tree.leaves(jax.eval_shape(f, *wide)) if is_float(y)]
        if not shapes:
            raise LayerError("a function that gives floating-point numbers", "none",
                             "return what is to be differentiated")
        if any(y.dtype != jnp.float64 for y in shapes):
            raise LayerError("a function that computes in float64", show(shapes),
                             "pass it the arrays that it closes over as arguments")
        weights = [draw.normal(size=y.shape) for y in shapes]
        value = jax.jit(along)
        reverse = jax.jit(jax.grad(along))(moved, weights)
        forward = jax.jit(lambda m, t, w: jax.jvp(lambda m: along(m, w), (m,), (t,))[1])
        return compared(
            [names[i] for i in places], moved, lambda moved: value(moved, weights), reverse,
            lambda tangents: forward(moved, tangents, weights), tolerance, draw)


def compared(
    names: list[str], moved: list[Any], value: Callable[[list[Any]], Any], reverse: list[Any],
    forward: Callable[[list[Any]], Any], tolerance: float, draw: np.random.Generator,
) -> Gradients:
    """The derivatives of one number along a random direction in each leaf that is moved.

    Args:
        names, moved: the paths of the leaves, and where they are.
        value: ``moved -> number``.
        reverse: the gradient there, in reverse mode.
        forward: ``tangents -> number``, in forward mode.
        tolerance: as in `check_gradients`, which says what is raised too.
        draw: what directions are drawn from.
    """
    found = []
    for i, leaf in enumerate(moved):
        tangents = [np.zeros(a.shape) for a in moved]
        direction = draw.normal(size=leaf.shape)
        direction /= max(np.linalg.norm(direction), 1e-30)
        tangents[i] = direction
        ahead, behind = ([a + h * b for a, b in zip(moved, tangents, strict=True)]
                         for h in (_STEP, -_STEP))
        rise = float(value(ahead)) - float(value(behind))
        found.append((float(np.vdot(direction, reverse[i])), float(forward(tangents)),
                      rise / (2 * _STEP)))
    finite = [abs(d) for three in found for d in three if np.isfinite(d)]
    floor = max([1e-3 * d for d in finite] + [1e-6])
    rows = []
    for path, three in zip(names, found, strict=True):
        scale = max(*map(abs, three), floor)
        error = (max(three) - min(three)) / scale if np.all(np.isfinite(three)) else float("inf")
        backward, along, difference = three
        rows.append(Derivative(path or "the argument", backward, along, difference, error))
    result = Gradients(rows)
    if not result.worst.error <= tolerance:
        raise LayerError(f"derivatives that agree to {tolerance:g}", str(result.worst),
                         "mend its derivative, or move away from a kink")
    return result


def widened(leaf: Any) -> Any:
    """The array in float64 if it holds floats; under x64 only."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if is_float(leaf) else leaf
