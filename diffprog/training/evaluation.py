"""A net at rest on any number of examples: its metrics, and its outputs.

The first axis of all that is given is that of examples, and neither depends on how it is cut.
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
from diffprog.training.averages import averages, examples
from diffprog.training.axes import check_examples, parts, sides_of_examples
from diffprog.training.step import Step, TrainState, check_state, check_step

__all__ = ["evaluate", "predict"]


def evaluate(step: Step, state: TrainState, data: Iterable[Any]) -> dict[str, float]:
    """The metrics of the objective at rest, averaged over all entries of all batches.

    They do not depend on how the data is cut into batches: each weighs with what it is a mean over,
    or with its examples, if the objective does not count; and what is drawn is drawn for each
    example by its number in the data, alike in every call.

    Args:
        step: what `make_step` gives.
        state: what `fit` or ``step.init`` gives.
        data: batches, gone through once. What they may be made of, see `fit`.

    The net is at rest, at the ``eval_params`` of the step; a stream is left where it is, and the
    examples begin anew.

    Raises:
        LayerError: there is no batch, or no end of them; `step` is none, or `state` none of
            training; a metric is no number; batches of unlike sizes for an objective across
            examples, which would compare an example with fewer others.

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
        count = examples(batch)
        size = size or count
        if step.across_examples and count != size:
            raise LayerError(f"batches of one size, {size}, for an objective across examples",
                             f"one of {count}", "leave the last examples out, or choose a "
                             "batch_size that divides them")
        metrics.append(step.evaluate(state, batch, first))
        first += count
    if not metrics:
        raise LayerError("at least one batch", "none",
                         "pass an iterable that can be begun anew, such as batches(...)")
    return step.combine(averages(metrics))


def predict(
    net: Layer, params: Params, x: Any, *, state: State | None = None, batch_size: int = 256,
    check_axes: bool = True, **side: Any,
) -> Any:
    """The output of a net at rest on any number of examples, `batch_size` at a time.

    The last part is filled up with copies of its last example, so that one program is compiled.
    Outputs are joined along their axis of examples, wherever it is; what has none is that of the
    first part.

    Args:
        net: any layer.
        params, state: of the net.
        x: a pytree of arrays with one first axis of examples.
        batch_size: examples at a time; positive.
        check_axes: as in `make_step`. False takes x as a whole, whatever its size.
        side: side inputs, with that first axis too, or without: these hold for all examples.

    Raises:
        LayerError: as the net does; `net` is a step; x has no axis of examples, or an output one of
            another length; `check_axes` finds something.

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
    apply = jax.jit(net.apply)  # the same function each time, so that its programs are kept
    if not check_axes:
        return apply(params, state or {}, x, **side)[0]
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1 or lengths == {()}:
        raise LayerError("arrays of one length along the first axis", show(x),
                         "give each an axis of examples")
    ((length,),) = lengths
    if not known(length) or length <= batch_size:
        check_examples(net, x, side)
        return apply(params, state or {}, x, **side)[0]

    def cut(a: Any, start: int) -> Any:
        part = a[start : start + batch_size]
        missing = batch_size - len(part)
        return jnp.concatenate([part, *[part[-1:]] * missing]) if missing else part

    own, (less, more) = sides_of_examples(net, x, side, length, batch_size, batch_size + 1)
    check_examples(net, *parts(x, side, own, batch_size), cut=True)
    axes = jax.tree.map(grown, less, more)
    for axis, a in zip(jax.tree.leaves(axes), jax.tree.leaves(less), strict=True):
        if axis >= 0 and a.shape[axis] != batch_size:
            raise LayerError(f"outputs with an axis of the {batch_size} examples", show(less),
                             "keep examples apart from other axes")
    outputs = []
    for start in range(0, length, batch_size):
        part = jax.tree.map(functools.partial(cut, start=start), (x, {n: side[n] for n in own}))
        outputs.append(apply(params, state or {}, part[0], **side | part[1])[0])

    def join(axis: int, *found: Any) -> Any:
        if axis < 0:
            return found[0]
        return jax.lax.slice_in_dim(jnp.concatenate(found, axis), 0, length, axis=axis)

    return jax.tree.map(join, axes, *outputs)
