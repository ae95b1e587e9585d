"""Objectives: functions from a net, its trees and a batch to a loss and metrics.

``objective(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``. A batch is a
pair ``(x, y)``, or a dict with ``x``, ``y``, optionally ``mask``, ``target_mask`` and
``sample_weight``, and side inputs under all other names.

- ``mask`` marks the valid entries of x, over leading axes. It is passed to the net if the net takes
  one, and to the loss if the net keeps these axes.
- ``target_mask`` marks the valid targets, over any leading axes of y; only loss, metrics and counts
  use it.
- ``sample_weight``, numbers of at least 0 over such axes, is the weight of each entry in loss and
  metrics, as if it were in the batch that many times. The net does not use it: the statistics of
  `batch_norm`, for example, are unweighted.

Metrics are means over the valid entries of the batch. ``count`` is the number of these, or the sum
of their weights, and ``count/<name>`` the divisor of one metric, if it is another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_fraction, is_array
from diffprog.core.dtypes import joint, wide
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer, as_layer
from diffprog.core.nets import ending
from diffprog.core.notation import called, code, listed, show
from diffprog.core.plans import spec
from diffprog.losses.classes import binary_cross_entropy, label_losses, soft_label_losses
from diffprog.losses.entries import (
    Mask,
    average,
    check_alike,
    class_numbers,
    clear,
    is_soft,
    known,
    ratio,
    reduce,
    spread,
    total,
    weighed,
    weighing,
)
from diffprog.losses.metrics import hits, top_k_hits
from diffprog.losses.values import squared_error

__all__ = ["binary_classification", "classification", "regression"]

Metrics = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, tuple[Any, Metrics]]]

OF_TARGETS = ("mask", "target_mask", "sample_weight")  # names in a batch that concern its targets

# Functions from logits to probabilities, which the losses of logits apply themselves.
_SQUASHES = (jax.nn.softmax, jax.nn.sigmoid, jax.nn.hard_sigmoid, jax.lax.logistic)


def classification(
    *, label_smoothing: float = 0.0, class_weights: jax.Array | None = None,
    ignore_index: int | None = None, top_k: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Objective:
    """The objective of a classifier: `cross_entropy` of the net's logits; metric `accuracy`.

    A batch is ``(x, y)``, or a dict with ``x``, ``y``, optionally ``mask`` of the valid entries of
    x, ``target_mask`` of the valid targets, and ``sample_weight``, the weights of the targets in
    all means: numbers of at least 0 (others give NaN) over leading axes of the targets, usually
    (batch,). ``count`` is then the sum of the weights. Side inputs of the net are in the dict under
    their names.

    With soft labels the metrics use the most likely class as the true one.

    Args:
        label_smoothing: as in `cross_entropy`; adds the metric ``cross_entropy``, without
            smoothing.
        class_weights: as in `cross_entropy`; of the metrics only the loss uses them.
        ignore_index: entries with this label are invalid; often -100.
        top_k: adds the metric ``top_<k>``, the `top_k_accuracy`.
        reduction: whether the loss is the mean over the valid entries or their sum; the metric
            ``loss`` is the mean.

    Raises:
        LayerError: an argument is out of its range; the net ends in `jax.nn.softmax` or
            `jax.nn.sigmoid`, whose outputs are no logits.

    Example:
        >>> net, x, y = dp.linear(3), jnp.ones((2, 4)), jnp.array([0, 2])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.classification()(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> sorted(metrics)
        ['accuracy', 'count', 'loss']
    """
    check_fraction("label_smoothing", label_smoothing)
    if top_k is not None:
        check_count("top_k", top_k)
    if reduction not in ("mean", "sum"):
        raise LayerError("reduction out of mean, sum", repr(reduction), "choose one of them")

    def score(
        logits: jax.Array, y: jax.Array, mask: Mask, weights: Any
    ) -> tuple[jax.Array, Metrics]:
        soft = is_soft(y) and y.shape == logits.shape
        labels = class_numbers(logits, y.argmax(-1) if soft else y)          # (...)
        valid = known(labels, mask, ignore_index)
        entries = Entries.of(labels.shape, valid, weights)

        def losses_of(*options: Any) -> tuple[jax.Array, jax.Array | None]:
            """The loss of each entry, and the class weights that its mean divides by."""
            if soft:
                return soft_label_losses(logits, y, mask, ignore_index, *options)[0], None
            return label_losses(logits, labels, valid, *options)

        losses, true_weights = losses_of(label_smoothing, class_weights)     # (...), (...)
        metrics = {"accuracy": entries.mean(hits(logits, labels))}
        if label_smoothing:
            metrics["cross_entropy"] = entries.mean(losses_of()[0])
        if top_k is not None:
            metrics[f"top_{top_k}"] = entries.mean(top_k_hits(logits, labels, top_k))
        metrics["count"] = loss_count = entries.count
        if true_weights is not None:
            metrics["count/loss"] = loss_count = entries.total(true_weights)
        summed = _weighted_sum(clear(losses, valid), mask, weights)
        mean = ratio(summed, loss_count)
        return mean if reduction == "mean" else summed, {"loss": mean, **metrics}

    return _objective(score, features=1, of_logits=True)


def binary_classification() -> Objective:
    """The objective of a binary classifier: `binary_cross_entropy` of logits; metric `accuracy`.

    The prediction is positive if the logit is, and the target is if it is above 1/2. Logits and
    targets have one shape: put ``lambda y: y[..., 0]`` behind ``linear(1)`` if the targets are
    (batch,).

    Example:
        >>> net = dp.linear(1) >> (lambda y: y[..., 0])
        >>> x, y = jnp.ones((2, 4)), jnp.array([0, 1])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.training.binary_classification()(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> float(metrics["accuracy"])
        0.5
    """

    def score(
        logits: jax.Array, targets: jax.Array, mask: Mask, weights: Any
    ) -> tuple[jax.Array, Metrics]:
        check_alike(logits, targets)
        entries = Entries.of(targets.shape, spread(mask, targets.shape), weights)
        correct = (logits > 0) == (wide(targets) > 0.5)
        accuracy = entries.mean(correct.astype(jnp.float32))
        loss = _mean_loss(binary_cross_entropy, logits, targets, mask, entries)
        return loss, {"loss": loss, "accuracy": accuracy, "count": entries.count}

    return _objective(score, of_logits=True)


def regression(loss: Callable[..., jax.Array] = squared_error) -> Objective:
    """The objective of a net whose output predicts the target: the mean of `loss`.

    Output and target have one shape, whatever the loss: nothing is broadcast.

    Args:
        loss: `squared_error`, `absolute_error`, or ``functools.partial(huber, delta=...)``. A
            custom loss is called as ``loss(output, target, mask=...)``, the mask being None or over
            leading axes, and returns a number; for batches with ``sample_weight`` also with
            ``reduction="none"``, and then returns one number per entry.

    Raises:
        LayerError: a loss that takes no mask; output and target of different shapes.

    Example:
        >>> net, x, y = dp.linear(3), jnp.ones((2, 4)), jnp.ones((2, 3))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.regression(dp.losses.absolute_error)(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> int(metrics["count"])
        6
    """
    _check_loss(loss)

    def score(
        output: jax.Array, y: jax.Array, mask: Mask, weights: Any
    ) -> tuple[jax.Array, Metrics]:
        check_alike(output, y)
        entries = Entries.of(y.shape, spread(mask, y.shape), weights)
        mean = _mean_loss(loss, output, y, mask, entries)
        return mean, {"loss": mean, "count": entries.count}

    return _objective(score)


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of the targets of a batch.

    Attributes:
        shape: of the entries.
        valid: booleans of that shape; None if all are valid.
        weights: of that shape; None if all count alike.
        count: the number of valid entries, or the sum of their weights.
    """

    shape: tuple[int, ...]
    valid: Mask
    weights: Any
    count: jax.Array

    @classmethod
    def of(cls, shape: tuple[int, ...], valid: Mask, weights: Any) -> Entries:
        """The entries, counted."""
        return cls(shape, valid, weights, total(shape, valid, weights))

    def mean(self, values: jax.Array) -> jax.Array:
        """The mean of the values over the valid entries, by their weights."""
        if self.weights is None:
            return ratio(clear(values, self.valid).sum(), self.count)
        return average(values, self.valid, self.weights)  # divides in the dtype of the values

    def total(self, each: jax.Array) -> jax.Array:
        """The sum of `each` over the valid entries, by their weights."""
        if self.weights is not None:
            dtype = joint(each.dtype, self.weights.dtype)
            each = each.astype(dtype) * self.weights.astype(dtype)
        return total(self.shape, self.valid, each)


def parts(net: Layer, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Input, target and side inputs of the net in a batch; raise for names it does not take."""
    if not isinstance(batch, Mapping):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise LayerError("a batch (x, y), or a dict with x and y", show(batch),
                             "pass one of them")
        x, y = batch
        return x, y, {}
    rest = {name: value for name, value in batch.items() if name not in ("x", "y")}
    missing = [name for name in ("x", "y") if name not in batch]
    if missing or rest.keys() - net.side - {*OF_TARGETS}:
        raise LayerError(f"a batch with x, y, {', '.join(OF_TARGETS)} and side inputs of the "
                         f"net ({listed(net.side)})", listed(batch),
                         f"add {' and '.join(missing)}" if missing and not rest
                         else "rename or remove the rest")
    side = {name: value for name, value in rest.items() if name in net.side}
    return batch["x"], batch["y"], side


@contextlib.contextmanager
def suggest_target_mask(side: Mapping[str, Any], x: Any, y: Any) -> Iterator[None]:
    """A call of a net; an error for a mask that fits only the targets suggests `target_mask`."""
    try:
        yield
    except LayerError as error:
        mask: Any = side.get("mask")

        def fits(tree: Any, features: int) -> bool:
            return all(mask.ndim <= leaf.ndim - features and leaf.shape[: mask.ndim] == mask.shape
                       for leaf in jax.tree.leaves(tree))

        if hasattr(mask, "shape") and fits(y, 0) and not fits(x, 1):
            raise LayerError("a mask of axes of x, which the net takes", show(mask),
                             "name it target_mask: it marks the valid targets") from error
        raise


def check_target(y: Any) -> None:
    """Raise unless y is one array; a tuple of numbers is not."""
    if not is_array(y):
        raise LayerError("targets y as one array", show(y), "convert them: np.asarray(y)")


def inputs(net: Layer, batch: Any) -> tuple[Any, dict[str, Any]]:
    """The inputs of the net in a batch: x and side inputs."""
    x, _, side = parts(net, batch)
    return x, side


def like(objective: Objective) -> Callable[[Objective], Objective]:
    """A decorator that gives an objective the attributes of another, which may be an object."""

    def with_attributes(own: Objective) -> Objective:
        functools.update_wrapper(own, objective)
        for name in ("inputs", "draws", "across_examples", "combine"):
            if hasattr(objective, name):
                setattr(own, name, getattr(objective, name))
        return own

    return with_attributes


def checked(objective: Objective) -> Any:
    """The objective with its results checked, the metric ``loss`` added, and `inputs` set.

    By default a custom objective calls the net on the x of a batch.
    """

    @like(objective)
    def checking(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        result = objective(net, params, state, batch, key=key, train=train)
        match result:
            case (loss, (dict() as after, Mapping() as metrics)) if after.keys() <= state.keys():
                pass
            case _:
                raise LayerError(
                    "an objective that returns loss, (state, metrics)", show(result),
                    "return them: the new state of the net, and metrics by name, means over "
                    "metrics['count'] entries, or over the examples without a count")
        if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise LayerError("a loss that is one float", show(loss), "take its mean")
        for name, value in metrics.items():
            if not (hasattr(value, "dtype") or isinstance(value, numbers.Number)):
                raise LayerError(f"metrics that are one number each, as {name}", show(value),
                                 "leave out the others")
        return loss, (after, {"loss": loss, **metrics})

    def default_inputs(net: Layer, batch: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return inputs(net, batch)
        except LayerError:
            got = f"a dict with {listed(batch)}" if isinstance(batch, Mapping) else show(batch)
            raise LayerError(
                "a batch (x, y), a dict with x and y, or an objective with inputs", got,
                "set objective.inputs = lambda net, batch: (x, {}), with the input x of the net, "
                "and its side inputs in the dict") from None

    result: Any = checking
    result.inputs = getattr(objective, "inputs", default_inputs)
    return result


def check_logits(net: Layer) -> None:
    """Raise for a net that ends in probabilities: the loss would take them for logits."""
    last = ending(net)
    if last.factory is not as_layer:
        return
    function = inspect.unwrap(called(last.settings["f"]))  # jax.jit wraps it
    if any(function is inspect.unwrap(squash) for squash in _SQUASHES):
        raise LayerError("a net that returns logits", f"one that ends in {last!r}",
                         "leave it out: the loss applies it, and predictions are "
                         f"{last!r}(net(params, x))")


def _check_loss(loss: Any) -> None:
    """Raise unless the loss is a function that takes a mask."""
    if not callable(loss):
        raise LayerError("a loss as a function", show(loss),
                         "pass dp.losses.absolute_error, for example")
    if not _takes(loss, {"mask": None}):
        raise LayerError("a loss (output, target, *, mask)", code(loss),
                         "let it take mask=None, True where valid, and return a number")


def _takes(loss: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    """Whether a loss takes these keyword arguments."""
    try:
        inspect.signature(loss).bind(None, None, **given)
    except TypeError:
        return False
    except ValueError:
        pass  # no signature, as of some built-in functions
    return True


def _objective(
    score: Callable[[Any, Any, Mask, Any], tuple[jax.Array, Metrics]], *, features: int = 0,
    of_logits: bool = False,
) -> Objective:
    """The objective with loss and metrics by ``score(output, y, mask, weights)``.

    The last `features` axes of the output belong to one entry.
    """

    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        if of_logits:
            check_logits(net)
        x, y, side = parts(net, batch)
        if y is None:
            raise LayerError("a batch with targets", show(batch), "pass (x, y), y for the targets")
        check_target(y)
        with suggest_target_mask(side, x, y):
            output, state = net.apply(params, state, x, key=key, train=train, **side)
        check_array(output, features)
        shape = output.shape[: output.ndim - features]
        mask, weights = valid_targets(net, batch, x, side, shape)
        loss, metrics = score(output, y, mask, weights)
        return loss, (state, metrics)

    result: Any = objective
    result.inputs = inputs
    return result


def _mean_loss(
    loss: Callable[..., jax.Array], output: Any, y: Any, mask: Mask, entries: Entries
) -> jax.Array:
    """The mean of the loss over the valid entries, by their weights."""
    if entries.weights is None:
        return loss(output, y, mask=mask)
    losses = unreduced(loss, output, y, mask, entries.shape)
    return ratio(_weighted_sum(losses, mask, entries.weights), entries.count)


def _weighted_sum(losses: jax.Array, mask: Mask, weights: Any) -> jax.Array:
    if weights is not None:
        losses = weights.astype(losses.dtype) * losses
    return reduce(losses, mask, "sum")


def unreduced(
    loss: Callable[..., jax.Array], output: Any, y: Any, mask: Mask, entries: tuple[int, ...]
) -> jax.Array:
    """The loss of each entry; raise if the loss supports no ``reduction="none"``."""
    options = {"mask": mask, "reduction": "none"}
    losses = loss(output, y, **options) if _takes(loss, options) else None
    if losses is None or jnp.shape(losses) != entries:
        raise LayerError(f'a loss that returns one number per entry, {entries}, with '
                         'reduction="none"', code(loss) if losses is None else show(losses),
                         'let it take reduction="mean", and return the values before the mean if '
                         'it is "none"')
    return losses


def valid_targets(
    net: Layer, batch: Any, x: Any, side: Mapping[str, Any], entries: tuple[int, ...],
    part: Callable[[Any], Any] = lambda y: y,
) -> tuple[Mask, Any]:
    """The valid entries of a target (None: all), and their weights (None: all alike).

    `part` selects from the net's output what the target is compared with. An entry of weight 0 is
    invalid: its values reach nothing.
    """
    if not isinstance(batch, Mapping):
        return None, None
    weights = weighing(batch.get("sample_weight"), entries)
    return weighed(_masked(net, batch, x, side, entries, part), weights), weights


def _masked(
    net: Layer, batch: Mapping[str, Any], x: Any, side: Mapping[str, Any],
    entries: tuple[int, ...], part: Callable[[Any], Any],
) -> Mask:
    """The valid entries of a target, by the masks of a batch."""
    mask, target_mask = batch.get("mask"), batch.get("target_mask")
    if mask is not None and not _keeps_axes(net, x, side, mask, part):
        if "mask" not in net.side:
            raise LayerError("a mask of axes of x that the net keeps", show(mask),
                             "name it target_mask if it marks the valid targets: the net takes no "
                             "mask")
        mask = None  # it is a mask of x alone
    if mask is None or target_mask is None:
        return target_mask if mask is None else mask
    return spread(mask, entries) & spread(target_mask, entries)


def _keeps_axes(
    net: Layer, x: Any, side: Mapping[str, Any], mask: Any, part: Callable[[Any], Any]
) -> bool:
    """Whether the output has the axes of x that the mask is over.

    Equal sizes may be a coincidence, so x is planned at other lengths too.
    """
    if any(leaf.shape[: mask.ndim] != mask.shape for leaf in jax.tree.leaves(x)):
        return False

    def keeps(axis: int) -> bool:
        for change in (1, -1):  # a longer x may exceed a maximal length, a shorter one a window
            for resized_x, resized_side in _resized(x, side, axis, mask.shape[axis], change):
                try:
                    y = part(net.plan(resized_x, **resized_side).y)
                except (TypeError, ValueError):
                    continue
                return y.ndim > axis and y.shape[axis] == mask.shape[axis] + change
        return False

    y = part(net.plan(x, **side).y)
    return y.shape[: mask.ndim] == mask.shape and all(map(keeps, range(1, mask.ndim)))


def _resized(
    x: Any, side: Mapping[str, Any], axis: int, length: int, change: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The shapes of x with `length` of an axis changed, and of side inputs that may go with it."""

    def resized(a: Any, axes: tuple[int, ...] = (axis,)) -> Any:
        shape = [n + change * (n == length and i in axes) for i, n in enumerate(a.shape)]
        return jax.ShapeDtypeStruct(tuple(shape), a.dtype)

    def resized_pairs(a: Any) -> Any:  # (..., queries, keys)
        return resized(a, (a.ndim - 2, a.ndim - 1))

    def unchanged(a: Any) -> Any:
        return a

    x, side = spec((x, dict(side)))
    with_x = {"mask": resized, "segments": resized, "positions": resized,
              "attention_mask": resized_pairs}
    for other in (unchanged, resized):
        yield jax.tree.map(resized, x), {
            name: jax.tree.map(with_x.get(name, other), value) for name, value in side.items()}
