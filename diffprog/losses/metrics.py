"""Metrics: accuracy, confusion matrix, perplexity and bits; none has a useful gradient.

Masks and reductions are those of the losses.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count
from diffprog.core.errors import LayerError
from diffprog.losses.entries import Mask, Reduction, class_numbers, known, reduce

__all__ = ["accuracy", "bits_per_character", "confusion_matrix", "perplexity", "top_k_accuracy"]


def accuracy(
    logits: jax.Array, labels: jax.Array, *, ignore_index: int | None = None, mask: Mask = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """The fraction of entries with ``argmax(logits) == label``.

    Of equal logits the first is the prediction. A label out of range counts as a miss.

    Shapes:
        logits: (..., classes). labels: (...), ints. mask: leading axes of (...), True where valid.

    Args:
        logits: scores of the classes; the largest is the prediction.
        labels: the true classes.
        ignore_index: entries with this label are invalid; often -100.
        mask: entries where it is False are invalid.
        reduction: "mean" over the valid entries (0 if there are none), "sum": the number of hits,
            or "none": 1 for a hit and 0 for a miss.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> float(dp.metrics.accuracy(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0])))
        0.5
    """
    labels = class_numbers(logits, labels)
    return reduce(hits(logits, labels), known(labels, mask, ignore_index), reduction)


def top_k_accuracy(
    logits: jax.Array, labels: jax.Array, *, k: int = 5, ignore_index: int | None = None,
    mask: Mask = None, reduction: Reduction = "mean",
) -> jax.Array:
    """The fraction of entries whose label is among the `k` largest logits; ``k=1``: `accuracy`.

    Of equal logits the first rank higher, so constant logits score no better than chance.

    Args:
        logits, labels, ignore_index, mask, reduction: as in `accuracy`.
        k: number of guesses; at least 1 and at most the number of classes.

    Raises:
        LayerError: as `accuracy` does; k is out of its range.

    Example:
        >>> float(dp.metrics.top_k_accuracy(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([1]), k=2))
        1.0
    """
    check_count("k", k)
    labels = class_numbers(logits, labels)
    return reduce(top_k_hits(logits, labels, k), known(labels, mask, ignore_index), reduction)


def hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the label is the class of the largest logit, 0 elsewhere, in float32."""
    predicted = jnp.asarray(logits).argmax(-1).astype(jnp.int32)
    return (predicted == labels).astype(jnp.float32)


def top_k_hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """1 where the label is among the classes of the `k` largest logits, 0 elsewhere, in float32."""
    classes = logits.shape[-1]
    if k > classes:
        raise LayerError(f"k of at most {classes}, the number of classes", repr(k), "lower it")
    # `jax.lax.top_k` ranks -0 below 0, and NaN first or last by its sign.
    ordered = jnp.where(jnp.isnan(logits), jnp.nan, jnp.where(logits == 0, 0, logits))
    _, guesses = jax.lax.top_k(ordered, k)                                # (..., k)
    return (guesses == labels[..., None]).any(-1).astype(jnp.float32)     # (...)


def confusion_matrix(
    logits: jax.Array, labels: jax.Array, *, ignore_index: int | None = None, mask: Mask = None
) -> jax.Array:
    """``table[i, j]``: how often class j was predicted for class i; rows true, columns predicted.

    Shapes:
        logits: (..., classes). labels: (...), ints. mask: leading axes of (...), True where valid.
        table: (classes, classes), float32.

    Args:
        logits: the largest is the prediction; of equal ones the first.
        labels: the true classes. If one is out of range, the whole table is NaN: it cannot raise
            under `jax.jit`. Counts are floats for this reason.
        ignore_index: entries with this label are not counted; often -100.
        mask: entries where it is False are not counted.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])
        >>> dp.metrics.confusion_matrix(logits, jnp.array([0, 1])).tolist()
        [[1.0, 0.0], [1.0, 0.0]]
    """
    labels = class_numbers(logits, labels)
    classes = logits.shape[-1]
    valid = known(labels, mask, ignore_index)
    valid = jnp.ones(labels.shape, bool) if valid is None else valid
    wrong = valid & ((labels < 0) | (labels >= classes))
    table = jnp.zeros((classes, classes), jnp.int32)  # float32 would stop counting at 2**24
    table = table.at[labels, jnp.asarray(logits).argmax(-1)].add(valid.astype(jnp.int32))
    return jnp.where(wrong.any(), jnp.nan, table.astype(jnp.float32))


def perplexity(loss: float) -> float:
    """``exp(loss)``: the number of equally likely tokens with the same cross-entropy.

    A mean of perplexities over batches is not the perplexity of the whole: average the losses
    first, as `evaluate` does.

    Args:
        loss: mean cross-entropy per token, in nats. For an objective with label smoothing pass its
            metric ``cross_entropy`` rather than ``loss``.

    Example:
        >>> round(dp.metrics.perplexity(2.0794415), 4)  # log 8
        8.0
    """
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_character(loss: float, tokens: int = 1, characters: int = 1) -> float:
    """``loss / log(2) * tokens / characters``: comparable between tokenizers.

    Args:
        loss: mean cross-entropy per token, in nats, as in `perplexity`.
        tokens: number of predicted tokens.
        characters: number of characters in those tokens; equal to `tokens` if each is one.

    Raises:
        LayerError: counts that are not positive.

    Example:
        >>> loss = 2.0794415  # 3 bits a token
        >>> round(dp.metrics.bits_per_character(loss, tokens=100, characters=400), 4)
        0.75
    """
    check_count("tokens", tokens)
    check_count("characters", characters)
    return loss / math.log(2) * tokens / characters
