"""Layers that change the shape of an array, and one-hot encoding."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_ints
from diffprog.core.dtypes import joint, wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, stateless
from diffprog.core.masks import refuse_segments
from diffprog.core.meshes import reshaped
from diffprog.core.notation import show
from diffprog.layers.spatial.window import cannot_stream

__all__ = ["flatten", "one_hot", "reshape"]


@factory
def flatten(*, keep: int = 1) -> Layer:
    """Flatten all axes after the first `keep`: ``y = x.reshape(*x.shape[:keep], -1)``.

    Shapes:
        x: (leading..., A...) -> (leading..., prod(A)), with `keep` leading axes.

    Args:
        keep: number of leading axes to keep; at least 0. With keep=2 (batch, time) it can stream.

    Raises:
        LayerError: x has fewer than `keep` axes; segments are given and keep < 2.

    Example:
        >>> dp.flatten()({}, jnp.ones((2, 3, 4))).shape
        (2, 12)
    """
    return _reshaped((-1,), keep)


@factory
def reshape(shape: int | tuple[int, ...], *, keep: int = 1) -> Layer:
    """Reshape all axes but the first: ``y = x.reshape(*x.shape[:keep], *shape)``.

    Shapes:
        x: (K..., A...) -> (K..., *shape) with `keep` axes K, in row-major order.

    Args:
        shape: the new axes, positive ints; one may be -1, which is inferred from the others. An int
            is a tuple of one.
        keep: number of leading axes to keep; at least 0. With 2 (batch, time) the layer can stream.

    Raises:
        LayerError: at ``init``, if x has fewer than `keep` axes or its number of entries does not
            match `shape`; segments with `keep` below 2.

    Example:
        >>> dp.reshape((2, -1))({}, jnp.ones((5, 12))).shape
        (5, 2, 6)
    """
    sizes = (shape,) if isinstance(shape, int) else shape
    valid = isinstance(sizes, tuple) and all(type(n) is int and (n > 0 or n == -1) for n in sizes)
    if not valid or sizes.count(-1) > 1:
        raise LayerError("a shape of positive ints, at most one of them -1", repr(shape),
                         "pass (4, -1), for example")
    return _reshaped(sizes, keep)


def _reshaped(sizes: tuple[int, ...], keep: int) -> Layer:
    """The layer of `flatten` and `reshape`."""
    check_count("keep", keep, least=0)
    known = math.prod(size for size in sizes if size != -1)

    def apply(
        params: Any, state: Any, x: jax.Array, *, segments: Any = None, **_: Any
    ) -> tuple[jax.Array, Any]:
        refuse_segments(segments)
        check_array(x, rank=keep, floating=False)
        total = math.prod(x.shape[keep:])
        inferred = total // known  # JAX cannot infer it for an empty batch
        shape = tuple(inferred if size == -1 else size for size in sizes)
        if math.prod(shape) != total:
            wants = f"a multiple of {known}" if -1 in sizes else f"{known}"
            raise LayerError(f"{wants} entries after keep={keep} axes, for {sizes}",
                             f"{total} in {show(x)}", "choose a shape with as many entries")
        return reshaped(x, keep, *shape), state

    if keep >= 2:  # the time axis is kept
        return Layer(lambda key, x: ({}, {}), apply, bare=True)
    return Layer(lambda key, x, **_: ({}, {}), apply, cannot_stream, bare=True,
                 side=frozenset({"segments"}))


@factory
def one_hot(classes: int) -> Layer:
    """One-hot encoding of classes: ``y[..., k] = 1 if x == k else 0``.

    Shapes:
        x: (...), ints in [0, classes) -> (..., classes), float32. Any other int returns a row of
        NaN, because an error cannot be raised under `jax.jit`.

    Args:
        classes: number of classes; positive.

    Raises:
        LayerError: x is not an array of ints.

    Example:
        >>> dp.one_hot(3)({}, jnp.array([2, 0])).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    check_count("classes", classes)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        check_array(x, floating=False)
        check_ints("labels", x)
        indices = jnp.arange(classes, dtype=joint(x.dtype, jnp.int32))  # (classes,)
        labels = x[..., None].astype(indices.dtype)  # (..., 1)
        hot = labels == jax.lax.broadcast_to_rank(indices, x.ndim + 1)  # (..., classes)
        in_range = hot.any(-1, keepdims=True)  # (..., 1)
        return jnp.where(in_range, hot.astype(wide_dtype(x)), jnp.nan)

    return stateless(None, forward, name="one_hot", casts=True)
