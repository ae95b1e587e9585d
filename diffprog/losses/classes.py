"""Losses of predicted classes: of one label, of several at once, of sequences of labels.

The rules that all losses share stand in `entries`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffprog.core.arguments import as_int32, check_array, check_count, check_share
from diffprog.core.dtypes import joint, outside, standard_promotion
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
    wide,
)

__all__ = ["binary_cross_entropy", "cross_entropy", "ctc", "kl_divergence", "linear_cross_entropy"]


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0,
    class_weights: jax.Array | None = None, ignore_index: int | None = None, mask: Mask = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """The surprise of the true classes: ``loss = -sum(target * log softmax(logits))``, in nats.

    The target of an integer label is 1 for its class, and the sum is one term, ``-log softmax
    (logits)[label]``: no one-hot vector is made. Smoothing s takes the target to ``(1 - s) *
    target + s / classes``, and class weights multiply it.

    Shapes:
        logits: (..., classes). labels: (...), or (..., classes) if soft. mask: leading axes of
        (...), True where real. class_weights: (classes,).

    Args:
        logits: unnormalized log-probabilities; -inf where a class is impossible, which costs
            nothing where the target is 0.
        labels: the true classes, ints in [0, classes), or soft targets, floats that are
            probabilities. A class outside the range gives NaN, for it cannot raise under `jax.jit`.
        label_smoothing: the share s of the target that is spread over all classes, in [0, 1).
        class_weights: one for each class. With integer labels the mean divides by the sum of the
            weights of the true classes; with soft ones by the number of entries.
        ignore_index: entries of this label are not real; often -100.
        mask: entries where it is False are not real.
        reduction: "mean" over the real entries, their "sum", or "none".

    Raises:
        LayerError: shapes, dtypes or ranges do not fit; `ignore_index` is given for soft labels.

    Example:
        >>> float(dp.losses.cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))).__round__(4)
        1.3863

    Source: smoothing is that of Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    check_share("label_smoothing", label_smoothing)
    if is_soft(labels):
        if labels.shape != logits.shape or ignore_index is not None:
            raise LayerError(
                f"integer labels, or probabilities as {show(logits)} without ignore_index",
                             f"{show(labels)} and ignore_index={ignore_index}",
                             "make class numbers integers, or leave soft labels out by a mask")
        logits, targets, real = paired(logits, labels, mask, features=1)
        targets = (1 - label_smoothing) * targets + label_smoothing / logits.shape[-1]
        targets *= jax.lax.broadcast_to_rank(_of_classes(class_weights, logits), targets.ndim)
        return reduce(_surprise(logits, targets), real, reduction)

    labels = class_numbers(logits, labels)
    real = known(labels, mask, ignore_index)
    logits = clear(wide(logits), real)
    classes = logits.shape[-1]
    valid = (labels >= 0) & (labels < classes)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    each = None if class_weights is None else _of_classes(class_weights, logits).at[labels].get(
        out_sharding=placed(labels, labels.ndim, 0))
    if each is not None:
        losses = _weighed(each, losses)
    if label_smoothing:
        uniform = _of_classes(class_weights, logits) / classes
        losses = (1 - label_smoothing) * losses + label_smoothing * _surprise(logits, uniform)
    return reduce(jnp.where(valid, losses, jnp.nan), real, reduction, each)


def linear_cross_entropy(
    x: jax.Array, kernel: jax.Array, labels: jax.Array, *, bias: jax.Array | None = None,
    chunk: int = 8192, ignore_index: int | None = None, mask: Mask = None,
    reduction: Reduction = "mean",
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy` of ``x @ kernel + bias``, computed a part of the classes at a time.

    The scores of all classes never exist at once, in neither direction: ``log sum exp`` is summed
    up over the chunks, and the gradient computes each chunk anew, one more product in all.

    Shapes:
        x: (..., D). kernel: (D, classes). bias: (classes,). labels: (...), ints. mask: leading axes
            of (...), True where real.
        Returns the loss, and the likeliest class of each entry, ints (...).

    Args:
        x: what is scored; products are in its dtype, sums in float32 or wider.
        kernel, bias: of the last linear layer; of a tied embedding ``embedding.T``.
        labels: the true classes, ints in [0, classes); a class outside gives NaN.
        chunk: how many classes are scored at a time; positive. Multiples that divide the number of
            classes spare a copy of the rest.
        ignore_index, mask, reduction: as in `cross_entropy`.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> x, kernel, labels = jnp.ones((2, 3)), jnp.ones((3, 10)), jnp.array([4, 9])
        >>> loss, best = dp.losses.linear_cross_entropy(x, kernel, labels, chunk=4)
        >>> round(float(loss), 4), best.tolist()  # log 10; of equal scores the first
        (2.3026, [0, 0])

    Source: the running sum: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
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
    real = known(labels, mask, ignore_index)
    rows, targets = clear(x, real).reshape(-1, x.shape[-1]), labels.reshape(-1)
    held, inside = outside(rows)  # its gradient is summed over the chunks
    dtype = joint(x.dtype, jnp.float32)
    with standard_promotion():  # kernel and bias may be in unlike dtypes
        scoring = kernel.T if bias is None else jnp.concatenate([kernel, bias[None]]).T

    @jax.checkpoint  # keeps no chunk for the gradient
    def step(carry: Any, part: Any) -> tuple[Any, None]:
        top, best, summed, true = carry
        first, weights = part
        rows = inside(held)
        scores = rows @ weights[:, : rows.shape[-1]].T.astype(rows.dtype)
        scores = scores.astype(dtype)
        if bias is not None:
            scores += weights[None, :, -1].astype(dtype)
        here = jax.lax.stop_gradient(scores.max(-1))
        best = jnp.where(here > top, first + scores.argmax(-1).astype(best.dtype), best)
        new = jnp.maximum(here, top)
        finite = jnp.maximum(new, jnp.finfo(dtype).min)  # as long as all classes are impossible
        summed = summed * jnp.exp(top - finite) + jnp.exp(scores - finite[:, None]).sum(-1)
        at = targets - first
        own = jnp.take_along_axis(scores, at[:, None], -1, mode="clip")[:, 0]
        return (new, best, summed, jnp.where((at >= 0) & (at < len(weights)), own, true)), None

    count = rows.shape[0]
    carry: Any = (jnp.full(count, -jnp.inf, dtype), jnp.zeros(count, jnp.int32),
                  jnp.zeros(count, dtype), jnp.full(count, jnp.nan, dtype))
    carry = jax.tree.map(lambda a: beside(a, rows), carry)
    whole = classes // chunk
    if whole:
        parts = scoring[: whole * chunk].reshape(whole, chunk, -1)
        xs = (chunk * jnp.arange(whole, dtype=jnp.int32), parts)
        carry = settled(lambda carry, part: step(carry, part)[0], carry, xs)
        carry, _ = jax.lax.scan(step, carry, xs)
    if whole * chunk < classes:
        carry, _ = step(carry, (whole * chunk, scoring[whole * chunk :]))
    top, best, summed, true = carry
    losses = (top + jnp.log(summed) - true).reshape(labels.shape)
    return reduce(losses, real, reduction), best.reshape(labels.shape)


def binary_cross_entropy(
    logits: jax.Array, targets: jax.Array, *, mask: Mask = None, reduction: Reduction = "mean"
) -> jax.Array:
    """The surprise of yes or no: ``-t * log sigmoid(x) - (1 - t) * log sigmoid(-x)``, in nats.

    Shapes:
        logits x and targets t: one shape. mask: leading axes of it, True where real.

    Args:
        logits: log-odds of yes; infinite if sure, which costs nothing where it is true.
        targets: 0, 1 or a probability between; outside [0, 1] the loss is NaN.
        mask, reduction: as in `cross_entropy`; each element is an entry.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> float(dp.losses.binary_cross_entropy(jnp.array([0.0]), jnp.array([1.0]))).__round__(4)
        0.6931
    """
    logits, targets, real = paired(logits, targets, mask)
    losses = (_weighed(targets, jax.nn.softplus(-logits))
              + _weighed(1 - targets, jax.nn.softplus(logits)))
    valid = (targets >= 0) & (targets <= 1)
    return reduce(jnp.where(valid, losses, jnp.nan), real, reduction)


def kl_divergence(
    log_predictions: jax.Array, targets: jax.Array, *, mask: Mask = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """``sum(targets * (log targets - log_predictions))`` over the last axis, in nats; 0 log 0 = 0.

    Shapes:
        log_predictions and targets: (..., classes). mask: leading axes of (...), True where real.

    Args:
        log_predictions: logarithms of probabilities, such as `jax.nn.log_softmax` gives.
        targets: probabilities; a negative one gives NaN.
        mask, reduction: as in `cross_entropy`.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> fair, sure = jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0])
        >>> float(dp.losses.kl_divergence(jnp.log(fair), sure)).__round__(4)
        0.6931
    """
    log_predictions, targets, real = paired(log_predictions, targets, mask, features=1)
    # optax.losses.kl_divergence has a NaN gradient in the target where that is 0.
    some = targets != 0
    ratio = jnp.log(jnp.where(some, targets, 1)) - jnp.where(some, log_predictions, 0)
    return reduce((targets * ratio).sum(-1), real, reduction)


def ctc(
    logits: jax.Array, labels: jax.Array, *, mask: Mask = None, label_mask: Mask = None,
    blank: int = 0, reduction: Reduction = "mean",
) -> jax.Array:
    """The surprise of a label sequence however it is aligned: ``-log sum_paths prod_t p(path_t)``.

    A path names one class for each frame; it spells the labels once repetitions are merged and
    blanks left out. Both masks may leave out any positions; an example without a real frame is not
    real.

    Shapes:
        logits: (batch, time, classes). labels: (batch, n). mask: (batch, time). label_mask:
        (batch, n).

    Args:
        logits: unnormalized log-probabilities; -inf where a class is impossible.
        labels: ints in [0, classes) without `blank`; others give NaN. Labels that cannot be spelled
            in as many frames as there are give about 1e5, not infinity.
        mask: True marks real frames.
        label_mask: True marks real labels.
        blank: the class that stands for no label.
        reduction: "mean" over the real examples, their "sum", or "none"; PyTorch's mean divides
            each loss by the number of labels first.

    Raises:
        LayerError: shapes or dtypes do not fit; `blank` is no class.

    Example:
        >>> loss = dp.losses.ctc(jnp.zeros((1, 2, 2)), jnp.array([[1]]))
        >>> round(float(loss), 4)  # 3 of 4 paths
        0.2877

    Source: Graves et al. 2006, doi:10.1145/1143844.1143891, eq. 3 and 8.
    """
    check_array(logits)
    whole = jnp.issubdtype(labels.dtype, jnp.integer)
    if logits.ndim != 3 or labels.ndim != 2 or labels.shape[0] != logits.shape[0] or not whole:
        raise LayerError("logits (batch, time, classes) and integer labels (batch, n)",
                         show((logits, labels)), "give each example one row of labels")
    classes = logits.shape[-1]
    if not 0 <= blank < classes:
        raise LayerError(f"blank in [0, {classes})", repr(blank), "pass the number of a class")
    frames, kept = (jnp.ones(shape, bool) if marks is None else spread(marks, shape)
                    for marks, shape in ((mask, logits.shape[:2]), (label_mask, labels.shape)))
    labels = as_int32(labels)
    wrong = kept & ((labels < 0) | (labels >= classes) | (labels == blank))
    order = jnp.argsort(~kept, axis=1, stable=True)  # optax wants the real labels in front
    labels, kept = (jnp.take_along_axis(a, order, axis=1) for a in (labels, kept))
    logits = clear(wide(logits), frames)
    # optax counts a probability of 0 as exp(-1e5).
    least = jax.lax.stop_gradient(logits.max(-1, keepdims=True)) - 1e5
    logits = jnp.where(jnp.isneginf(logits), least, logits)
    padding, unasked = ((~marks).astype(logits.dtype) for marks in (frames, kept))
    with standard_promotion():
        losses = optax.losses.ctc_loss(logits, padding, labels, unasked, blank_id=blank)
    losses -= jax.lax.stop_gradient(jnp.minimum(losses, 0))  # rounding, where all paths are right
    return reduce(jnp.where(wrong.any(1), jnp.nan, losses), frames.any(1), reduction)


def _surprise(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """``-sum(targets * log softmax(logits))`` over the last axis."""
    return _weighed(targets, -jax.nn.log_softmax(logits)).sum(-1)


def _weighed(weights: jax.Array, surprise: jax.Array) -> jax.Array:
    """``weights * surprise``: what does not happen costs nothing, were it impossible."""
    weights = jax.lax.broadcast_to_rank(weights, surprise.ndim)
    return weights * jnp.where((weights == 0) & jnp.isposinf(surprise), 0, surprise)


def _of_classes(weights: Any, logits: jax.Array) -> jax.Array:
    """Class weights in the dtype of the logits; 1 if there are none."""
    classes = logits.shape[-1]
    weights = jnp.asarray(jnp.ones(classes) if weights is None else weights, logits.dtype)
    if weights.shape != (classes,):
        raise LayerError(f"one weight for each of {classes} classes", show(weights),
                         "pass an array of shape (classes,)")
    return weights
