"""Dropout of values, of channels, and of whole examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_fraction
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.meshes import beside
from diffprog.core.plans import Params, State
from diffprog.layers.spatial.window import AXES

__all__ = ["dropout", "spatial_dropout", "stochastic_depth"]


@factory
def dropout(rate: float) -> Layer:
    """Dropout during training: ``y = x * kept / (1 - rate)``; ``y = x`` at inference.

    ``kept`` is 1 with probability 1 - rate, independently for each value, and else 0, so that the
    expectation of y is x. Inference needs no key.

    Shapes:
        x: any -> the same.

    Args:
        rate: the fraction dropped, in [0, 1).

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
    return _dropping(rate, lambda x: x.shape)


@factory
def spatial_dropout(rate: float, *, dims: int = 2) -> Layer:
    """Drop whole channels in training: ``y = x * kept / (1 - rate)``; ``y = x`` in inference.

    Each channel of an example is kept or dropped at all of its positions together. Neighbouring
    values are correlated, so dropping them independently would remove little information.

    Shapes:
        x: (..., S..., C) with `dims` axes S -> the same.

    Args:
        rate: the fraction dropped, in [0, 1).
        dims: number of spatial or time axes before the channels; at least 1.

    Raises:
        LayerError: rate is outside [0, 1); ``train=True`` without a key; x has fewer than dims + 1
            axes.

    Example:
        >>> net, x = dp.spatial_dropout(0.5), jnp.ones((1, 2, 2, 100))
        >>> y, _ = net.apply({}, {}, x, key=jax.random.key(0), train=True)
        >>> sorted(set(y.sum((0, 1, 2)).tolist()))
        [0.0, 8.0]

    Source: Tompson et al. 2015, arXiv:1411.4280, section 3.2.
    """
    check_count("dims", dims)

    def per_channel(x: jax.Array) -> tuple[int, ...]:
        check_array(x, rank=dims + 1, axes=AXES.get(dims, ""))
        batch, channels = x.shape[: -dims - 1], x.shape[-1]
        return (*batch, *(1,) * dims, channels)

    return _dropping(rate, per_channel)


@factory
def stochastic_depth(rate: float) -> Layer:
    """Drop whole examples in training: ``y = x * kept / (1 - rate)``; ``y = x`` in inference.

    It is the last layer of a residual body, ``residual(serial(body, stochastic_depth(0.1)))``, so
    that a dropped example skips the block. The paper makes one decision for the whole batch and
    scales in inference. Here each example has its own decision, and scaling is done in training.

    Shapes:
        x: (examples, ...) -> the same.

    Args:
        rate: the fraction of examples dropped, in [0, 1).

    Raises:
        LayerError: rate is outside [0, 1); ``train=True`` without a key; x is a scalar.

    Example:
        >>> net = dp.stochastic_depth(0.5)
        >>> y, _ = net.apply({}, {}, jnp.ones((100, 3)), key=jax.random.key(0), train=True)
        >>> sorted(set(y.sum(-1).tolist()))
        [0.0, 6.0]

    Source: Huang, Sun, Liu, Sedra, Weinberger 2016, arXiv:1603.09382, eq. 2 and 5.
    """

    def per_example(x: jax.Array) -> tuple[int, ...]:
        check_array(x, rank=1, axes="(examples, ...)")
        return (x.shape[0], *(1,) * (x.ndim - 1))

    return _dropping(rate, per_example)


def _dropping(rate: float, mask_shape: Callable[[jax.Array], tuple[int, ...]]) -> Layer:
    """Drop entries of x by a random mask of shape ``mask_shape(x)``, which broadcasts to x."""
    check_fraction("rate", rate)

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        check_array(x)
        shape = mask_shape(x)
        if not train or rate == 0:
            return x, state
        kept = beside(jax.random.bernoulli(key, 1 - rate, shape), x)
        return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x)), state

    return Layer(lambda key, x: ({}, {}), apply, bare=True, random=rate > 0)
