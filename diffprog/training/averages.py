"""Averages of metrics, such that no metric depends on how the data is cut into batches.

Each metric is a mean, weighted by its count: ``count/<name>`` if the objective returns that, and
``count`` otherwise. In inference an objective draws separately for each example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.dtypes import wide
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import beside
from diffprog.core.notation import show
from diffprog.core.plans import Params, State
from diffprog.training.axes import example_sides
from diffprog.training.objectives import Metrics, Objective, parts


def with_count(metrics: Metrics, batch: Any) -> Metrics:
    """The metrics with a count: by default the number of examples of the batch."""
    if "count" in metrics:
        return metrics
    return {**metrics, "count": jnp.asarray(count_examples(batch))}


def with_skipped(skipped: jax.Array, metrics: Metrics) -> Metrics:
    """The metrics with counts of 0 if the step was skipped, and the metric ``skipped``."""
    counts = {name: jnp.where(skipped, 0, value) for name, value in metrics.items()
              if _is_count(name)}
    return {**metrics, **counts, "skipped": skipped.astype(jnp.float32),
            "count/skipped": jnp.ones(())}


def count_examples(batch: Any) -> int:
    """The number of examples in a batch: the first axis of its x, or else of any array."""
    if isinstance(batch, Mapping) and "x" in batch:
        batch = batch["x"]
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    return max((shape[0] for shape in shapes if shape), default=1)


def inference_metrics(
    objective: Objective, net: Layer, params: Params, state: State, batch: Any, *, key: Any,
    first: Any,
) -> Metrics:
    """The metrics of an objective in inference on a batch whose first example is number `first`.

    An objective that draws is evaluated on one example at a time, with a key from the number of
    that example. One across examples cannot be; it gets the key of the first example, as does one
    that does not declare that it draws.
    """
    def run(batch: Any, key: Any) -> Metrics:
        _, (_, metrics) = objective(net, params, state, batch, key=key, train=False)
        return with_count(metrics, batch)

    if is_across_examples(objective) or not draws(objective):
        return run(batch, None if key is None else jax.random.fold_in(key, first))
    count = count_examples(batch)
    leaves, structure = jax.tree.flatten(batch)
    own_axis = per_example(objective, net, batch, count)

    def run_one(leaves: list[Any], key: Any) -> Metrics:
        one = [a[None] if own else a for a, own in zip(leaves, own_axis, strict=True)]
        return run(jax.tree.unflatten(structure, one), key)

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))
    example_leaf = next(a for a, own in zip(leaves, own_axis, strict=True) if own)
    keys = beside(keys, example_leaf)
    axes = [0 if own else None for own in own_axis]
    return average_parts(jax.vmap(run_one, (axes, 0))(leaves, keys))


def per_example(objective: Objective, net: Layer, batch: Any, count: int) -> list[bool]:
    """For each leaf of a batch, whether its first axis is the batch axis.

    A side input of the same length may nevertheless apply to all examples.
    """
    def has_axis(value: Any) -> list[bool]:
        return [jnp.shape(leaf)[:1] == (count,) for leaf in jax.tree.leaves(value)]

    if not isinstance(batch, Mapping) or not net.side & batch.keys():
        return has_axis(batch)
    inputs = getattr(objective, "inputs", lambda net, batch: parts(net, batch)[::2])
    try:
        x, side = inputs(net, batch)
        common = side.keys() - example_sides(net, x, side, count, count, count + 1)[0]
    except (TypeError, ValueError):
        common = set()  # the net is not called on x as it is in the batch
    found = []
    for name in sorted(batch):  # the order of the leaves
        found += [fits and name not in common for fits in has_axis(batch[name])]
    return found


def draws(objective: Objective) -> bool:
    """Whether the objective declares that it draws in inference."""
    return getattr(objective, "draws", False)


def is_across_examples(objective: Objective) -> bool:
    """Whether the objective declares that it compares the examples of a batch."""
    return getattr(objective, "across_examples", False)


def average_parts(metrics: Metrics) -> Metrics:
    """The means over a first axis, each with its total count."""
    found: Metrics = {"count": metrics["count"].sum()}
    for name in mean_names(metrics):
        mean, total = _mean(wide(metrics[name]), count_of(name, metrics), jnp)
        found |= {name: mean, f"count/{name}": total}
    return found


def average_batches(batches: list[Metrics]) -> dict[str, float]:
    """The means over all entries of all batches, in float64."""
    check_numbers(batches[0])
    read: list[Mapping[str, Any]] = jax.device_get(batches)
    columns = {name: np.array([metrics[name] for metrics in read], float) for name in read[0]}
    return {name: float(_mean(columns[name], count_of(name, columns), np)[0])
            for name in mean_names(columns)}


def count_of(name: str, metrics: Mapping[str, Any]) -> Any:
    """The counts that a metric is weighted by."""
    own = f"count/{name}"
    return metrics[own if own in metrics else "count"]


def _mean(values: Any, counts: Any, xp: Any) -> tuple[Any, Any]:
    """``sum(values * counts) / sum(counts)`` and the divisor, by NumPy or by `jax.numpy`.

    A value with count 0 contributes nothing, even if it is NaN.
    """
    total = counts.sum()
    summed = (xp.where(counts == 0, 0, values) * counts.astype(values.dtype)).sum()
    return summed / xp.where(total == 0, 1, total).astype(summed.dtype), total


def check_numbers(metrics: Mapping[str, Any]) -> None:
    """Raise for a metric that is not a scalar: its average would be ambiguous."""
    for name, value in metrics.items():
        if jnp.shape(value) != ():
            raise LayerError(f"metrics that are one number each, as {name}", show(value),
                             "take its mean, or return its entries under names of their own")


def mean_names(metrics: Mapping[str, Any]) -> list[str]:
    """The names of the metrics that are means, not counts."""
    return [name for name in metrics if not _is_count(name)]


def _is_count(name: str) -> bool:
    return name.split("/")[0] == "count"
