"""Metrics of parts become those of the whole, so that no number depends on how data is cut.

Each is a mean, and weighs with what it is a mean over: with ``count/<name>``, or else ``count``.
What an objective draws at rest it draws for each example by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import beside
from diffprog.core.notation import show
from diffprog.core.plans import Params, State
from diffprog.losses.entries import wide
from diffprog.training.axes import sides_of_examples
from diffprog.training.objectives import Metrics, Objective, parts


def counted(metrics: Metrics, batch: Any) -> Metrics:
    """The metrics; what their objective does not count weighs with the examples of the batch."""
    return metrics if "count" in metrics else {**metrics, "count": jnp.asarray(examples(batch))}


def unless(skipped: jax.Array, metrics: Metrics) -> Metrics:
    """Metrics that weigh nothing if their step was skipped, and `skipped`, the share of those."""
    counts = {name: jnp.where(skipped, 0, value) for name, value in metrics.items()
              if name not in means(metrics)}
    return {**metrics, **counts, "skipped": skipped.astype(jnp.float32),
            "count/skipped": jnp.ones(())}


def examples(batch: Any) -> int:
    """How many examples a batch has: the length of its first axis, of x if it has one."""
    if isinstance(batch, Mapping) and "x" in batch:
        batch = batch["x"]
    return max((shape[0] for leaf in jax.tree.leaves(batch) if (shape := jnp.shape(leaf))),
               default=1)


def at_rest(
    objective: Objective, net: Layer, params: Params, state: State, batch: Any, *, key: Any,
    first: Any,
) -> Metrics:
    """The metrics of an objective at rest on a batch whose examples are number `first` and on.

    One that draws is shown one example at a time, with a key of its number; one across examples,
    which cannot be, and one that does not say so, are given that of the first.
    """
    def run(batch: Any, key: Any) -> Metrics:
        return counted(objective(net, params, state, batch, key=key, train=False)[1][1], batch)

    if across(objective) or not draws(objective):
        return run(batch, None if key is None else jax.random.fold_in(key, first))
    count = examples(batch)
    leaves, structure = jax.tree.flatten(batch)
    cut = _of_examples(objective, net, batch, count)

    def alone(leaves: list[Any], key: Any) -> Metrics:
        one = [a[None] if own else a for a, own in zip(leaves, cut, strict=True)]
        return run(jax.tree.unflatten(structure, one), key)

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))
    keys = beside(keys, next(a for a, own in zip(leaves, cut, strict=True) if own))
    return averaged(jax.vmap(alone, ([0 if own else None for own in cut], 0))(leaves, keys))


def _of_examples(objective: Objective, net: Layer, batch: Any, count: int) -> list[bool]:
    """Which leaves of a batch have an axis of examples; side inputs may hold for all of them."""
    def long(value: Any) -> list[bool]:
        return [jnp.shape(leaf)[:1] == (count,) for leaf in jax.tree.leaves(value)]

    if not isinstance(batch, Mapping) or not net.side & batch.keys():
        return long(batch)
    shown = getattr(objective, "inputs", lambda net, batch: parts(net, batch)[::2])
    try:
        x, side = shown(net, batch)
        whole = side.keys() - sides_of_examples(net, x, side, count, count, count + 1)[0]
    except (TypeError, ValueError):
        whole = set()  # the objective does not give x to the net as it is
    return [fits and name not in whole for name in sorted(batch) for fits in long(batch[name])]


def draws(objective: Objective) -> bool:
    """Does the objective say that it draws at rest?"""
    return getattr(objective, "draws", False)


def across(objective: Objective) -> bool:
    """Does the objective say that it compares the examples of a batch?"""
    return getattr(objective, "across_examples", False)


def averaged(metrics: Metrics) -> Metrics:
    """Means along a first axis of parts, each with what it was divided by."""
    found: Metrics = {"count": metrics["count"].sum()}
    for name in means(metrics):
        values, counts = wide(metrics[name]), metrics.get(f"count/{name}", metrics["count"])
        total = counts.sum()
        sums = jnp.where(counts == 0, 0, values * counts.astype(values.dtype)).sum()
        divisor = jnp.where(total == 0, 1, total).astype(sums.dtype)
        found |= {name: sums / divisor, f"count/{name}": total}
    return found


def averages(parts: list[Metrics]) -> dict[str, float]:
    """Means over all entries of all parts."""
    check_numbers(parts[0])
    read: list[Mapping[str, Any]] = jax.device_get(parts)

    def average(name: str) -> float:
        values = np.array([part[name] for part in read], float)
        count = "count" if f"count/{name}" not in read[0] else f"count/{name}"
        counts = np.array([part[count] for part in read], float)
        return float((np.where(counts == 0, 0, values) * counts).sum() / (counts.sum() or 1.0))

    return {name: average(name) for name in means(read[0])}


def check_numbers(metrics: Mapping[str, Any]) -> None:
    """Raise for a metric that is no number: there is no telling what its average would be."""
    for name, value in metrics.items():
        if jnp.shape(value) != ():
            raise LayerError(f"metrics that are one number each, as {name}", show(value),
                             "take its mean, or return its entries under names of their own")


def means(metrics: Mapping[str, Any]) -> list[str]:
    """The names of metrics that are no counts."""
    return [name for name in metrics if name.split("/")[0] != "count"]
