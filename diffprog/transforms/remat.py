"""Rematerialization: activations are recomputed in the backward pass instead of being stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, around, as_layer
from diffprog.core.loops import once
from diffprog.core.notation import listed
from diffprog.core.plans import Params, State

__all__ = ["remat"]

Policy = str | Callable[..., bool]

# The policies of `jax.checkpoint_policies` that need no arguments.
_POLICIES = ("everything_saveable", "nothing_saveable", "dots_saveable",
             "dots_with_no_batch_dims_saveable")


@factory
def remat(layer: Any, *, policy: Policy = "nothing_saveable") -> Layer:
    """Recompute activations in the backward pass: ``y = f(x)``, with less memory.

    The kind and the names of the layer stay, so that adding it renames no parameter.

    Args:
        layer: any layer.
        policy: what is stored nevertheless, a name from `jax.checkpoint_policies`:
            "nothing_saveable" (least memory), "dots_saveable" (the results of matrix products),
            "dots_with_no_batch_dims_saveable" (of products with weights, but not of attention) or
            "everything_saveable" (no recomputation); or a policy itself.

    Raises:
        LayerError: at composition, for an unknown policy.

    Example:
        >>> net = dp.repeat(12, dp.remat(dp.residual(dp.linear(4)), policy="dots_saveable"))
        >>> net.plan(jnp.ones((2, 4))).y.shape
        (2, 4)

    Source: Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174.
    """
    layer = as_layer(layer)
    if not callable(policy) and policy not in _POLICIES:
        raise LayerError(f"policy out of {listed(_POLICIES)}", repr(policy),
                         "choose one of them, or pass one of jax.checkpoint_policies itself")
    keep = getattr(jax.checkpoint_policies, policy) if isinstance(policy, str) else policy

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        def run(params: Params, state: State, x: Any, key: Any, side: dict[str, Any]) -> Any:
            return layer.apply(params, state, x, key=key, train=train, **side)

        return jax.checkpoint(run, policy=keep)(params, state, x, key, side)

    return dataclasses.replace(
        layer, apply=once(apply, "train"), planner=lambda x, side: layer.plan(x, **side),
        **around(layer, lambda layer: remat(layer, policy=policy)),
    )
