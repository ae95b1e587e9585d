"""A metric says how well a net does in words that people use; it has no useful gradient.

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
    """The share of entries whose largest logit is that of the label, ``argmax(logits) == label``.

    Of equal logits the first counts as the largest. A label that is no class is missed.

    Shapes:
        logits: (..., classes). labels: (...), ints. mask: leading axes of (...), True where real.

    Args:
        logits: the larger, the likelier the class.
        labels: the true classes.
        ignore_index: entries of this label are not real; often -100.
        mask: entries where it is False are not real.
        reduction: "mean" over the real entries (0 if there are none), "sum": the number of hits,
            or "none": 1 for a hit and 0 for a miss.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> float(dp.metrics.accuracy(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0])))
        0.5
    """
    labels = class_numbers(logits, labels)
    hits = jnp.asarray(logits).argmax(-1).astype(jnp.int32) == labels
    return reduce(hits.astype(jnp.float32), known(labels, mask, ignore_index), reduction)


def top_k_accuracy(
    logits: jax.Array, labels: jax.Array, *, k: int = 5, ignore_index: int | None = None,
    mask: Mask = None, reduction: Reduction = "mean",
) -> jax.Array:
    """The share of entries with the label's logit among the `k` largest; ``k=1`` is `accuracy`.

    Of equal logits the first count as the larger ones, so constant logits score no more than
    chance.

    Args:
        logits, labels, ignore_index, mask, reduction: as in `accuracy`.
        k: how many guesses; at least 1 and at most the number of classes.

    Raises:
        LayerError: as `accuracy` does; k is out of its range.

    Example:
        >>> float(dp.metrics.top_k_accuracy(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([1]), k=2))
        1.0
    """
    check_count("k", k)
    labels = class_numbers(logits, labels)
    classes = logits.shape[-1]
    if k > classes:
        raise LayerError(f"k of at most {classes}, the number of classes", repr(k), "lower it")
    # `top_k` takes -0 for less than 0, and NaN for the least or the largest, by its sign.
    ordered = jnp.where(jnp.isnan(logits), jnp.nan, jnp.where(logits == 0, 0, logits))
    hits = (jax.lax.top_k(ordered, k)[1] == labels[..., None]).any(-1)
    return reduce(hits.astype(jnp.float32), known(labels, mask, ignore_index), reduction)


def confusion_matrix(
    logits: jax.Array, labels: jax.Array, *, ignore_index: int | None = None, mask: Mask = None
) -> jax.Array:
    """How often class i was taken for class j: ``table[i, j]``, rows true, columns guessed.

    Shapes:
        logits: (..., classes). labels: (...), ints. mask: leading axes of (...), True where real.
        table: (classes, classes), float32.

    Args:
        logits: the largest is the guess; of equal ones the first.
        labels: the true classes. If one of them is no class, the whole table is NaN, for it can
            neither be counted nor raise under `jax.jit`; this is why counts are floats.
        ignore_index: entries of this label are not counted; often -100.
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
    real = known(labels, mask, ignore_index)
    real = jnp.ones(labels.shape, bool) if real is None else real
    wrong = real & ((labels < 0) | (labels >= classes))
    table = jnp.zeros((classes, classes), jnp.int32)  # float32 would stop counting at 2**24
    table = table.at[labels, jnp.asarray(logits).argmax(-1)].add(real.astype(jnp.int32))
    return jnp.where(wrong.any(), jnp.nan, table.astype(jnp.float32))


def perplexity(loss: float) -> float:
    """``exp(loss)``: among how many equally likely tokens a net hesitates, on average.

    It is no mean over batches: average losses first, as `evaluate` does, and take it of the result.

    Args:
        loss: mean surprise of a token, in nats. The loss of smoothed targets is none: take the
            metric ``cross_entropy``, which objectives with smoothing give beside it.

    Example:
        >>> round(dp.metrics.perplexity(2.0794415), 4)  # log 8
        8.0
    """
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_character(loss: float, tokens: int = 1, characters: int = 1) -> float:
    """``loss / log(2) * tokens / characters``: what a text costs, whatever its tokens are.

    Args:
        loss: mean surprise of a token, in nats, as in `perplexity`.
        tokens: how many tokens of the text were predicted.
        characters: how many characters those tokens stand for; equal to `tokens` if each is one.

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
