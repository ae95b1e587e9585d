"""Averages of parameters over training, used in inference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_fraction
from diffprog.core.computed import Computed, Patterns
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.transforms.reparam import reparametrized

__all__ = ["ema"]


@factory
def ema(layer: Any, decay: float = 0.999, pattern: Patterns = "**") -> Layer:
    """Average parameters for inference: ``y = f(x; a)``, ``a = decay * a + (1 - decay) * w``.

    In training the layer computes with its parameters w, and each call updates the average a, which
    is state under the name ``#ema``. In inference it computes with the average, so that validation,
    sampling and checkpoints use it without further code. The first ``1 / (1 - decay)`` calls are
    averaged equally, so that the initial values are soon forgotten. Under `make_step` an update is
    a step of the optimizer, also if that accumulates the gradients of several calls. In inference
    no gradient reaches the parameters; tools that would need it raise.

    Args:
        layer: any layer.
        decay: weight of the old average in each training call, in [0, 1).
        pattern: paths of the averaged parameters, or a tuple of several patterns.

    Raises:
        LayerError: at composition, for a decay outside [0, 1); at ``init``, for a pattern that
            matches nothing.

    Example:
        >>> net = dp.ema(dp.linear(3), decay=0.9)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(dp.tree.paths(state))
        ['#ema/bias/average', '#ema/bias/count', '#ema/kernel/average', '#ema/kernel/count']

    Source: Polyak and Juditsky 1992, SIAM Journal on Control and Optimization 30(4).
    """
    check_fraction("decay", decay)

    def carry(leaf: jax.Array) -> dict[str, jax.Array]:
        # A copy, because a step that donates its state may donate each buffer only once.
        return {"average": jnp.copy(leaf), "count": jnp.zeros((), jnp.int32)}

    def use(
        leaf: jax.Array, carried: dict[str, jax.Array], train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        average, count = carried["average"], carried["count"] + 1
        if not train:
            return average.astype(leaf.dtype), carried
        rate = jnp.maximum(1 - decay, 1 / count).astype(average.dtype)
        current = jax.lax.stop_gradient(leaf).astype(average.dtype)
        return leaf, {"average": average + rate * (current - average), "count": count}

    return reparametrized(
        as_layer(layer),
        Computed(lambda key, leaf: leaf, use, pattern, carry=carry, mark="#ema"),
        lambda layer: ema(layer, decay, pattern))
