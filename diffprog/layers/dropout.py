"""Noise that regularizes: parts of the input are left out at random in training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.errors import check_array, check_share
from diffprog.layer import Layer, Params, State, factory

__all__ = ["dropout"]


@factory
def dropout(rate: float) -> Layer:
    """Drop values at random in training: ``y = x * kept / (1 - rate)``; ``y = x`` otherwise.

    Each value is kept with probability 1 - rate, independently, and scaled up, so that the
    expectation of y is x. At rest nothing is dropped, and no key is needed.

    Shapes:
        x: any -> the same.

    Args:
        rate: the share that is dropped, in [0, 1).

    Raises:
        LayerError: rate is outside [0, 1); ``train=True`` without a key.

    Example:
        >>> net = dp.dropout(0.5)
        >>> net({}, jnp.ones(4)).tolist()
        [1.0, 1.0, 1.0, 1.0]
        >>> y, _ = net.apply({}, {}, jnp.ones(1000), key=jax.random.key(0), train=True)
        >>> sorted(set(y.tolist()))
        [0.0, 2.0]

    Source: Srivastava et al. 2014, JMLR 15, 1929-1958, section 4 (with the inverted scaling).
    """
    check_share("rate", rate)

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        check_array(x)
        if not train or rate == 0:
            return x, state
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x)), state

    return Layer(lambda key, x: ({}, {}), apply, bare=True, random=rate > 0)
