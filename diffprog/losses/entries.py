"""The entries of a batch: which of their labels and values are real, and how they are reduced.

All losses share three rules. They are computed in float32 or wider. A `mask` of leading axes says
which entries are real; the others give 0 and no gradient, whatever they hold. The mean is taken
over the real entries and is 0 if there are none.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.core import arguments
from diffprog.core.arguments import as_int32, check_array, is_array
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.masks import cleared, counted, widened
from diffprog.core.notation import show

Mask = jax.Array | None
Reduction = Literal["mean", "sum", "none"]


def is_soft(labels: jax.Array) -> bool:
    """Are labels probabilities of classes, rather than their numbers?"""
    check_labels(labels)
    return jnp.issubdtype(labels.dtype, jnp.floating)


def check_labels(labels: Any) -> None:
    """Raise unless they are one array, which a list is not."""
    if not is_array(labels):
        raise LayerError("labels as one array", show(labels), "convert them: jnp.asarray(labels)")


def class_numbers(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Integer labels as int32; raise unless they fit the logits."""
    check_array(logits, 1, "(..., classes)")
    check_labels(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise LayerError("integer labels", show(labels), "convert them: labels.astype(jnp.int32)")
    if logits.shape[:-1] != labels.shape:
        raise LayerError(f"labels of the logits' leading shape {logits.shape[:-1]}", show(labels),
                         "give each entry the number of its class")
    return as_int32(labels)


def known(labels: jax.Array, mask: Mask, ignore_index: int | None) -> Mask:
    """Which labels are real: those that the mask marks, without the ignored; None is all."""
    real = spread(mask, labels.shape)
    if ignore_index is None:
        return real
    return labels != ignore_index if real is None else real & (labels != ignore_index)


def spread(mask: Any, shape: tuple[int, ...]) -> Any:
    """The mask of leading axes of `shape` as one of all its axes; None, all real, stays None."""
    if mask is None:
        return None
    return jnp.broadcast_to(widened(mask, shape, reach=len(shape)), shape)


def weighing(weights: Any, shape: tuple[int, ...]) -> Any:
    """Weights of leading axes of `shape` as those of all its axes, in float32 or wider; None stays.

    One below 0 is none, and gives NaN: nothing stands so often in a batch.
    """
    if weights is None:
        return None
    check_array(weights, 1, "of examples", floating=False)
    if weights.shape != shape[: weights.ndim]:
        raise LayerError(f"a sample_weight of the leading axes of {shape}", show(weights),
                         "give one number to each example, or to each of its entries")
    weights = wide(weights)
    weights = jnp.where(weights < 0, jnp.nan, weights)
    return jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim)),
                            shape)


def weighed(real: Mask, weights: Any) -> Mask:
    """Which entries are real, of which those of weight 0 are none."""
    if weights is None:
        return real
    return weights != 0 if real is None else spread(real, weights.shape) & (weights != 0)


def average(values: jax.Array, real: Mask, weights: Any = None) -> jax.Array:
    """The mean of what is real of the values, by their weights, if they have any."""
    if weights is None:
        return reduce(values, real, "mean")
    weights = weights.astype(values.dtype)
    return reduce(weights * values, real, "mean", weights)


def wide(x: jax.Array) -> jax.Array:
    """x in float32, or wider if it is."""
    x = jnp.asarray(x)
    return x.astype(joint(x.dtype, jnp.float32))


def clear(x: jax.Array, real: Mask) -> jax.Array:
    """x with 0 where it is not real, so that nothing there reaches a value or a gradient."""
    return cleared(x, real, reach=x.ndim)


def reduce(
    values: jax.Array, real: Mask, reduction: Reduction, each: jax.Array | None = None
) -> jax.Array:
    """The values, 0 where not real, reduced; the mean divides by the `total` of real weights."""
    values = clear(values, real)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        divisor = total(values.shape, real, each)
        return values.sum() / jnp.where(divisor == 0, 1, divisor).astype(values.dtype)
    raise LayerError("reduction out of mean, none, sum", repr(reduction), "choose one of them")


def total(shape: tuple[int, ...], real: Mask, each: jax.Array | None = None) -> jax.Array:
    """How many of the entries are real, or the sum of their weights `each`."""
    if each is not None:
        return clear(each, real).sum()
    if real is not None:
        return counted(real)
    entries = math.prod(shape)
    if not arguments.known(entries):
        return jnp.asarray(entries).astype(float)
    return jnp.asarray(entries if entries < 2**31 else float(entries))


def paired(
    prediction: jax.Array, target: jax.Array, mask: Mask, features: int = 0
) -> tuple[jax.Array, jax.Array, Mask]:
    """Both in one wide dtype and cleared, and which entries are real; `features` axes make one."""
    check_array(prediction, features)
    check_array(target, floating=False)
    check_alike(prediction, target)
    prediction, target = jnp.asarray(prediction), jnp.asarray(target)
    dtype = joint(prediction, target, jnp.float32)
    real = spread(mask, target.shape[: target.ndim - features])
    return clear(prediction.astype(dtype), real), clear(target.astype(dtype), real), real


def check_alike(prediction: Any, target: Any) -> None:
    """Raise unless both have one shape: nothing is broadcast."""
    if jnp.shape(prediction) != jnp.shape(target):
        alone = jnp.shape(prediction) == (*jnp.shape(target), 1)
        raise LayerError(f"a target of the prediction's shape {jnp.shape(prediction)}",
                         show(target), "drop the prediction's last axis: y[..., 0]" if alone else
                         "give both one shape: broadcasting would compare every pair")
