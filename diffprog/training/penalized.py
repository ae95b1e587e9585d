"""An objective with a penalty: a function of the parameters alone, added to the loss.

Weight decay belongs to the optimizer (`optax.adamw`, with `tree.mask`); a penalty is for terms that
have no such form, or that should show among the metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.nets import plain
from diffprog.core.notation import show
from diffprog.core.plans import Params
from diffprog.training.objectives import Objective, like

__all__ = ["penalized"]


def penalized(objective: Objective, penalty: Callable[[Params], jax.Array]) -> Objective:
    """The objective ``loss + penalty(params)``; metrics gain ``penalty``.

    The penalty gets the parameters that the net computes with, as `merge` returns them in the mode
    of the call: the results of `weight_norm`, `quantize`, `lora` or `ema`. Frozen parameters have
    no gradient there.

    The metric ``loss`` stays the loss on the data, so that training and validation compare.
    Penalties of several layers of `penalized` add up.

    Args:
        objective: the objective without the penalty.
        penalty: ``params -> number``, including its rate; params have the paths of the plain net.

    Raises:
        LayerError: the penalty is no single number.

    Example:
        >>> penalty = lambda params: 1e-4 * dp.losses.l2(params, "**/kernel")
        >>> objective = dp.training.penalized(dp.classification(), penalty)
        >>> step = dp.make_step(dp.linear(3), objective, optax.sgd(0.1))
        >>> x, y = jnp.ones((2, 4)), jnp.array([0, 2])
        >>> state, metrics = step.apply(step.init(jax.random.key(0), x), (x, y))
        >>> sorted(metrics)
        ['accuracy', 'count', 'loss', 'penalty']
    """
    if not callable(penalty):
        raise LayerError("a penalty as a function of params", show(penalty),
                         "write lambda params: rate * dp.losses.l2(params)")

    @like(objective)
    def total(
        net: Layer, params: Params, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        before = state or {}
        loss, (state, metrics) = objective(net, params, state, batch, key=key, train=train)
        extra = penalty(plain(net, params, before, train)[0])
        if jnp.shape(extra) != ():
            raise LayerError("a penalty that is one number", show(extra), "sum it")
        return loss + extra, (state, {**metrics, "penalty": metrics.get("penalty", 0) + extra})

    return total
