"""Losses of predicted classes: one label, several binary labels, sequences of labels.

The rules of all losses are in `entries`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffprog.core.arguments import as_int32, check_array, check_count, check_fraction
from diffprog.core.dtypes import is_int, outside, standard_promotion, wide, wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.meshes import beside, placed, settled
from diffprog.core.notation import show
from diffprog.losses.entries import (
    Mask,
    Reduction,
    class_numbers,
    clear,
    is_soft,
    known,
    paired,
    reduce,
    spread,
)

__all__ = ["binary_cross_entropy", "cross_entropy", "ctc", "kl_divergence", "linear_cross_entropy"]


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0,
    class_weights: jax.Array | None = None, ignore_index: int | None = None, mask: Mask = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """The negative log-likelihood of the labels: ``-sum(target * log softmax(logits))``, in nats.

    The target of an integer label is 1 at its class: the sum is the one term ``-log
    softmax(logits)[label]``, and no one-hot vector is made. Smoothing s makes the target ``(1 - s)
    * target + s / classes``; class weights multiply it.

    Shapes:
        logits: (..., classes). labels: (...), or (..., classes) if soft. mask: leading axes of
        (...), True where valid. class_weights: (classes,).

    Args:
        logits: unnormalized log-probabilities; -inf for an impossible class, which costs nothing
            where the target is 0.
        labels: the true classes, ints in [0, classes), or soft targets, floats that are
            probabilities. A class out of range gives NaN, since it cannot raise under `jax.jit`.
        label_smoothing: the fraction s of the target that is spread over all classes, in [0, 1).
        class_weights: one per class. With integer labels the mean divides by the sum of the weights
            of the true classes; with soft ones by the number of entries.
        ignore_index: entries with this label are invalid; often -100.
        mask: entries where it is False are invalid.
        reduction: "mean" over the valid entries, their "sum", or "none".

    Raises:
        LayerError: shapes, dtypes or ranges do not fit; `ignore_index` with soft labels.

    Example:
        >>> float(dp.losses.cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))).__round__(4)
        1.3863

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7 (smoothing).
    """
    check_fraction("label_smoothing", label_smoothing)
    if is_soft(labels):
        losses, valid = soft_label_losses(
            logits, labels, mask, ignore_index, label_smoothing, class_weights)
        return reduce(losses, valid, reduction)
    labels = class_numbers(logits, labels)
    valid = known(labels, mask, ignore_index)
    losses, weights = label_losses(logits, labels, valid, label_smoothing, class_weights)
    return reduce(losses, valid, reduction, weights)


def soft_label_losses(
    logits: jax.Array, labels: jax.Array, mask: Mask, ignore_index: int | None,
    label_smoothing: float = 0.0, class_weights: jax.Array | None = None,
) -> tuple[jax.Array, Mask]:
    """The cross-entropy of each entry with soft labels, and the valid entries."""
    if labels.shape != logits.shape or ignore_index is not None:
        raise LayerError(
            f"integer labels, or probabilities as {show(logits)} without ignore_index",
            f"{show(labels)} and ignore_index={ignore_index}",
            "make class numbers integers, or leave soft labels out by a mask")
    logits, targets, valid = paired(logits, labels, mask, features=1)
    targets = (1 - label_smoothing) * targets + label_smoothing / logits.shape[-1]
    weights = _class_weights(class_weights, logits)                          # (classes,)
    targets *= jax.lax.broadcast_to_rank(weights, targets.ndim)              # (..., classes)
    return _cross_entropy(logits, targets), valid


def label_losses(
    logits: jax.Array, labels: jax.Array, valid: Mask, label_smoothing: float = 0.0,
    class_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The cross-entropy of each entry with `class_numbers`, and the weights of the true classes."""
    logits = clear(wide(logits), valid)                                      # (..., classes)
    classes = logits.shape[-1]
    in_range = (labels >= 0) & (labels < classes)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)  # (...)
    weights = None
    if class_weights is not None:
        weights = _class_weights(class_weights, logits).at[labels].get(      # (...)
            mode="clip", out_sharding=placed(labels, labels.ndim, 0))
        losses = _weighted(weights, losses)
    if label_smoothing:
        uniform = _class_weights(class_weights, logits) / classes            # (classes,)
        losses = ((1 - label_smoothing) * losses
                  + label_smoothing * _cross_entropy(logits, uniform))
    return jnp.where(in_range, losses, jnp.nan), weights


def linear_cross_entropy(
    x: jax.Array, kernel: jax.Array, labels: jax.Array, *, bias: jax.Array | None = None,
    chunk: int = 8192, ignore_index: int | None = None, mask: Mask = None,
    reduction: Reduction = "mean",
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy` of ``x @ kernel + bias``, computed for `chunk` classes at a time.

    The logits of all classes never exist at once, neither forward nor backward: ``log sum exp`` is
    accumulated over the chunks, and the gradient recomputes each chunk, which costs one more
    product.

    Shapes:
        x: (..., D). kernel: (D, classes). bias: (classes,). labels: (...), ints. mask: leading axes
            of (...), True where valid.
        Returns the loss, and the most likely class of each entry, ints (...).

    Args:
        x: inputs of the last linear layer; products are in its dtype, sums in float32 or wider.
        kernel, bias: of the last linear layer; ``embedding.T`` for a tied embedding.
        labels: the true classes, ints in [0, classes); a class out of range gives NaN.
        chunk: number of classes at a time; positive. If it does not divide the number of classes,
            the last chunk is smaller and compiled separately.
        ignore_index, mask, reduction: as in `cross_entropy`.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> x, kernel, labels = jnp.ones((2, 3)), jnp.ones((3, 10)), jnp.array([4, 9])
        >>> loss, best = dp.losses.linear_cross_entropy(x, kernel, labels, chunk=4)
        >>> round(float(loss), 4), best.tolist()  # log 10; of equal logits the first
        (2.3026, [0, 0])

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3 (the running sum).
    """
    check_count("chunk", chunk)
    check_array(x, 1, "(..., features)")
    if getattr(kernel, "ndim", 0) != 2 or kernel.shape[0] != x.shape[-1]:
        raise LayerError(f"a kernel of shape ({x.shape[-1]}, classes)", show(kernel),
                         "pass embedding.T for a tied embedding")
    classes = kernel.shape[1]
    if bias is not None and bias.shape != (classes,):
        raise LayerError(f"a bias of shape ({classes},)", show(bias),
                         "give one number to each class")
    labels = class_numbers(x, labels)
    valid = known(labels, mask, ignore_index)
    rows = clear(x, valid).reshape(-1, x.shape[-1])                          # (n, D)
    held, inside = outside(rows)  # the gradient of rows is summed over the chunks
    dtype = wide_dtype(x)
    with standard_promotion():  # kernel and bias may have different dtypes
        weights = kernel.T if bias is None else jnp.concatenate([kernel, bias[None]]).T
    step = functools.partial(
        _chunk_step, held, inside, labels.reshape(-1), bias is not None, dtype)
    step = jax.checkpoint(step)  # keeps no chunk for the gradient

    running: Any = _Running.of(rows, dtype)
    chunks = classes // chunk
    if chunks:
        parts = weights[: chunks * chunk].reshape(chunks, chunk, -1)         # (chunks, chunk, D+1)
        xs = (chunk * jnp.arange(chunks, dtype=jnp.int32), parts)
        running = settled(lambda running, part: step(running, part)[0], running, xs)
        running, _ = jax.lax.scan(step, running, xs)
    if chunks * chunk < classes:
        running, _ = step(running, (chunks * chunk, weights[chunks * chunk :]))
    losses = running.top + jnp.log(running.summed) - running.true            # (n,)
    loss = reduce(losses.reshape(labels.shape), valid, reduction)
    return loss, running.best.reshape(labels.shape)


class _Running(NamedTuple):
    """What the chunks so far determine for each row, all of shape (n,).

    Attributes:
        top: the largest logit.
        best: its class.
        summed: the sum of ``exp(logits - top)``.
        true: the logit of the label; NaN until its chunk comes.
    """

    top: jax.Array
    best: jax.Array
    summed: jax.Array
    true: jax.Array

    @classmethod
    def of(cls, rows: jax.Array, dtype: Any) -> _Running:
        """The initial values, placed as the rows are."""
        n = rows.shape[0]
        begun = cls(jnp.full(n, -jnp.inf, dtype), jnp.zeros(n, jnp.int32), jnp.zeros(n, dtype),
                    jnp.full(n, jnp.nan, dtype))
        return jax.tree.map(lambda a: beside(a, rows), begun)


def _chunk_step(
    held: Any, inside: Callable[[Any], jax.Array], labels: jax.Array, biased: bool, dtype: Any,
    running: _Running, part: tuple[Any, jax.Array],
) -> tuple[_Running, None]:
    """The running values after the logits of one chunk; `part` is its first class and weights."""
    first, weights = part                                                    # (chunk, D [+ 1])
    rows = inside(held)                                                      # (n, D)
    kernel = weights[:, : rows.shape[-1]].T.astype(rows.dtype)               # (D, chunk)
    logits = (rows @ kernel).astype(dtype)                                   # (n, chunk)
    if biased:
        logits += weights[None, :, -1].astype(dtype)
    largest = jax.lax.stop_gradient(logits.max(-1))                          # (n,)
    best = jnp.where(largest > running.top,
                     first + logits.argmax(-1).astype(running.best.dtype), running.best)
    top = jnp.maximum(largest, running.top)
    finite = jnp.maximum(top, jnp.finfo(dtype).min)  # while all classes are impossible
    summed = (running.summed * jnp.exp(running.top - finite)
              + jnp.exp(logits - finite[:, None]).sum(-1))
    at = labels - first
    own = jnp.take_along_axis(logits, at[:, None], -1, mode="clip")[:, 0]    # (n,)
    true = jnp.where((at >= 0) & (at < len(weights)), own, running.true)
    return _Running(top, best, summed, true), None


def binary_cross_entropy(
    logits: jax.Array, targets: jax.Array, *, mask: Mask = None, reduction: Reduction = "mean"
) -> jax.Array:
    """``-t * log sigmoid(x) - (1 - t) * log sigmoid(-x)``, in nats, of each element.

    Shapes:
        logits x and targets t: one shape. mask: leading axes of it, True where valid.

    Args:
        logits: log-odds of the positive class; infinite if certain, which costs nothing where it is
            right.
        targets: probabilities of the positive class; outside [0, 1] the loss is NaN.
        mask, reduction: as in `cross_entropy`; each element is an entry.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> float(dp.losses.binary_cross_entropy(jnp.array([0.0]), jnp.array([1.0]))).__round__(4)
        0.6931
    """
    logits, targets, valid = paired(logits, targets, mask)
    losses = (_weighted(targets, jax.nn.softplus(-logits))
              + _weighted(1 - targets, jax.nn.softplus(logits)))
    in_range = (targets >= 0) & (targets <= 1)
    return reduce(jnp.where(in_range, losses, jnp.nan), valid, reduction)


def kl_divergence(
    log_predictions: jax.Array, targets: jax.Array, *, mask: Mask = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """``sum(targets * (log targets - log_predictions))`` over the last axis, in nats; 0 log 0 = 0.

    Shapes:
        log_predictions and targets: (..., classes). mask: leading axes of (...), True where valid.

    Args:
        log_predictions: log-probabilities, as `jax.nn.log_softmax` returns.
        targets: probabilities; a negative one gives NaN.
        mask, reduction: as in `cross_entropy`.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> fair, sure = jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0])
        >>> float(dp.losses.kl_divergence(jnp.log(fair), sure)).__round__(4)
        0.6931
    """
    log_predictions, targets, valid = paired(log_predictions, targets, mask, features=1)
    # optax.losses.kl_divergence has a NaN gradient with respect to targets that are 0.
    positive = targets != 0
    log_ratio = (jnp.log(jnp.where(positive, targets, 1))                    # (..., classes)
                 - jnp.where(positive, log_predictions, 0))
    return reduce((targets * log_ratio).sum(-1), valid, reduction)


def ctc(
    logits: jax.Array, labels: jax.Array, *, mask: Mask = None, label_mask: Mask = None,
    blank: int = 0, reduction: Reduction = "mean",
) -> jax.Array:
    """Connectionist temporal classification: ``-log sum_paths prod_t p(path_t)``, in nats.

    The sum is over all alignments: a path has one class per frame, and spells the labels once
    repetitions are merged and blanks removed. Both masks may leave out any positions; an example
    without a valid frame is invalid.

    Shapes:
        logits: (batch, time, classes). labels: (batch, n). mask: (batch, time). label_mask:
        (batch, n).

    Args:
        logits: unnormalized log-probabilities; -inf for an impossible class.
        labels: ints in [0, classes) other than `blank`; others give NaN. Labels that need more
            frames than there are give about 1e5, not infinity.
        mask: True for valid frames.
        label_mask: True for valid labels.
        blank: the class of the blank.
        reduction: "mean" over the valid examples, their "sum", or "none"; PyTorch's mean divides
            each loss by the number of labels first.

    Raises:
        LayerError: shapes or dtypes do not fit; `blank` is out of range.

    Example:
        >>> loss = dp.losses.ctc(jnp.zeros((1, 2, 2)), jnp.array([[1]]))
        >>> round(float(loss), 4)  # 3 of 4 paths
        0.2877

    Source: Graves et al. 2006, doi:10.1145/1143844.1143891, eq. 3 and 8.
    """
    check_array(logits)
    fits = is_int(labels) and (logits.ndim, labels.ndim) == (3, 2)
    if not fits or labels.shape[0] != logits.shape[0]:
        raise LayerError("logits (batch, time, classes) and integer labels (batch, n)",
                         show((logits, labels)), "give each example one row of labels")
    classes = logits.shape[-1]
    if not 0 <= blank < classes:
        raise LayerError(f"blank in [0, {classes})", repr(blank), "pass the number of a class")
    frames = _all_valid(mask, logits.shape[:2])                              # (batch, time)
    kept = _all_valid(label_mask, labels.shape)                              # (batch, n)
    labels = as_int32(labels)
    wrong = kept & ((labels < 0) | (labels >= classes) | (labels == blank))
    order = jnp.argsort(~kept, axis=1, stable=True)  # optax wants the valid labels first
    labels, kept = (jnp.take_along_axis(a, order, axis=1) for a in (labels, kept))
    logits = clear(wide(logits), frames)                           # (batch, time, classes)
    # optax clips log-probabilities at -1e5.
    least = jax.lax.stop_gradient(logits.max(-1, keepdims=True)) - 1e5
    logits = jnp.where(jnp.isneginf(logits), least, logits)
    frame_padding = (~frames).astype(logits.dtype)
    label_padding = (~kept).astype(logits.dtype)
    with standard_promotion():
        losses = optax.losses.ctc_loss(                                      # (batch,)
            logits, frame_padding, labels, label_padding, blank_id=blank)
    losses -= jax.lax.stop_gradient(jnp.minimum(losses, 0))  # rounding, if all paths are right
    return reduce(jnp.where(wrong.any(1), jnp.nan, losses), frames.any(1), reduction)


def _all_valid(mask: Mask, shape: tuple[int, ...]) -> jax.Array:
    """The mask in full shape; all True if it is None."""
    return jnp.ones(shape, bool) if mask is None else spread(mask, shape)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``-sum(targets * log softmax(logits))`` over the last axis."""
    return _weighted(targets, -jax.nn.log_softmax(logits)).sum(-1)


def _weighted(weights: jax.Array, losses: jax.Array) -> jax.Array:
    """``weights * losses``, with 0 * inf = 0: an impossible class of weight 0 costs nothing."""
    weights = jax.lax.broadcast_to_rank(weights, losses.ndim)
    return weights * jnp.where((weights == 0) & jnp.isposinf(losses), 0, losses)


def _class_weights(weights: Any, logits: jax.Array) -> jax.Array:
    """Class weights in the dtype of the logits; ones if None."""
    classes = logits.shape[-1]
    weights = jnp.asarray(jnp.ones(classes) if weights is None else weights, logits.dtype)
    if weights.shape != (classes,):
        raise LayerError(f"one weight for each of {classes} classes", show(weights),
                         "pass an array of shape (classes,)")
    return weights
