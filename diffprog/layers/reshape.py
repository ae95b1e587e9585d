"""Layers that change the shape and nothing else."""

from __future__ import annotations

import math
from typing import Any

import jax

from diffprog.errors import check_array, check_count
from diffprog.layer import Layer, factory
from diffprog.layers.window import cannot_stream

__all__ = ["flatten"]


@factory
def flatten(*, keep: int = 1) -> Layer:
    """Join all axes but the first ones: ``y = x.reshape(*x.shape[:keep], -1)``.

    Shapes:
        x: (K..., A...) -> (K..., prod(A)) with `keep` axes K.

    Args:
        keep: how many leading axes stay; at least 0.

    Raises:
        LayerError: x has fewer than `keep` axes.

    Example:
        >>> dp.flatten()({}, jnp.ones((2, 3, 4))).shape
        (2, 12)
    """
    check_count("keep", keep, least=0)

    def apply(params: Any, state: Any, x: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
        check_array(x, rank=keep, floating=False)
        return x.reshape(*x.shape[:keep], math.prod(x.shape[keep:])), state

    return Layer(lambda key, x: ({}, {}), apply, cannot_stream, bare=True)
