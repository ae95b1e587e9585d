"""Norms and histograms of parameters while they are trained.

An observer is a function ``(step, state, metrics)``, called at each reading of a run, that uses the
metrics or adds to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.dtypes import norm, wide
from diffprog.core.paths import select

__all__ = ["Histogram", "watch"]

Observer = Callable[[int, Any, dict[str, Any]], None]
Measured = dict[str, tuple[Any, Any]]  # path -> (norm, counts)

_POWERS = 2.0 ** np.arange(-16, 5)
EDGES = np.concatenate([-_POWERS[::-1], _POWERS])


class Histogram(NamedTuple):
    """The number of entries in each bin: ``counts, edges``, as `numpy.histogram` returns them.

    Attributes:
        counts: of the bins; entries beyond the outermost edges of `watch` count in its outermost
            bins, and NaN in none.
        edges: of the bins, one more than counts.
    """

    counts: list[int]
    edges: list[float]


def watch(pattern: str) -> Observer:
    """An observer that adds norms and histograms of the parameters that match a pattern.

    The metrics ``norm/<path>`` are Euclidean norms, in float32 or wider, and ``histogram/<path>``
    are of the type `Histogram`. The edges of the bins are powers of two with both signs, from 2^-16
    to 2^4; empty bins at both ends are left out. Weights & Biases takes a histogram as
    ``wandb.Histogram(np_histogram=histogram)``. A complex entry counts by its magnitude.
    `dp.inspection.watch_gradients` and `dp.inspection.watch_activations` do the same for these.

    Args:
        pattern: of paths of parameters, in which ``*`` is one level and ``**`` any number.

    Returns:
        ``(step, state, metrics)``, where state is a `TrainState`, or the parameters themselves.

    Raises:
        LayerError: at the first call, if the pattern matches nothing.

    Example:
        >>> watch = dp.runtime.watch("**/kernel")
        >>> params = {"head": {"kernel": jnp.array([3.0, -4.0, 3.5]), "bias": jnp.ones(2)}}
        >>> metrics = {"loss": 0.5}
        >>> watch(1, params, metrics)
        >>> round(metrics["norm/head/kernel"], 3)
        6.103
        >>> metrics["histogram/head/kernel"].counts[-1]  # in [2, 4]
        2
    """
    def add(step: int, state: Any, metrics: dict[str, Any]) -> None:
        record(metrics, measured(select(getattr(state, "params", state), pattern)))

    return add


@jax.jit
def measured(leaves: Mapping[str, Any]) -> Measured:
    """Norm and counts of each leaf, under its path."""
    return {path: _norm_and_counts(x) for path, x in leaves.items()}


def record(metrics: dict[str, Any], found: Measured, kind: str = "") -> None:
    """Add what `measured` returned to the metrics, as norms and histograms of this kind."""
    for path, (size, counts) in jax.device_get(found).items():
        metrics[f"{kind}norm/{path}"] = float(size)
        metrics[f"{kind}histogram/{path}"] = _trimmed(counts)


def _norm_and_counts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = jnp.abs(x) if jnp.iscomplexobj(x) else x
    x = wide(x).ravel()
    bins = len(EDGES) - 1
    bin_ = jnp.searchsorted(jnp.asarray(EDGES, x.dtype), x, side="right") - 1
    bin_ = jnp.where(jnp.isnan(x), bins, jnp.clip(bin_, 0, bins - 1))
    return norm([x]), jnp.bincount(bin_, length=bins + 1)[:bins]


def _trimmed(counts: np.ndarray[Any, Any]) -> Histogram:
    """The histogram without empty bins at both ends."""
    full = np.flatnonzero(counts)
    first, last = (int(full[0]), int(full[-1])) if full.size else (0, 0)
    return Histogram(counts[first : last + 1].tolist(), EDGES[first : last + 2].tolist())
