"""The objective of a variational autoencoder: the evidence lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import called, show
from diffprog.losses.classes import binary_cross_entropy
from diffprog.losses.entries import spread, weighing
from diffprog.losses.values import gaussian_kl
from diffprog.training.objectives import (
    Entries,
    Metrics,
    Objective,
    check_logits,
    check_target,
    inputs,
    parts,
    unreduced,
    valid_targets,
)

__all__ = ["elbo"]


def elbo(
    loss: Callable[..., jax.Array] = binary_cross_entropy, *, beta: float = 1.0
) -> Objective:
    """The objective of a `vae`: ``E[-log p(y | z)] + beta * KL(q(z | x) || N(0, 1))``, in nats.

    The net returns a pair: the prediction of y, and the pair (mean, log_variance) of q. A batch is
    that of `regression`: y is x itself, or x before noise was added. Metrics, in nats per example:
    ``reconstruction``, the sum of `loss` over the entries of an example, and ``kl``, summed over
    the latent variables; ``-(reconstruction + kl)`` is a lower bound of log p(y).

    The expectation is estimated by one sample of z per example, in `evaluate` too, with a key for
    each example. Without a key z is the mean of q, and the loss is no bound.

    An example without a valid entry, by `mask` or `target_mask`, is invalid. `sample_weight` is
    over examples, (batch,).

    Args:
        loss: ``-log p`` of each entry with ``reduction="none"``. `binary_cross_entropy` takes the
            predictions as log-odds; `squared_error` is a normal distribution of variance 1/2 with
            the prediction as mean, without the constant log(pi) / 2 per entry.
        beta: weight of the KL term, at least 0. Above 1 fewer latent variables are used, they are
            less dependent on one another, and the loss is no bound.

    Raises:
        LayerError: a negative beta; the net returns something else.

    Example:
        >>> latent = dp.branch(mean=dp.linear(2), log_variance=dp.linear(2))
        >>> net, x = dp.models.vae(latent, dp.linear(5)), jnp.ones((3, 5))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.training.elbo()(
        ...     net, params, state, (x, x), key=jax.random.key(1), train=True)
        >>> sorted(metrics)
        ['count', 'kl', 'loss', 'reconstruction']

    Source: Kingma and Welling 2014, arXiv:1312.6114, eq. 3 and 10; beta: Higgins et al. 2017,
    "beta-VAE", ICLR, eq. 4.
    """
    if not beta >= 0:
        raise LayerError("beta as a number of at least 0", repr(beta), "pass 1.0 for the bound")

    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        if called(loss) is binary_cross_entropy and "decoder" in net.children:
            check_logits(net.children["decoder"])
        x, y, side = parts(net, batch)
        check_target(y)
        output, state = net.apply(params, state, x, key=key, train=train, **side)
        prediction, latent = _pair(output, "a pair, the prediction and (mean, log_variance)")
        mean, log_variance = _pair(latent, "a pair (mean, log_variance) beside the prediction")
        mask, weights = valid_targets(net, batch, x, side, y.shape, lambda output: output[0])
        losses = _rows(unreduced(loss, prediction, y, mask, y.shape)).sum(1)     # (batch,)
        valid = None if mask is None else _rows(spread(mask, y.shape)).any(1)    # (batch,)
        if weights is not None:
            weights = _example_weights(batch["sample_weight"], y.shape[0])       # (batch,)
        divergences = gaussian_kl(                                               # (batch,)
            _rows(mean), _rows(log_variance), mask=valid, reduction="none")
        examples = Entries.of(losses.shape, valid, weights)
        reconstruction, kl = examples.mean(losses), examples.mean(divergences)
        value = reconstruction + beta * kl
        return value, (state, {"loss": value, "reconstruction": reconstruction, "kl": kl,
                               "count": examples.count})

    result: Any = objective
    result.inputs, result.draws = inputs, True
    return result


def _pair(output: Any, wanted: str) -> Any:
    """The output, which must be a pair."""
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        raise LayerError(wanted, show(output), "make the net by vae(encoder, decoder)")
    return output


def _example_weights(weights: Any, count: int) -> Any:
    """The weights; raise unless they are over the examples alone."""
    if weights.ndim != 1:
        raise LayerError(f"a sample_weight of the {count} examples", show(weights),
                         "pass one number per example: the entries of one have one loss")
    return weighing(weights, (count,))


def _rows(a: jax.Array) -> jax.Array:
    """(batch, ...) as (batch, n)."""
    return a.reshape(a.shape[0], math.prod(a.shape[1:]))
