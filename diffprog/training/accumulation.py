"""The loss and gradient of a large batch, computed part by part.

A mean over the batch is the mean over its parts weighted by their counts, of valid tokens or
examples: an average of averages would weight a token in a short text more than one in a long text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.dtypes import wide, wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.loops import convolves, scan
from diffprog.core.notation import show
from diffprog.core.plans import Params, State
from diffprog.training.averages import (
    average_parts,
    check_numbers,
    count_examples,
    count_of,
    is_across_examples,
    mean_names,
    per_example,
    with_count,
)
from diffprog.training.descent import averages_if
from diffprog.training.objectives import Metrics, Objective

Result = tuple[jax.Array, tuple[State, Metrics]]  # loss, state of the net, metrics
Weigh = Callable[[jax.Array, Metrics], jax.Array]  # loss and metrics of a part -> what it adds


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """A batch in `parts` parts, which the objective gets one after the other.

    The state of the net passes from part to part, and each part has a key of its own. Averages of
    `ema` move once, as the optimizer does.
    """

    objective: Objective
    net: Layer
    state: State
    batch: Any
    key: jax.Array
    parts: int

    def loss(self, params: Params) -> Result:
        """The loss of the whole batch, the state after its last part, and its metrics."""
        state, (values, metrics) = self._scan(
            lambda state, number, part: self._part(params, state, number, part), self.state)
        return self._result(values, state, metrics)

    def gradient(self, params: Params, scale: jax.Array | None = None) -> tuple[Result, Params]:
        """`loss`, and the gradient of the loss times `scale` by the parameters."""
        weigh, divided = self._weighing(params)

        def weighed(params: Params, state: State, number: jax.Array, part: Any) -> Any:
            after, (value, metrics) = self._part(params, state, number, part)
            weighted = weigh(value, metrics)
            if scale is not None:
                weighted = weighted * scale.astype(weighted.dtype)
            return weighted, (after, (value, metrics))

        def step(carry: Any, number: jax.Array, part: Any) -> Any:
            total, state = carry
            (_, (state, found)), grads = jax.value_and_grad(weighed, has_aux=True)(
                params, state, number, part)
            empty = count_of("loss", found[1]) == 0  # its loss may be of no number
            total = jax.tree.map(
                lambda t, g: t + jnp.where(empty & divided, 0, g.astype(t.dtype)), total, grads)
            return (total, state), found

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, wide_dtype(leaf)), params)
        (total, state), (values, metrics) = self._scan(step, (zeros, self.state))
        count = count_of("loss", metrics).sum() if divided else jnp.ones(())
        divisor = jnp.where(count == 0, 1, count)
        grads = jax.tree.map(lambda t, p: (t / divisor.astype(t.dtype)).astype(p.dtype),
                             total, params)
        return self._result(values, state, metrics), grads

    def _weighing(self, params: Params) -> tuple[Weigh, bool]:
        """What a part adds to the loss, and whether the sum must be divided by the count.

        A loss of several means over different counts, as `masked_language` has, depends on each
        through its average over all parts, which takes a pass of its own.
        """
        if not hasattr(self.objective, "combine"):
            count = lambda metrics: count_of("loss", metrics)  # noqa: E731
            return lambda value, metrics: value * count(metrics).astype(value.dtype), True
        _, (_, means) = jax.lax.stop_gradient(self.loss(params))
        names = mean_names(means)
        slopes = jax.grad(lambda found: self._combined(found)["loss"])(
            {name: wide(means[name]) for name in names})

        def weigh(value: jax.Array, metrics: Metrics) -> jax.Array:
            fraction = {name: _fraction(count_of(name, metrics), count_of(name, means))
                     for name in names}
            rest = value - metrics["loss"]  # penalties, which do not depend on the data
            return rest * fraction["loss"] + sum(
                slopes[name] * fraction[name] * jnp.where(fraction[name] == 0, 0, metrics[name])
                for name in names)

        return weigh, False

    def _combined(self, means: Metrics) -> Metrics:
        return {**means, **self.objective.combine(means)}  # type: ignore[attr-defined]

    def _part(self, params: Params, state: State, number: jax.Array, part: Any) -> Any:
        """The objective of one part: the state after it, its loss and its metrics."""
        value, (after, metrics) = self.objective(
            self.net, params, state, part, key=jax.random.fold_in(self.key, number), train=True)
        check_numbers(metrics)
        after = averages_if(number == self.parts - 1, state, after)
        return after, (value, with_count(metrics, part))

    def _scan(self, step: Callable[..., Any], carry: Any) -> Any:
        """``step(carry, number, part) -> (carry, found)``, over all parts."""
        leaves, structure = jax.tree.flatten(self.batch)
        count = count_examples(self.batch)
        own = per_example(self.objective, self.net, self.batch, count)
        split = [_split(a, self.parts) for a, is_own in zip(leaves, own, strict=True) if is_own]

        def run(carry: Any, at: Any) -> Any:
            number, given = at[0], iter(at[1])
            part = [next(given) if is_own else a for a, is_own in zip(leaves, own, strict=True)]
            return step(carry, number, structure.unflatten(part))

        xs = jnp.arange(self.parts), split
        first = jax.tree.map(lambda a: a[0], xs)
        return scan(run, carry, xs, length=self.parts,
                    convolving=lambda: convolves(run, carry, first))

    def _result(self, values: jax.Array, state: State, metrics: Metrics) -> Result:
        means = average_parts({
            **metrics, "#value": values, "count/#value": count_of("loss", metrics)})
        value = means.pop("#value")
        del means["count/#value"]
        if hasattr(self.objective, "combine"):
            rest = value - means["loss"]
            means = self._combined(means)
            value = means["loss"] + rest
        return value, (state, means)


def check_accumulation(objective: Objective, batch: Any, parts: int) -> None:
    """Raise unless the batch can be cut into equal parts that the objective takes one by one."""
    if is_across_examples(objective):
        raise LayerError("an objective of single examples for accumulate",
                         "one that compares the examples of a batch",
                         "leave accumulate out: a part lacks the examples of the others")
    lengths = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf)}
    if len(lengths) > 1 and not (isinstance(batch, Mapping) and "x" in batch):
        raise LayerError("arrays of one length, or a dict with x, for accumulate", show(batch),
                         "name the arrays, so that x tells the examples from other arrays")
    if (count := count_examples(batch)) % parts:
        raise LayerError(f"a batch that can be cut into accumulate={parts} equal parts",
                         f"one of {count} examples, {show(batch)}",
                         "choose a batch_size that it divides, and no smaller last batch")


def _fraction(count: jax.Array, total: jax.Array) -> jax.Array:
    """The fraction of a part in a mean; counts are sums of weights too, also below one."""
    return count / jnp.where(total == 0, 1, total)


def _split(a: jax.Array, parts: int) -> jax.Array:
    """(batch, ...) as (parts, batch / parts, ...), each part from all over the batch.

    So each device of a batch that is sharded holds some of every part.
    """
    return jnp.moveaxis(jnp.reshape(a, (a.shape[0] // parts, parts, *a.shape[1:])), 1, 0)
