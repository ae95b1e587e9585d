"""What is to be made small: an objective maps a net, its trees and a batch to a loss and metrics.

``objective(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``. A batch is a
pair ``(x, y)``, or a dict with ``x``, ``y``, optionally ``mask``, and side inputs under all other
names. Metrics are means over the real entries of the batch; ``count`` says over how many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from diffprog.errors import LayerError
from diffprog.layer import Layer
from diffprog.notation import listed, show

__all__ = ["accuracy", "classification", "cross_entropy"]

Objective = Callable[..., tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]
Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """The surprise of integer labels: ``loss = -log softmax(logits)[label]``, in nats.

    No one-hot vector is made. The logarithm is taken in float32 or wider.

    Shapes:
        logits: (..., classes). labels: (...), ints in [0, classes). mask: (...), True where real.

    Args:
        logits: unnormalized log-probabilities.
        labels: the true classes; a label outside the range gives NaN, for it cannot raise under
            `jax.jit`.
        mask: entries where it is False give 0 and no gradient, whatever they hold.
        reduction: "mean" over the real entries (0 if there are none), their "sum", or "none".

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> float(dp.cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))).__round__(4)
        1.3863
    """
    _check_labels(logits, labels, mask)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    labels = labels.astype(jnp.int32)  # a narrow dtype could not hold the number of classes
    if mask is not None:
        logits = jnp.where(mask[..., None], logits, 0)
    valid = (labels >= 0) & (labels < logits.shape[-1])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _reduce(jnp.where(valid, losses, jnp.nan), mask, reduction)


def accuracy(
    logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """The share of entries whose largest logit is that of the label.

    Shapes:
        logits: (..., classes). labels: (...), ints. mask: (...), True where real.

    Example:
        >>> float(dp.accuracy(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0])))
        0.5
    """
    _check_labels(logits, labels, mask)
    hits = (logits.argmax(-1) == labels).astype(jnp.float32)
    return _reduce(hits, mask, reduction)


def classification(*, reduction: Literal["mean", "sum"] = "mean") -> Objective:
    """The objective of a classifier: `cross_entropy` of the net's logits; metric `accuracy`.

    A ``mask`` in the batch that has the shape of the labels says which of them are real; it goes
    to the net as well if the net takes one.

    Args:
        reduction: whether the loss is the mean over the real entries or their sum.

    Example:
        >>> net, x, y = dp.linear(3), jnp.ones((2, 4)), jnp.array([0, 2])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.classification()(
        ...     net, params, state, (x, y), key=None, train=True)
        >>> sorted(metrics)
        ['accuracy', 'count', 'loss']
    """
    if reduction not in ("mean", "sum"):
        raise LayerError('reduction "mean" or "sum"', repr(reduction), "choose one")

    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        x, labels, side = parts(net, batch)
        logits, state = net.apply(params, state, x, key=key, train=train, **side)
        mask = batch.get("mask") if isinstance(batch, Mapping) else None
        if mask is not None and mask.shape != labels.shape:
            if "mask" not in net.side:
                raise LayerError(f"a mask of the labels' shape {labels.shape}", show(mask),
                                 "the net takes no mask, so it can mean the labels alone")
            mask = None  # it speaks of positions that the net has already reduced
        losses = cross_entropy(logits, labels, mask=mask, reduction="none")
        count = jnp.asarray(losses.size if mask is None else mask.sum(), jnp.float32)
        total = losses.sum()
        mean = total / jnp.maximum(count, 1)
        metrics = {"loss": mean, "accuracy": accuracy(logits, labels, mask=mask), "count": count}
        return (mean if reduction == "mean" else total), (state, metrics)

    return objective


def parts(net: Layer, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Input, target and the net's side inputs in a batch; raise for what the net cannot take."""
    if isinstance(batch, Mapping):
        rest = {name: value for name, value in batch.items() if name not in ("x", "y")}
        if not {"x", "y"} <= batch.keys() or rest.keys() - net.side - {"mask"}:
            raise LayerError(f"a batch with x, y, mask and side inputs of the net "
                             f"({listed(net.side)})", listed(batch), "rename or remove the rest")
        return batch["x"], batch["y"], {n: v for n, v in rest.items() if n in net.side}
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise LayerError("a batch (x, y), or a dict with x and y", show(batch), "pack them so")
    return batch[0], batch[1], {}


def _check_labels(logits: jax.Array, labels: jax.Array, mask: jax.Array | None) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise LayerError("integer labels", show(labels), "convert them: labels.astype(jnp.int32)")
    if logits.ndim == 0 or logits.shape[:-1] != labels.shape:
        raise LayerError(f"labels of the logits' leading shape {logits.shape[:-1]}", show(labels),
                         "labels are numbers of classes, not one-hot")
    if mask is not None and (mask.dtype != jnp.bool_ or mask.shape != labels.shape):
        raise LayerError(f"a mask of booleans of the labels' shape {labels.shape}", show(mask),
                         "True marks what is real")


def _reduce(values: jax.Array, mask: jax.Array | None, reduction: Reduction) -> jax.Array:
    if mask is not None:
        values = jnp.where(mask, values, 0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.sum() / jnp.maximum(values.size if mask is None else mask.sum(), 1)
    raise LayerError('reduction "mean", "sum" or "none"', repr(reduction), "choose one")
