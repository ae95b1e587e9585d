"""What a variational autoencoder is trained by: the evidence lower bound and its two terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import called, show
from diffprog.losses.classes import binary_cross_entropy
from diffprog.losses.entries import (
    average,
    spread,
    total,
    weighing,
)
from diffprog.losses.values import gaussian_kl
from diffprog.training.objectives import (
    Metrics,
    Objective,
    check_logits,
    check_target,
    inputs,
    parts,
    real_targets,
    unreduced,
)

__all__ = ["elbo"]


def elbo(
    loss: Callable[..., jax.Array] = binary_cross_entropy, *, beta: float = 1.0
) -> Objective:
    """The objective of a `vae`: ``E[-log p(y | z)] + beta * KL(q(z | x) || N(0, 1))``, in nats.

    The net gives a pair, the prediction of y and the pair (mean, log_variance) of q. A batch is
    that of `regression`: y is x itself, or x before noise was added. Metrics, in nats an example:
    ``reconstruction``, the sum of `loss` over all entries of an example, and ``kl``, summed over
    all hidden numbers; ``-(reconstruction + kl)`` bounds the logarithm of p(y) from below.

    The mean over z is that of one draw for each example, in `evaluate` too, which gives each a key
    of its own. Called without a key z is the mean of q, and the loss is no bound.

    An example without a real entry, by `mask` or `target_mask`, is not real. A `sample_weight` is
    one of examples, (batch,).

    Args:
        loss: gives ``-log p`` of each entry with ``reduction="none"``. `binary_cross_entropy` takes
            the predictions as log-odds; `squared_error` is the normal distribution of variance 1/2
            around them, but for a constant log(pi) / 2 for each entry.
        beta: weight of the KL term, at least 0; above 1 hidden numbers become fewer and more
            independent of one another, and the loss is not the bound.

    Raises:
        LayerError: a negative beta; the net gives something else.

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
        mask, weights = real_targets(net, batch, x, side, y.shape, lambda output: output[0])
        surprise = _rows(unreduced(loss, prediction, y, mask, y.shape)).sum(1)
        real = None if mask is None else _rows(spread(mask, y.shape)).any(1)
        weights = None if weights is None else _of_examples(batch["sample_weight"], y.shape[0])
        reconstruction = average(surprise, real, weights)
        latent = gaussian_kl(_rows(mean), _rows(log_variance), mask=real, reduction="none")
        kl = average(latent, real, weights)
        value = reconstruction + beta * kl
        return value, (state, {"loss": value, "reconstruction": reconstruction, "kl": kl,
                               "count": total(surprise.shape, real, weights)})

    said: Any = objective
    said.inputs, said.draws = inputs, True
    return said


def _pair(output: Any, wanted: str) -> Any:
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        raise LayerError(wanted, show(output), "make the net by vae(encoder, decoder)")
    return output


def _of_examples(weights: Any, count: int) -> Any:
    """The weights, of which each example must have one."""
    if weights.ndim != 1:
        raise LayerError(f"a sample_weight of the {count} examples", show(weights),
                         "give one number to each example: its entries are one surprise")
    return weighing(weights, (count,))


def _rows(a: jax.Array) -> jax.Array:
    """One row for each example."""
    return a.reshape(a.shape[0], math.prod(a.shape[1:]))
