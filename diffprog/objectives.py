"""What is to be made small: an objective maps a net, its trees and a batch to a loss and metrics.

``objective(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``. A batch is a
pair ``(x, y)``, or a dict with ``x``, ``y``, optionally ``mask`` and ``target_mask``, and side
inputs under all other names. ``mask`` says what is real of x, over leading axes of it. It goes to
the net, if the net takes one, and to the loss too if the net keeps these axes. ``target_mask``
says which targets are real, over any leading axes of y, and goes to loss, metrics and counts alone.

Metrics are means over the real entries of the batch; ``count`` says over how many, and
``count/<name>`` what the mean of one metric was divided by, where that is something else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.arguments import check_array, check_count, check_share
from diffprog.entries import Mask, class_numbers, is_soft, known, reduce, spread, total, wide
from diffprog.errors import LayerError
from diffprog.layer import Layer
from diffprog.losses import binary_cross_entropy, cross_entropy, squared_error
from diffprog.metrics import accuracy, top_k_accuracy
from diffprog.notation import listed, show
from diffprog.plans import spec

__all__ = ["binary_classification", "classification", "regression"]

Metrics = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, tuple[Any, Metrics]]]


def classification(
    *, smoothing: float = 0.0, class_weights: jax.Array | None = None, ignore: int | None = None,
    top_k: int | None = None, reduction: Literal["mean", "sum"] = "mean",
) -> Objective:
    """The objective of a classifier: `cross_entropy` of the net's logits; metric `accuracy`.

    Where labels are soft, the likeliest class counts as the true one in the metrics.

    Args:
        smoothing: as in `cross_entropy`; adds the metric ``cross_entropy``, of targets that are not
            smoothed.
        class_weights: as in `cross_entropy`; metrics but the loss do not heed them.
        ignore: entries of this label are not real; often -100.
        top_k: adds the metric ``top_<k>``, the `top_k_accuracy`.
        reduction: whether the loss is the mean over the real entries or their sum.

    Raises:
        LayerError: an argument is out of its range.

    Example:
        >>> net, x, y = dp.linear(3), jnp.ones((2, 4)), jnp.array([0, 2])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.classification()(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> sorted(metrics)
        ['accuracy', 'count', 'loss']
    """
    check_share("smoothing", smoothing)
    if top_k is not None:
        check_count("top_k", top_k)
    if reduction not in ("mean", "sum"):
        raise LayerError("reduction out of mean, sum", repr(reduction), "choose one of them")
    loss = functools.partial(
        cross_entropy, smoothing=smoothing, class_weights=class_weights, ignore=ignore)

    def measure(logits: jax.Array, labels: jax.Array, mask: Mask) -> Metrics:
        soft = is_soft(labels)
        given = labels
        labels = class_numbers(logits, labels.argmax(-1) if soft else labels)
        real = known(labels, mask, ignore)
        metrics = {"accuracy": accuracy(logits, labels, ignore=ignore, mask=mask),
                   "count": total(labels.shape, real)}
        if smoothing:
            metrics["cross_entropy"] = cross_entropy(logits, given, ignore=ignore, mask=mask)
        if top_k is not None:
            metrics[f"top_{top_k}"] = top_k_accuracy(
                logits, labels, k=top_k, ignore=ignore, mask=mask)
        if class_weights is not None and not soft:
            each = jnp.take(jnp.asarray(class_weights), labels, mode="clip")
            metrics["count/loss"] = total(labels.shape, real, each)
        return metrics

    return _objective(loss, measure, features=1, reduction=reduction)


def binary_classification() -> Objective:
    """The objective of yes or no: `binary_cross_entropy` of the net's logits; metric `accuracy`.

    The net says yes where its logit is positive, and yes is right where the target is above 1/2.
    Logits and targets have one shape: a net that ends in ``linear(1)`` is followed by
    ``lambda y: y[..., 0]`` if the targets are (batch,).

    Example:
        >>> net = dp.linear(1) >> (lambda y: y[..., 0])
        >>> x, y = jnp.ones((2, 4)), jnp.array([0, 1])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.binary_classification()(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> float(metrics["accuracy"])
        0.5
    """

    def measure(logits: jax.Array, targets: jax.Array, mask: Mask) -> Metrics:
        real = spread(mask, targets.shape)
        hits = (logits > 0) == (wide(targets) > 0.5)
        return {"accuracy": reduce(hits.astype(jnp.float32), real, "mean"),
                "count": total(targets.shape, real)}

    return _objective(binary_cross_entropy, measure)


def regression(loss: Callable[..., jax.Array] = squared_error) -> Objective:
    """The objective of a net whose output is to equal the target: the mean of `loss`.

    Args:
        loss: `squared_error`, `absolute_error`, or ``functools.partial(huber, delta=...)``.

    Example:
        >>> net, x, y = dp.linear(3), jnp.ones((2, 4)), jnp.ones((2, 3))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.regression(dp.absolute_error)(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> int(metrics["count"])
        6
    """
    return _objective(
        loss, lambda output, y, mask: {"count": total(y.shape, spread(mask, y.shape))})


def parts(net: Layer, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Input, target and the net's side inputs in a batch; raise for what the net cannot take."""
    if isinstance(batch, Mapping):
        rest = {name: value for name, value in batch.items() if name not in ("x", "y")}
        if not {"x", "y"} <= batch.keys() or rest.keys() - net.side - {"mask", "target_mask"}:
            raise LayerError(f"a batch with x, y, mask, target_mask and side inputs of the net "
                             f"({listed(net.side)})", listed(batch), "rename or remove the rest")
        return batch["x"], batch["y"], {n: v for n, v in rest.items() if n in net.side}
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise LayerError("a batch (x, y), or a dict with x and y", show(batch), "pass one of them")
    return batch[0], batch[1], {}


def _objective(
    loss: Callable[..., jax.Array], measure: Callable[[Any, Any, Any], Metrics], *,
    features: int = 0, reduction: Literal["mean", "sum"] = "mean",
) -> Objective:
    """The objective of a loss and further metrics; `features` axes of the output make an entry."""

    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        x, y, side = parts(net, batch)
        output, state = net.apply(params, state, x, key=key, train=train, **side)
        check_array(output, features)
        mask = real_targets(net, batch, x, side, output.shape[: output.ndim - features])
        mean = loss(output, y, mask=mask)
        value = mean if reduction == "mean" else loss(output, y, mask=mask, reduction="sum")
        return value, (state, {"loss": mean, **measure(output, y, mask)})

    return objective


def real_targets(
    net: Layer, batch: Any, x: Any, side: Mapping[str, Any], entries: tuple[int, ...],
    part: Callable[[Any], Any] = lambda y: y,
) -> Mask:
    """Which entries of a target are real, by the masks of a batch; None is all.

    `part` of the net's output is what the target is compared with.
    """
    if not isinstance(batch, Mapping):
        return None
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
