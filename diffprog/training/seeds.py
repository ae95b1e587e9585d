"""Results over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffprog.core.errors import LayerError
from diffprog.core.notation import show

__all__ = ["Spread", "over_seeds"]


class Spread(NamedTuple):
    """The mean and the standard deviation of results, each with the structure of one result.

    Attributes:
        mean: over seeds.
        deviation: of one seed, ``sqrt(sum((x - mean)^2) / (n - 1))``; that of the mean over n seeds
            is ``deviation / sqrt(n)``.
    """

    mean: Any
    deviation: Any


def over_seeds(results: Any) -> Spread:
    """The mean and the sample standard deviation over seeds, entry by entry, in float64.

    Args:
        results: a list of results, one per seed: numbers, metrics of `evaluate`, histories of
            `fit`; or one pytree of arrays with an axis of seeds first, as `jax.vmap` returns.

    Raises:
        LayerError: fewer than two seeds; results of different structures or shapes.

    Example:
        >>> mean, deviation = dp.training.over_seeds([{"accuracy": 0.9}, {"accuracy": 0.8}])
        >>> print(f"{mean['accuracy']:.3f} ± {deviation['accuracy']:.3f}")
        0.850 ± 0.071
        >>> dp.training.over_seeds({"loss": jnp.array([[1.0, 2.0], [3.0, 2.0]])}).mean["loss"]
        array([2., 2.])
    """
    if isinstance(results, Sequence):
        results = _stacked(results)
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(results)}
    if len(sizes) != 1 or min(sizes) < (2,):
        raise LayerError("results of at least 2 seeds, on the first axis", show(results),
                         "pass a list with a result per seed, or arrays with an axis of seeds")
    wide = jax.tree.map(lambda x: np.asarray(x, float), results)
    return Spread(jax.tree.map(lambda x: x.mean(0), wide),
                  jax.tree.map(lambda x: x.std(0, ddof=1), wide))


def _stacked(results: Sequence[Any]) -> Any:
    """A list of results as one, with an axis of seeds first."""
    for result in results:
        if _form(result) != _form(results[0]):
            raise LayerError(f"results of one form, as {show(results[0])}", show(result),
                             "keep what all seeds have: the same metrics, at the same steps")
    stacked = (np.stack([*map(np.asarray, each)]) for each in zip(
        *map(jax.tree.leaves, results), strict=True))
    return jax.tree.unflatten(jax.tree.structure(results[0]), stacked) if results else []


def _form(result: Any) -> Any:
    return jax.tree.structure(result), [*map(np.shape, jax.tree.leaves(result))]
