"""Layers that change the shape or the notation and compute nothing."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, stateless
from diffprog.core.masks import refuse_segments
from diffprog.core.meshes import reshaped
from diffprog.core.notation import show
from diffprog.core.parameters import parameter_dtype
from diffprog.layers.spatial.window import cannot_stream

__all__ = ["flatten", "one_hot", "reshape"]


@factory
def flatten(*, keep: int = 1) -> Layer:
    """Join all axes but the first ones: ``y = x.reshape(*x.shape[:keep], -1)``.

    Shapes:
        x: (K..., A...) -> (K..., prod(A)) with `keep` axes K.

    Args:
        keep: how many leading axes stay; at least 0. With 2, batch and time, it can stream.

    Raises:
        LayerError: x has fewer than `keep` axes; segments, unless time is kept.

    Example:
        >>> dp.flatten()({}, jnp.ones((2, 3, 4))).shape
        (2, 12)
    """
    return _reshaped((-1,), keep)


@factory
def reshape(shape: int | tuple[int, ...], *, keep: int = 1) -> Layer:
    """Give all axes but the first ones another shape: ``y = x.reshape(*x.shape[:keep], *shape)``.

    Shapes:
        x: (K..., A...) -> (K..., *shape) with `keep` axes K, in row-major order.

    Args:
        shape: the new axes, positive ints of which one may be -1, which is what is left; an int is
            a tuple of one.
        keep: how many leading axes stay; at least 0. With 2, batch and time, it can stream.

    Raises:
        LayerError: at ``init``, if x has fewer than `keep` axes or not as many entries as `shape`;
            segments, unless time is kept.

    Example:
        >>> dp.reshape((2, -1))({}, jnp.ones((5, 12))).shape
        (5, 2, 6)
    """
    sizes = (shape,) if isinstance(shape, int) else shape
    good = isinstance(sizes, tuple) and all(type(n) is int and (n > 0 or n == -1) for n in sizes)
    if not good or sizes.count(-1) > 1:
        raise LayerError("a shape of positive ints, at most one of them -1", repr(shape),
                         "pass (4, -1), for example")
    return _reshaped(sizes, keep)


def _reshaped(sizes: tuple[int, ...], keep: int) -> Layer:
    check_count("keep", keep, least=0)
    known = math.prod(size for size in sizes if size != -1)

    def apply(
        params: Any, state: Any, x: jax.Array, *, segments: Any = None, **_: Any
    ) -> tuple[jax.Array, Any]:
        refuse_segments(segments)
        check_array(x, rank=keep, floating=False)
        total = math.prod(x.shape[keep:])
        left = total // known  # not left to JAX, which cannot tell it where a batch is empty
        shape = tuple(left if size == -1 else size for size in sizes)
        if math.prod(shape) != total:
            wants = f"a multiple of {known}" if -1 in sizes else f"{known}"
            raise LayerError(f"{wants} entries after keep={keep} axes, for {sizes}",
                             f"{total} in {show(x)}", "choose a shape of as many entries")
        return reshaped(x, keep, *shape), state

    if keep >= 2:  # the first two axes are batch and time, which stay
        return Layer(lambda key, x: ({}, {}), apply, bare=True)
    return Layer(lambda key, x, **_: ({}, {}), apply, cannot_stream, bare=True,
                 side=frozenset({"segments"}))


@factory
def one_hot(classes: int) -> Layer:
    """Write each class as a unit vector: ``y[..., k] = 1 if x == k else 0``.

    Shapes:
        x: (...), ints in [0, classes) -> (..., classes), float32. Other ints give a row of NaN,
        because nothing can be raised under `jax.jit`.

    Args:
        classes: how many there are; positive.

    Raises:
        LayerError: x holds no ints.

    Example:
        >>> dp.one_hot(3)({}, jnp.array([2, 0])).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    check_count("classes", classes)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        check_array(x, floating=False)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise LayerError("integer input", show(x), "convert it: x.astype(jnp.int32)")
        labels = jnp.arange(classes, dtype=joint(x.dtype, jnp.int32))
        hot = x[..., None].astype(labels.dtype) == jax.lax.broadcast_to_rank(labels, x.ndim + 1)
        return jnp.where(hot.any(-1, keepdims=True), hot.astype(parameter_dtype(x)), jnp.nan)

    return stateless(None, forward, name="one_hot", casts=True)
