"""What is to be made small: an objective maps a net, its trees and a batch to a loss and metrics.

``objective(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``. A batch is a
pair ``(x, y)``, or a dict with ``x``, ``y``, optionally ``mask``, ``target_mask`` and
``sample_weight``, and side inputs under all other names. ``mask`` says what is real of x, over
leading axes of it. It goes to the net, if the net takes one, and to the loss too if the net keeps
these axes. ``target_mask`` says which targets are real, over any leading axes of y, and goes to
loss, metrics and counts alone. ``sample_weight``, numbers of at least 0 over such axes, says how
much each counts in loss and metrics: as if it stood so many times in the batch. What the net makes
of the batch, such as the statistics of `batch_norm`, does not heed it.

Metrics are means over the real entries of the batch; ``count`` says over how many, or what their
weights sum up to, and ``count/<name>`` what the mean of one metric was divided by, where that is
something else.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_share, is_array
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import placed
from diffprog.core.notation import called, code, listed, show
from diffprog.core.plans import spec
from diffprog.losses.classes import binary_cross_entropy, cross_entropy
from diffprog.losses.entries import (
    Mask,
    average,
    check_alike,
    class_numbers,
    is_soft,
    known,
    reduce,
    spread,
    total,
    weighed,
    weighing,
    wide,
)
from diffprog.losses.metrics import accuracy, top_k_accuracy
from diffprog.losses.values import squared_error

__all__ = ["binary_classification", "classification", "regression"]

Metrics = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, tuple[Any, Metrics]]]

OF_TARGETS = ("mask", "target_mask", "sample_weight")  # what a batch may say of its targets

# What makes probabilities of logits, where a loss that takes logits does so itself.
_SQUASHES = (jax.nn.softmax, jax.nn.sigmoid, jax.nn.hard_sigmoid, jax.lax.logistic)


def classification(
    *, label_smoothing: float = 0.0, class_weights: jax.Array | None = None, ignore_index: int
    | None = None,
    top_k: int | None = None, reduction: Literal["mean", "sum"] = "mean",
) -> Objective:
    """The objective of a classifier: `cross_entropy` of the net's logits; metric `accuracy`.

    A batch is ``(x, y)``, or a dict with ``x``, ``y``, optionally ``mask``, what is real of x,
    ``target_mask``, which targets are, and ``sample_weight``, how much each counts in all means:
    numbers of at least 0 (others give NaN) over leading axes of the targets, mostly (batch,), of
    which ``count`` is then the sum. Side inputs of the net stand beside them under their names.

    Where labels are soft, the likeliest class counts as the true one in the metrics.

    Args:
        label_smoothing: as in `cross_entropy`; adds the metric ``cross_entropy``, of targets that
            are not smoothed.
        class_weights: as in `cross_entropy`; metrics but the loss do not heed them.
        ignore_index: entries of this label are not real; often -100.
        top_k: adds the metric ``top_<k>``, the `top_k_accuracy`.
        reduction: whether the loss is the mean over the real entries or their sum.

    Raises:
        LayerError: an argument is out of its range; a net that ends in `jax.nn.softmax` or
            `jax.nn.sigmoid`, which are no logits.

    Example:
        >>> net, x, y = dp.linear(3), jnp.ones((2, 4)), jnp.array([0, 2])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.classification()(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> sorted(metrics)
        ['accuracy', 'count', 'loss']
    """
    check_share("label_smoothing", label_smoothing)
    if top_k is not None:
        check_count("top_k", top_k)
    if reduction not in ("mean", "sum"):
        raise LayerError("reduction out of mean, sum", repr(reduction), "choose one of them")
    loss = functools.partial(
        cross_entropy, label_smoothing=label_smoothing, class_weights=class_weights,
        ignore_index=ignore_index)

    def measure(logits: jax.Array, labels: jax.Array, mask: Mask, weights: Any) -> Metrics:
        soft = is_soft(labels) and labels.shape == logits.shape
        given = labels
        labels = class_numbers(logits, labels.argmax(-1) if soft else labels)
        real = known(labels, mask, ignore_index)
        entries = {"accuracy": accuracy(logits, labels, reduction="none")}
        if label_smoothing:
            entries["cross_entropy"] = cross_entropy(
                logits, given, ignore_index=ignore_index, mask=mask, reduction="none")
        if top_k is not None:
            entries[f"top_{top_k}"] = top_k_accuracy(logits, labels, k=top_k, reduction="none")
        metrics = {name: average(values, real, weights) for name, values in entries.items()}
        metrics["count"] = total(labels.shape, real, weights)
        if class_weights is not None and not soft:
            each = jnp.asarray(class_weights).at[labels].get(
                mode="clip", out_sharding=placed(labels, labels.ndim, 0))
            if weights is not None:
                dtype = joint(each.dtype, weights.dtype)
                each = each.astype(dtype) * weights.astype(dtype)
            metrics["count/loss"] = total(labels.shape, real, each)
        return metrics

    return _objective(loss, measure, features=1, reduction=reduction, scored=True)


def binary_classification() -> Objective:
    """The objective of yes or no: `binary_cross_entropy` of the net's logits; metric `accuracy`.

    The net says yes where its logit is positive, and yes is right where the target is above 1/2.
    Logits and targets have one shape: a net that ends in ``linear(1)`` is followed by
    ``lambda y: y[..., 0]`` if the targets are (batch,).

    Example:
        >>> net = dp.linear(1) >> (lambda y: y[..., 0])
        >>> x, y = jnp.ones((2, 4)), jnp.array([0, 1])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.training.binary_classification()(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> float(metrics["accuracy"])
        0.5
    """

    def measure(logits: jax.Array, targets: jax.Array, mask: Mask, weights: Any) -> Metrics:
        check_alike(logits, targets)
        real = spread(mask, targets.shape)
        hits = (logits > 0) == (wide(targets) > 0.5)
        return {"accuracy": average(hits.astype(jnp.float32), real, weights),
                "count": total(targets.shape, real, weights)}

    return _objective(binary_cross_entropy, measure, scored=True)


def regression(loss: Callable[..., jax.Array] = squared_error) -> Objective:
    """The objective of a net whose output is to equal the target: the mean of `loss`.

    Output and target have one shape, whatever the loss: nothing is broadcast.

    Args:
        loss: `squared_error`, `absolute_error`, or ``functools.partial(huber, delta=...)``. One of
            your own is called as ``loss(output, target, mask=...)``, the mask being None or that of
            leading axes, and gives a number; of batches with ``sample_weight`` also with
            ``reduction="none"``, and gives one number for each entry.

    Raises:
        LayerError: a loss that takes no mask; output and target of unlike shapes.

    Example:
        >>> net, x, y = dp.linear(3), jnp.ones((2, 4)), jnp.ones((2, 3))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.regression(dp.losses.absolute_error)(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> int(metrics["count"])
        6
    """
    _check_loss(loss)

    def measure(output: jax.Array, y: jax.Array, mask: Mask, weights: Any) -> Metrics:
        check_alike(output, y)
        return {"count": total(y.shape, spread(mask, y.shape), weights)}

    return _objective(loss, measure)


def parts(net: Layer, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Input, target and the net's side inputs in a batch; raise for what the net cannot take."""
    if isinstance(batch, Mapping):
        rest = {name: value for name, value in batch.items() if name not in ("x", "y")}
        if not {"x", "y"} <= batch.keys() or rest.keys() - net.side - {*OF_TARGETS}:
            lacks = [name for name in ("x", "y") if name not in batch]
            raise LayerError(f"a batch with x, y, {', '.join(OF_TARGETS)} and side inputs of the "
                             f"net ({listed(net.side)})", listed(batch),
                             f"add {' and '.join(lacks)}" if lacks and batch.keys() <= {"x", "y"}
                             else "rename or remove the rest")
        return batch["x"], batch["y"], {n: v for n, v in rest.items() if n in net.side}
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise LayerError("a batch (x, y), or a dict with x and y", show(batch), "pass one of them")
    return batch[0], batch[1], {}


@contextlib.contextmanager
def masked_as(side: Mapping[str, Any], x: Any, y: Any) -> Iterator[None]:
    """A call of a net; what it says of a mask that fits the targets alone is said in their terms.
    """
    try:
        yield
    except LayerError as error:
        mask: Any = side.get("mask")

        def fits(tree: Any, features: int) -> bool:
            return all(mask.ndim <= leaf.ndim - features and leaf.shape[: mask.ndim] == mask.shape
                       for leaf in jax.tree.leaves(tree))

        if hasattr(mask, "shape") and fits(y, 0) and not fits(x, 1):
            raise LayerError("a mask of axes of x, which the net takes", show(mask),
                             "name it target_mask: it says which targets are real") from error
        raise


def check_target(y: Any) -> None:
    """Raise unless it is one array: a tuple of numbers is many."""
    if not is_array(y):
        raise LayerError("targets y as one array", show(y), "convert them: np.asarray(y)")


def inputs(net: Layer, batch: Any) -> tuple[Any, dict[str, Any]]:
    """What the net is shown of a batch: x and side inputs."""
    x, _, side = parts(net, batch)
    return x, side


def like(objective: Objective) -> Callable[[Objective], Objective]:
    """Let an objective say of itself all that another one does, which may be an object."""
    def said(own: Objective) -> Objective:
        functools.update_wrapper(own, objective)
        for name in ("inputs", "draws", "across_examples", "combine"):
            if hasattr(objective, name):
                setattr(own, name, getattr(objective, name))
        return own

    return said


def explained(objective: Objective) -> Any:
    """The objective, whose answer is looked at, and whose metrics hold its loss.

    What an objective of one's own shows the net, if it does not say so, is the x of a batch.
    """

    @like(objective)
    def answered(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        answer = objective(net, params, state, batch, key=key, train=train)
        match answer:
            case (loss, (dict() as after, Mapping() as metrics)) if after.keys() <= state.keys():
                pass
            case _:
                raise LayerError(
                    "an objective that returns loss, (state, metrics)", show(answer),
                    "return them: the new state of the net, and metrics by name, means over "
                    "metrics['count'] entries, or over the examples where it gives no count")
        if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise LayerError("a loss that is one float", show(loss), "take its mean")
        for name, value in metrics.items():
            if not (hasattr(value, "dtype") or isinstance(value, numbers.Number)):
                raise LayerError(f"metrics that are one number each, as {name}", show(value),
                                 "leave out what is none")
        return loss, (after, {"loss": loss, **metrics})

    def shown(net: Layer, batch: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return inputs(net, batch)
        except LayerError:
            has = f"a dict with {listed(batch)}" if isinstance(batch, Mapping) else show(batch)
            raise LayerError(
                "a batch (x, y), a dict with x and y, or an objective that says what it shows the "
                "net", has, "set objective.inputs = lambda net, batch: (x, {}), with the x of such "
                "a batch, and side inputs in the dict") from None

    said: Any = answered
    said.inputs = getattr(objective, "inputs", shown)
    return said


def check_logits(net: Layer) -> None:
    """Raise for a net that ends in probabilities: its loss would take them for logits."""
    last = net
    while last.name == "serial" and last.children:
        last = [*last.children.values()][-1]
    own = inspect.unwrap(called(last.settings.get("f")))  # of `jax.jit(jax.nn.softmax)`
    if any(own is inspect.unwrap(squash) for squash in _SQUASHES):
        raise LayerError("a net that gives logits", f"one that ends in {last!r}",
                         "leave it out: the loss does it itself, and predictions are "
                         f"{last!r}(net(params, x))")


def _check_loss(loss: Any) -> None:
    """Raise for a loss that cannot be told what is real."""
    if not callable(loss):
        raise LayerError("a loss as a function", show(loss),
            "pass dp.losses.absolute_error, for example")
    if not _takes(loss, {"mask": None}):
        raise LayerError("a loss (output, target, *, mask)", code(loss),
                         "let it take mask=None, which says what is real, and return a number")


def _takes(loss: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    """Can a loss be called with these arguments?"""
    try:
        inspect.signature(loss).bind(None, None, **given)
    except TypeError:
        return False
    except ValueError:
        pass  # a signature that Python does not know
    return True


def _objective(
    loss: Callable[..., jax.Array], measure: Callable[[Any, Any, Any, Any], Metrics], *,
    features: int = 0, reduction: Literal["mean", "sum"] = "mean", scored: bool = False,
) -> Objective:
    """The objective of a loss and further metrics; `features` axes of the output make an entry.

    Of one that is `scored` the output are logits.
    """

    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        if scored:
            check_logits(net)
        x, y, side = parts(net, batch)
        if y is None:
            raise LayerError("a batch with targets", show(batch),
                             "pass (x, y), y being what the net is to give")
        check_target(y)
        with masked_as(side, x, y):
            output, state = net.apply(params, state, x, key=key, train=train, **side)
        check_array(output, features)
        entries = output.shape[: output.ndim - features]
        mask, weights = real_targets(net, batch, x, side, entries)
        metrics = measure(output, y, mask, weights)
        if weights is None:
            mean = loss(output, y, mask=mask)
            whole = mean if reduction == "mean" else loss(output, y, mask=mask, reduction="sum")
        else:
            each = unreduced(loss, output, y, mask, entries)
            whole = reduce(weights.astype(each.dtype) * each, mask, "sum")
            divisor = metrics.get("count/loss", metrics["count"])
            mean = whole / jnp.where(divisor == 0, 1, divisor).astype(whole.dtype)
        value = mean if reduction == "mean" else whole
        return value, (state, {"loss": mean, **metrics})

    said: Any = objective
    said.inputs = inputs
    return said


def unreduced(
    loss: Callable[..., jax.Array], output: Any, y: Any, mask: Mask, entries: tuple[int, ...]
) -> jax.Array:
    """The loss of each entry; raise for one that takes the mean by itself."""
    given = {"mask": mask, "reduction": "none"}
    each = loss(output, y, **given) if _takes(loss, given) else None
    if each is None or jnp.shape(each) != entries:
        raise LayerError(f'a loss that gives one number for each entry, {entries}, with '
                         'reduction="none"', code(loss) if each is None else show(each),
                         'let it take reduction="mean", and return what it takes the mean of '
                         'where that is "none"')
    return each


def real_targets(
    net: Layer, batch: Any, x: Any, side: Mapping[str, Any], entries: tuple[int, ...],
    part: Callable[[Any], Any] = lambda y: y,
) -> tuple[Mask, Any]:
    """Which entries of a target are real, and their weights, by a batch; None is all and alike.

    `part` of the net's output is what the target is compared with. An entry of weight 0 is not
    real: what stands there reaches nothing.
    """
    if not isinstance(batch, Mapping):
        return None, None
    weights = weighing(batch.get("sample_weight"), entries)
    return weighed(_masked(net, batch, x, side, entries, part), weights), weights


def _masked(
    net: Layer, batch: Mapping[str, Any], x: Any, side: Mapping[str, Any],
    entries: tuple[int, ...], part: Callable[[Any], Any],
) -> Mask:
    """Which entries of a target are real, by the masks of a batch."""
    mask, targets = batch.get("mask"), batch.get("target_mask")
    if mask is not None and not _keeps(net, x, side, mask, part):
        if "mask" not in net.side:
            raise LayerError("a mask of axes of x that the net keeps", show(mask),
                             "name it target_mask if it says which targets are real: the net takes "
                             "no mask")
        mask = None  # it says what is real of x alone
    if mask is None or targets is None:
        return targets if mask is None else mask
    return spread(mask, entries) & spread(targets, entries)


def _keeps(
    net: Layer, x: Any, side: Mapping[str, Any], mask: Any, part: Callable[[Any], Any]
) -> bool:
    """Has the output the axes of x that the mask is of? Other lengths tell, where sizes coincide.
    """
    if any(leaf.shape[: mask.ndim] != mask.shape for leaf in jax.tree.leaves(x)):
        return False

    def keeps(axis: int) -> bool:
        for longer in (1, -1):  # there may be no more positions, or no less than a window
            for given in _resized(x, side, axis, mask.shape[axis], longer):
                try:
                    y = part(net.plan(given[0], **given[1]).y)
                except (TypeError, ValueError):
                    continue
                return y.ndim > axis and y.shape[axis] == mask.shape[axis] + longer
        return False

    y = part(net.plan(x, **side).y)
    return y.shape[: mask.ndim] == mask.shape and all(map(keeps, range(1, mask.ndim)))


def _resized(
    x: Any, side: Mapping[str, Any], axis: int, length: int, longer: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """x longer along an axis, and side inputs as they may go with it."""

    def grown(a: Any, axes: tuple[int, ...] = (axis,)) -> Any:
        shape = [n + longer * (n == length and i in axes) for i, n in enumerate(a.shape)]
        return jax.ShapeDtypeStruct(tuple(shape), a.dtype)

    def over_pairs(a: Any) -> Any:
        return grown(a, (a.ndim - 2, a.ndim - 1))

    x, side = spec((x, dict(side)))
    with_x = {name: over_pairs if name == "attention_mask" else grown for name in (
        "mask", "segments", "positions", "attention_mask")}
    for other in (lambda a: a, grown):
        yield jax.tree.map(grown, x), {
            name: jax.tree.map(with_x.get(name, other), value) for name, value in side.items()}
