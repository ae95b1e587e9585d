"""Averages of parameters over training, used at rest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_share
from diffprog.core.computed import Computed, Patterns
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.transforms.reparam import reparametrized

__all__ = ["ema"]


@factory
def ema(layer: Any, decay: float = 0.999, pattern: Patterns = "**") -> Layer:
    """Use averaged parameters at rest: ``y = f(x; a)`` with ``a = decay * a + (1 - decay) * w``.

    In training the layer computes with its parameters, and each call takes them into the average,
    which is state, under the name ``#ema``; at rest it computes with the average. So validation,
    sampling and checkpoints see it without further code. The first ``1 / (1 - decay)`` calls are
    averaged equally, so that the initial values are soon forgotten. `make_step` counts steps of the
    optimizer, where one gathers the gradients of several calls. No gradient reaches the
    parameters at rest: what asks for one there is refused.

    Args:
        layer: any layer.
        decay: of the average in each call of training; at least 0, less than 1.
        pattern: of the paths of what is averaged, or a tuple of several.

    Raises:
        LayerError: at composition, for another decay; at ``init``, for a pattern that matches
            nothing.

    Example:
        >>> net = dp.ema(dp.linear(3), decay=0.9)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(dp.tree.paths(state))
        ['#ema/bias/average', '#ema/bias/count', '#ema/kernel/average', '#ema/kernel/count']

    Source: Polyak and Juditsky 1992, SIAM Journal on Control and Optimization 30(4).
    """
    check_share("decay", decay)

    def carry(leaf: jax.Array) -> dict[str, jax.Array]:
        # A copy: a step that donates its state may give up each buffer only once.
        return {"average": jnp.copy(leaf), "count": jnp.zeros((), jnp.int32)}

    def use(
        leaf: jax.Array, carried: dict[str, jax.Array], train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        average, count = carried["average"], carried["count"] + 1
        if not train:
            return average.astype(leaf.dtype), carried
        share = jnp.maximum(1 - decay, 1 / count).astype(average.dtype)
        now = jax.lax.stop_gradient(leaf).astype(average.dtype)
        return leaf, {"average": average + share * (now - average), "count": count}

    return reparametrized(
        as_layer(layer),
        Computed(lambda key, leaf: leaf, use, pattern, carry=carry, mark="#ema"),
        lambda layer: ema(layer, decay, pattern))
