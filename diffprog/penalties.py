"""A penalty is a number made of the parameters alone, added to what training makes small.

Decay of weights belongs to the optimizer (`optax.adamw`, with `tree.mask`); a penalty is for what
has no such form, or is to be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog import tree
from diffprog.arguments import is_number
from diffprog.computed import plain
from diffprog.dtypes import joint
from diffprog.errors import LayerError
from diffprog.layer import Layer
from diffprog.losses import magnitude
from diffprog.notation import show
from diffprog.objectives import Objective, like
from diffprog.plans import Params

__all__ = ["l1", "l2", "penalized"]


def l1(params: Params, *patterns: str) -> jax.Array:
    """``sum |w|`` over the leaves that the patterns find, in float32 or wider; slope 0 at 0.

    Args:
        params: parameters of a net; of one with computed parameters pass what `merge` gives, for
            here they are taken as they are.
        patterns: paths as `tree.select` takes them; all kernels if there are none.

    Raises:
        LayerError: a pattern matches nothing.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([9.0])}
        >>> float(dp.l1(params))
        7.0
    """
    return _sum(magnitude, params, patterns)


def l2(params: Params, *patterns: str) -> jax.Array:
    """``sum w**2`` over the leaves that the patterns find, in float32 or wider; no factor 1/2.

    The gradient of ``rate * l2(params)`` is thus ``2 * rate * w``.

    Args:
        params, patterns: as in `l1`.

    Raises:
        LayerError: as `l1` does.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([9.0])}
        >>> float(dp.l2(params)), float(dp.l2(params, "**"))
        (25.0, 106.0)
    """
    return _sum(jnp.square, params, patterns)


def penalized(objective: Objective, penalty: Callable[[Params], jax.Array]) -> Objective:
    """The objective ``loss + penalty(params)``; metrics gain ``penalty``.

    The penalty is given what the net computes with: of parameters that `weight_norm`, `quantize`,
    `lora` or `ema` computes from others the results, as `merge` gives them, in the mode of the
    call. What is frozen has no gradient there.

    The metric ``loss`` stays the loss on the data, so that training and validation compare.
    Penalties of several layers of `penalized` add up.

    Args:
        objective: what is penalized.
        penalty: ``params -> number``, with its rate in it; params under the paths of the plain net.

    Raises:
        LayerError: the penalty is no single number.

    Example:
        >>> objective = dp.penalized(dp.classification(), lambda p: 1e-4 * dp.l2(p, "**/kernel"))
        >>> step = dp.make_step(dp.linear(3), objective, optax.sgd(0.1))
        >>> x, y = jnp.ones((2, 4)), jnp.array([0, 2])
        >>> state, metrics = step.apply(step.init(jax.random.key(0), x), (x, y))
        >>> sorted(metrics)
        ['accuracy', 'count', 'loss', 'penalty']
    """
    if not callable(penalty):
        raise LayerError("a penalty as a function of params", show(penalty),
                         "write lambda params: rate * dp.l2(params)")

    @like(objective)  # what the net is shown stays as it is
    def total(
        net: Layer, params: Params, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        given = state or {}
        loss, (state, metrics) = objective(net, params, state, batch, key=key, train=train)
        extra = penalty(plain(net, params, given, train)[0])
        if jnp.shape(extra) != ():
            raise LayerError("a penalty that is one number", show(extra), "sum it")
        return loss + extra, (state, {**metrics, "penalty": metrics.get("penalty", 0) + extra})

    return total


def _sum(f: Callable[[jax.Array], jax.Array], params: Params, patterns: tuple[str, ...]) -> Any:
    if is_number(params):
        raise LayerError("params of a net", show(params),
                         "write lambda params: rate * dp.l2(params) for a penalty with a rate")
    leaves = tree.select(params, *(patterns or ("**/kernel",))).values()
    return sum(f(w.astype(joint(w.dtype, jnp.float32))).sum() for w in leaves)
