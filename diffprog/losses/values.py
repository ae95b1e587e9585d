"""Losses of predicted numbers and of Gaussian distributions.

The rules of all losses are in `entries`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from diffprog.core.arguments import check_array, check_positive
from diffprog.core.dtypes import wide
from diffprog.core.errors import LayerError
from diffprog.core.notation import show
from diffprog.losses.entries import Mask, Reduction, clear, paired, reduce, spread

__all__ = ["absolute_error", "gaussian_kl", "huber", "squared_error"]


def squared_error(
    predictions: jax.Array, targets: jax.Array, *, mask: Mask = None, reduction: Reduction = "mean"
) -> jax.Array:
    """``(predictions - targets)**2``, in squared units of the target; without a factor 1/2.

    Shapes:
        predictions and targets: one shape. mask: leading axes of it, True where valid.

    Args:
        predictions: floats.
        targets: the true values.
        mask, reduction: as in `cross_entropy`; each element is an entry.

    Raises:
        LayerError: shapes or dtypes do not fit; nothing is broadcast.

    Example:
        >>> float(dp.losses.squared_error(jnp.array([1.0, 5.0]), jnp.array([1.0, 2.0])))
        4.5
    """
    predictions, targets, valid = paired(predictions, targets, mask)
    return reduce(optax.losses.squared_error(predictions, targets), valid, reduction)


def absolute_error(
    predictions: jax.Array, targets: jax.Array, *, mask: Mask = None, reduction: Reduction = "mean"
) -> jax.Array:
    """``|predictions - targets|``, in units of the target; its gradient at 0 is 0.

    Args:
        predictions, targets, mask, reduction: as in `squared_error`.

    Raises:
        LayerError: as `squared_error` does.

    Example:
        >>> float(dp.losses.absolute_error(jnp.array([1.0, 5.0]), jnp.array([1.0, 2.0])))
        1.5
    """
    predictions, targets, valid = paired(predictions, targets, mask)
    return reduce(magnitude(predictions - targets), valid, reduction)


def huber(
    predictions: jax.Array, targets: jax.Array, *, delta: float = 1.0, mask: Mask = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """``e**2 / 2`` where ``e = |predictions - targets| <= delta``, else ``delta * (e - delta/2)``.

    The gradient is at most `delta`, so that outliers count less.

    Args:
        predictions, targets, mask, reduction: as in `squared_error`.
        delta: error at which the loss turns from quadratic to linear, in units of the target;
            positive.

    Raises:
        LayerError: as `squared_error` does; delta is not positive.

    Example:
        >>> dp.losses.huber(jnp.array([0.5, 3.0]), jnp.zeros(2), reduction="none").tolist()
        [0.125, 2.5]

    Source: Huber 1964, doi:10.1214/aoms/1177703732.
    """
    # An array of one number, as a quantile of errors, is one too.
    check_positive("delta", float(delta), "pass an error in units of the target")
    predictions, targets, valid = paired(predictions, targets, mask)
    return reduce(optax.losses.huber_loss(predictions, targets, delta=delta), valid, reduction)


def gaussian_kl(
    mean: jax.Array, log_variance: jax.Array, *, mask: Mask = None, reduction: Reduction = "mean"
) -> jax.Array:
    """``KL(N(mean, variance) || N(0, 1)) = sum(mean**2 + variance - 1 - log_variance) / 2``.

    In nats; the sum is over the last axis.

    Shapes:
        mean and log_variance: (..., D). mask: leading axes of (...), True where valid.

    Args:
        mean: of the distribution.
        log_variance: natural logarithm of the variance.
        mask, reduction: as in `cross_entropy`.

    Raises:
        LayerError: shapes or dtypes do not fit.

    Example:
        >>> float(dp.losses.gaussian_kl(jnp.array([[3.0, 0.0]]), jnp.zeros((1, 2))))
        4.5

    Source: Kingma and Welling 2014, arXiv:1312.6114, appendix B.
    """
    check_array(mean, rank=1, axes="(..., features)")
    check_array(log_variance)
    if mean.shape != log_variance.shape:
        raise LayerError(f"a log_variance of the shape of mean, {mean.shape}", show(log_variance),
                         "pass one variance per mean")
    valid = spread(mask, mean.shape[:-1])
    mean, log_variance = clear(wide(mean), valid), clear(wide(log_variance), valid)
    each = (jnp.square(mean) + jnp.expm1(log_variance) - log_variance) / 2
    return reduce(each.sum(-1), valid, reduction)


def magnitude(x: jax.Array) -> jax.Array:
    """``|x|`` with gradient 0 at 0; that of `jnp.abs` is 1."""
    return x * jnp.sign(x)
