"""Gradient checks: reverse mode, forward mode and central finite differences.

All computations are in float64, whatever the default of the session: in float32, rounding hides
relative errors of 1e-3.
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

_STEP = 1e-5  # of central differences: truncation and rounding errors are near 1e-10


class Derivative(NamedTuple):
    """The derivative along a random direction in one leaf, computed in three ways."""

    path: str
    reverse: float
    forward: float
    difference: float
    error: float

    def __str__(self) -> str:
        return (f"{self.path}: reverse {self.reverse:.10g}, forward {self.forward:.10g}, "
                f"difference {self.difference:.10g}, error {self.error:.1e}")


class Gradients(NamedTuple):
    """The derivatives of all leaves; prints as a table."""

    rows: list[Derivative]

    @property
    def worst(self) -> Derivative:
        """The derivative with the largest error."""
        return max(self.rows, key=lambda row: row.error)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))


def check_gradients(
    f: Callable[..., Any], *args: Any, tolerance: float = 1e-6, seed: int = 0
) -> Gradients:
    """Compare reverse mode, forward mode and central finite differences of f, in float64.

    Outputs are projected on a random vector, and each floating-point leaf of the arguments is moved
    along a random direction, so that every entry of its gradient contributes.

    Args:
        f: a function of pytrees, differentiable at `args`.
        args: its arguments; floats are converted to float64, all others are constant.
        tolerance: the largest allowed error, relative to the derivative, or to 1e-3 of the largest
            derivative of all leaves if that is more.
        seed: of the directions.

    Returns:
        The derivatives of all leaves; `worst` is the one with the largest error.

    Raises:
        LayerError: the three ways disagree, naming the worst leaf; f returns float32, because it
            closes over arrays of that dtype.

    Example:
        >>> print(dp.gradients.check_gradients(jnp.sin, jnp.array(0.0)).worst.error < 1e-8)
        True
    """
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        wide = jax.tree.map(widened, args)
        leaves, structure = jax.tree.flatten(wide)
        places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
        names = list(paths(wide[0] if len(args) == 1 else wide))
        if not places:
            raise LayerError("at least one floating-point argument", show(args),
                             "convert one: x.astype(jnp.float32)")
        floats = [leaves[i] for i in places]

        def projected(floats: list[Any], weights: list[Any]) -> Any:
            """The outputs of f, projected on the weights: one number."""
            whole = list(leaves)
            for i, leaf in zip(places, floats, strict=True):
                whole[i] = leaf
            outputs = [y for y in jax.tree.leaves(f(*structure.unflatten(whole))) if is_float(y)]
            return sum(map(jnp.vdot, weights, outputs), jnp.zeros(()))

        def tangent(floats: list[Any], tangents: list[Any], weights: list[Any]) -> Any:
            return jax.jvp(lambda floats: projected(floats, weights), (floats,), (tangents,))[1]

        shapes = [y for y in jax.tree.leaves(jax.eval_shape(f, *wide)) if is_float(y)]
        if not shapes:
            raise LayerError("a function that returns floating-point numbers", "none",
                             "return what is to be differentiated")
        if any(y.dtype != jnp.float64 for y in shapes):
            raise LayerError("a function that computes in float64", show(shapes),
                             "pass it the arrays that it closes over as arguments")
        weights = [rng.normal(size=y.shape) for y in shapes]
        value, forward = jax.jit(projected), jax.jit(tangent)
        reverse = jax.jit(jax.grad(projected))(floats, weights)
        return compared(
            [names[i] for i in places], floats, lambda floats: value(floats, weights), reverse,
            lambda tangents: forward(floats, tangents, weights), tolerance, rng)


def compared(
    names: list[str], moved: list[Any], value: Callable[[list[Any]], Any], reverse: list[Any],
    forward: Callable[[list[Any]], Any], tolerance: float, draw: np.random.Generator,
) -> Gradients:
    """The derivatives of a number along a random direction in each leaf.

    Args:
        names, moved: paths and values of the leaves.
        value: ``moved -> number``.
        reverse: the gradient, in reverse mode.
        forward: ``tangents -> number``, the derivative in forward mode.
        tolerance: as in `check_gradients`.
        draw: the generator of the directions.

    Raises:
        LayerError: as `check_gradients` does.
    """
    found = []
    for i, leaf in enumerate(moved):
        direction = draw.normal(size=leaf.shape)
        direction /= max(np.linalg.norm(direction), 1e-30)
        tangents = [np.zeros(a.shape) for a in moved]
        tangents[i] = direction
        ahead = [a + _STEP * b for a, b in zip(moved, tangents, strict=True)]
        behind = [a - _STEP * b for a, b in zip(moved, tangents, strict=True)]
        difference = (float(value(ahead)) - float(value(behind))) / (2 * _STEP)
        reverse_mode = float(np.vdot(direction, reverse[i]))
        found.append((reverse_mode, float(forward(tangents)), difference))
    finite = [abs(value) for three in found for value in three if np.isfinite(value)]
    floor = max([1e-3 * value for value in finite] + [1e-6])
    rows = []
    for path, (backward, along, difference) in zip(names, found, strict=True):
        error = _error((backward, along, difference), floor)
        rows.append(Derivative(path or "the argument", backward, along, difference, error))
    result = Gradients(rows)
    if not result.worst.error <= tolerance:
        raise LayerError(f"derivatives that agree to {tolerance:g}", str(result.worst),
                         "mend its derivative, or move away from a kink")
    return result


def _error(derivatives: tuple[float, float, float], floor: float) -> float:
    """The relative difference of the derivatives; infinite if one is not finite."""
    if not np.all(np.isfinite(derivatives)):
        return float("inf")
    return (max(derivatives) - min(derivatives)) / max(*map(abs, derivatives), floor)


def widened(leaf: Any) -> Any:
    """A floating-point array in float64, others unchanged; needs x64."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if is_float(leaf) else leaf
