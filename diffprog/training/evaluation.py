"""Inference on any number of examples: metrics and outputs.

The first axis is the batch axis; results do not depend on how it is cut into batches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count, check_kept, known
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer, check_layer
from diffprog.core.notation import show
from diffprog.core.plans import Params, State, grown
from diffprog.data.batches import as_batch, check_ends
from diffprog.training.averages import average_batches, count_examples
from diffprog.training.axes import check_examples, example_sides, parts
from diffprog.training.step import Step, TrainState, check_state, check_step

__all__ = ["evaluate", "predict"]


def evaluate(step: Step, state: TrainState, data: Iterable[Any]) -> dict[str, float]:
    """The metrics of the objective in inference, averaged over all entries of all batches.

    They do not depend on how the data is cut into batches: each metric is weighted by its count,
    or by the number of examples if the objective returns no count. Randomness depends on the number
    of an example in the data alone, and is the same in every call.

    Args:
        step: a step of `make_step`.
        state: a state of `fit` or ``step.init``.
        data: batches, iterated once; as in `fit`.

    The net computes in inference, at the ``eval_params`` of the step. The state of a stream is
    neither used nor changed.

    Raises:
        LayerError: no batch, or endless data; `step` is no `Step`, or `state` no `TrainState`; a
            metric is no number; batches of different sizes for an objective across examples,
            which would compare an example with fewer others.

    Example:
        >>> step = dp.make_step(dp.linear(3), dp.classification(), optax.sgd(0.1))
        >>> x, y = jnp.ones((5, 4)), jnp.zeros(5, jnp.int32)
        >>> state = step.init(jax.random.key(0), x)
        >>> sorted(dp.evaluate(step, state, dp.batches((x, y), 2)))
        ['accuracy', 'loss']
    """
    check_step(step)
    check_state(state)
    check_ends("data", data)
    metrics, first, size = [], 0, 0
    for batch in data:
        batch = as_batch(batch)
        count = count_examples(batch)
        size = size or count
        if step.across_examples and count != size:
            raise LayerError(f"batches of one size, {size}, for an objective across examples",
                             f"one of {count}", "leave the last examples out, or choose a "
                             "batch_size that divides them")
        metrics.append(step.evaluate(state, batch, first))
        first += count
    if not metrics:
        raise LayerError("at least one batch", "none",
                         "pass an iterable that can be iterated again, such as batches(...)")
    return step.combine(average_batches(metrics))


def predict(
    net: Layer, params: Params, x: Any, *, state: State | None = None, batch_size: int = 256,
    check_axes: bool = True, **side: Any,
) -> Any:
    """The output of a net in inference on any number of examples, `batch_size` at a time.

    The last batch is padded with copies of its last example, so that one program is compiled.
    Outputs are concatenated along their batch axis, wherever it is; an output without one is that
    of the first batch.

    Args:
        net: any layer.
        params, state: of the net.
        x: a pytree of arrays with the batch axis first.
        batch_size: examples per batch; positive.
        check_axes: as in `make_step`. False applies the net to x as a whole, whatever its size.
        side: side inputs, with the batch axis first, or without one if they apply to all examples.

    Raises:
        LayerError: as the net does; `net` is a step; x has no batch axis, or an output has one of
            another length; `check_axes` fails.

    Example:
        >>> net = dp.linear(3)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> dp.predict(net, params, jnp.ones((1000, 4)), batch_size=64).shape
        (1000, 3)
    """
    check_count("batch_size", batch_size)
    if isinstance(net, Step):
        raise LayerError("a net to predict by", "a Step",
                         "write predict(step.net, step.eval_params(state), x, state=state.state)")
    check_layer(net, "predict(net, params, x)")
    check_kept((params, state))
    x, side = as_batch((x, {name: value for name, value in side.items() if value is not None}))
    apply = jax.jit(net.apply)  # the same function each time, so that compiled programs are reused

    def run(x: Any, side: dict[str, Any]) -> Any:
        return apply(params, state or {}, x, **side)[0]

    if not check_axes:
        return run(x, side)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1 or lengths == {()}:
        raise LayerError("arrays of one length along the first axis", show(x),
                         "give each a batch axis")
    ((length,),) = lengths
    if not known(length) or length <= batch_size:
        check_examples(net, x, side)
        return run(x, side)

    own, (less, more) = example_sides(net, x, side, length, batch_size, batch_size + 1)
    check_examples(net, *parts(x, side, own, batch_size), cut=True)
    axes = jax.tree.map(grown, less, more)
    for axis, a in zip(jax.tree.leaves(axes), jax.tree.leaves(less), strict=True):
        if axis >= 0 and a.shape[axis] != batch_size:
            raise LayerError(f"outputs with an axis of the {batch_size} examples", show(less),
                             "keep examples apart from other axes")
    outputs = []
    for start in range(0, length, batch_size):
        cut = functools.partial(_padded_part, start=start, size=batch_size)
        part, own_side = jax.tree.map(cut, (x, {name: side[name] for name in own}))
        outputs.append(run(part, side | own_side))
    return jax.tree.map(functools.partial(_joined, length), axes, *outputs)


def _padded_part(a: Any, *, start: int, size: int) -> Any:
    """`size` rows from `start` on, padded with copies of the last row."""
    part = a[start : start + size]
    missing = size - len(part)
    return jnp.concatenate([part, *[part[-1:]] * missing]) if missing else part


def _joined(length: int, axis: int, *parts: Any) -> Any:
    """The parts concatenated along the batch axis, without padding; the first if there is none."""
    if axis < 0:
        return parts[0]
    return jax.lax.slice_in_dim(jnp.concatenate(parts, axis), 0, length, axis=axis)
