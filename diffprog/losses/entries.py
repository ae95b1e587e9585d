"""The entries of a batch: which labels and values are valid, and how they are reduced.

All losses share three rules. They are computed in float32 or wider. A `mask` of leading axes marks
the valid entries; the others contribute 0 and no gradient, whatever they hold. The mean is over the
valid entries, and is 0 if there are none.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.core import arguments
from diffprog.core.arguments import as_int32, check_array, check_ints, is_array
from diffprog.core.dtypes import is_float, joint, wide
from diffprog.core.errors import LayerError
from diffprog.core.masks import cleared, counted, widened
from diffprog.core.notation import show

Mask = jax.Array | None
Reduction = Literal["mean", "sum", "none"]


def is_soft(labels: jax.Array) -> bool:
    """Whether labels are class probabilities rather than class indices."""
    check_labels(labels)
    return is_float(labels)


def check_labels(labels: Any) -> None:
    """Raise unless labels are one array; a list is not."""
    if not is_array(labels):
        raise LayerError("labels as one array", show(labels), "convert them: jnp.asarray(labels)")


def class_numbers(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Integer labels as int32; raise unless their shape is the leading shape of the logits."""
    check_array(logits, 1, "(..., classes)")
    check_labels(labels)
    check_ints("labels", labels)
    if logits.shape[:-1] != labels.shape:
        raise LayerError(f"labels of the logits' leading shape {logits.shape[:-1]}", show(labels),
                         "pass one class index per entry")
    return as_int32(labels)


def known(labels: jax.Array, mask: Mask, ignore_index: int | None) -> Mask:
    """The valid labels: marked by the mask and not `ignore_index`; None if all are valid."""
    valid = spread(mask, labels.shape)
    if ignore_index is None:
        return valid
    kept = labels != ignore_index
    return kept if valid is None else valid & kept


def spread(mask: Any, shape: tuple[int, ...]) -> Any:
    """A mask of leading axes of `shape`, broadcast to `shape`; None (all valid) stays None."""
    if mask is None:
        return None
    return jnp.broadcast_to(widened(mask, shape, reach=len(shape)), shape)


def weighing(weights: Any, shape: tuple[int, ...]) -> Any:
    """Weights of leading axes of `shape`, broadcast to it, in float32 or wider; None stays None.

    Negative weights become NaN: a weight is the number of times that an entry is in the batch.
    """
    if weights is None:
        return None
    check_array(weights, 1, "of examples", floating=False)
    if weights.shape != shape[: weights.ndim]:
        raise LayerError(f"a sample_weight of the leading axes of {shape}", show(weights),
                         "pass one number per example, or per entry")
    weights = wide(weights)
    weights = jnp.where(weights < 0, jnp.nan, weights)
    trailing = (1,) * (len(shape) - weights.ndim)
    return jnp.broadcast_to(weights.reshape(weights.shape + trailing), shape)


def weighed(valid: Mask, weights: Any) -> Mask:
    """The valid entries whose weight is not 0."""
    if weights is None:
        return valid
    nonzero = weights != 0
    return nonzero if valid is None else spread(valid, weights.shape) & nonzero


def average(values: jax.Array, valid: Mask, weights: Any = None) -> jax.Array:
    """The mean over the valid entries, weighted if there are weights."""
    if weights is None:
        return reduce(values, valid, "mean")
    weights = weights.astype(values.dtype)
    return reduce(weights * values, valid, "mean", weights)


def clear(x: jax.Array, valid: Mask) -> jax.Array:
    """x with 0 at invalid entries, so that they reach neither a value nor a gradient."""
    return cleared(x, valid, reach=x.ndim)


def reduce(
    values: jax.Array, valid: Mask, reduction: Reduction, weights: jax.Array | None = None
) -> jax.Array:
    """Reduce the values, 0 where invalid; the mean divides by `total` of the weights.

    The values are already multiplied by the weights.
    """
    values = clear(values, valid)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return ratio(values.sum(), total(values.shape, valid, weights))
    raise LayerError("reduction out of mean, none, sum", repr(reduction), "choose one of them")


def total(shape: tuple[int, ...], valid: Mask, weights: jax.Array | None = None) -> jax.Array:
    """The number of valid entries, or the sum of their weights."""
    if weights is not None:
        return clear(weights, valid).sum()
    if valid is not None:
        return counted(valid)
    entries = math.prod(shape)
    if not arguments.known(entries):
        return jnp.asarray(entries).astype(float)
    return jnp.asarray(entries if entries < 2**31 else float(entries))


def ratio(summed: jax.Array, count: jax.Array) -> jax.Array:
    """``summed / count``, a mean, in the dtype of the sum; a count of 0 divides by 1."""
    return summed / jnp.where(count == 0, 1, count).astype(summed.dtype)


def paired(
    prediction: jax.Array, target: jax.Array, mask: Mask, features: int = 0
) -> tuple[jax.Array, jax.Array, Mask]:
    """Prediction and target in one wide dtype, with 0 at invalid entries, and the valid entries.

    The last `features` axes belong to one entry.
    """
    check_array(prediction, features)
    check_array(target, floating=False)
    check_alike(prediction, target)
    prediction, target = jnp.asarray(prediction), jnp.asarray(target)
    dtype = joint(prediction, target, jnp.float32)
    valid = spread(mask, target.shape[: target.ndim - features])
    return clear(prediction.astype(dtype), valid), clear(target.astype(dtype), valid), valid


def check_alike(prediction: Any, target: Any) -> None:
    """Raise unless prediction and target have one shape: nothing is broadcast."""
    if jnp.shape(prediction) == jnp.shape(target):
        return
    if jnp.shape(prediction) == (*jnp.shape(target), 1):
        remedy = "drop the prediction's last axis: y[..., 0]"
    else:
        remedy = "give both one shape: broadcasting would compare every pair"
    raise LayerError(f"a target of the prediction's shape {jnp.shape(prediction)}", show(target),
                     remedy)
