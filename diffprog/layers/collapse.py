"""Collapsing: one vector out of a sequence of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_features, check_leaves
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import cleared, over_steps, refuse_segments
from diffprog.core.notation import listed, show
from diffprog.core.parameters import Initializer, parameter
from diffprog.core.plans import Params, State
from diffprog.layers.spatial.pool import maximum, mean
from diffprog.layers.spatial.window import cannot_stream, takes

__all__ = ["collapse"]


@factory
def collapse(method: str, *, kernel_init: Initializer = "lecun_normal") -> Layer:
    """One vector out of a sequence: ``y = sum_t w[t] * x[t]``, or the largest of each feature.

    The weights w are 1 for the first or the last step and 0 elsewhere; equal for the mean; and for
    attention ``w = softmax(x @ kernel)`` over time, which is learned. Only real steps count: the
    first is the first real one. Of equal largest values the first has the gradient. Sums are taken
    in float32 or wider.

    Shapes:
        x: (..., time, D) -> (..., D), in the dtype of x.
        params: for attention ``kernel`` (D, 1); else none.
        mask: booleans of the leading axes of x; a row without a real step gives exactly 0, and has
            no gradient.

    Args:
        method: "first", "last", "mean", "max" or "attention".
        kernel_init: initializer, for attention.

    Raises:
        LayerError: at composition, for another word; x has no two axes or no steps, or holds no
            floats for a mean or attention; segments; in ``start``, because it sees the whole
            sequence.

    Example:
        >>> x = jnp.arange(6.0).reshape(1, 3, 2)
        >>> mask = jnp.array([[True, True, False]])
        >>> methods = ("first", "last", "mean")
        >>> [dp.collapse(method)({}, x, mask=mask)[0].tolist() for method in methods]
        [[0.0, 1.0], [2.0, 3.0], [1.0, 2.0]]

    Source: attention: Raffel and Ellis 2015, arXiv:1512.08756, section 1.2, with a linear score.
    """
    if not isinstance(method, str) or method not in {*_FIXED, "attention"}:
        raise LayerError(f"method out of {listed({*_FIXED, 'attention'})}", show(method),
                         "write collapse('mean'), for example")
    learned = method == "attention"

    def check(x: Any) -> None:
        check_array(x, rank=2, axes="(..., time, features)", floating=learned or method == "mean")
        if x.shape[-2] == 0:
            raise LayerError("at least one step", show(x), "pad the sequence, with a mask")

    def init(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        check(x)
        if not learned:
            return {}, {}
        return {"kernel": parameter(key, "kernel", kernel_init, (x.shape[-1], 1), x)}, {}

    def apply(
        params: Params, state: State, x: jax.Array, *, mask: jax.Array | None = None,
        segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, State]:
        refuse_segments(segments)
        check(x)
        real = over_steps(mask, x)
        if not learned:
            return _FIXED[method](x, real), state
        check_features(params["kernel"].shape[0], x)
        check_leaves(params, 1)
        return _attended(params["kernel"], x, real), state

    return Layer(init, apply, cannot_stream, bare=not learned, side=takes(1), casts=True)


def _first(x: jax.Array, real: jax.Array | None) -> jax.Array:
    # `argmax` finds the first True, and the first step where there is none, which is cleared to 0
    return x[..., 0, :] if real is None else _at(x, real, jnp.argmax(real, axis=-1))


def _last(x: jax.Array, real: jax.Array | None) -> jax.Array:
    if real is None:
        return x[..., -1, :]
    return _at(x, real, x.shape[-2] - 1 - jnp.argmax(jnp.flip(real, -1), axis=-1))


def _at(x: jax.Array, real: jax.Array, step: jax.Array) -> jax.Array:
    x = cleared(x, real)
    return jnp.take_along_axis(x, step[..., None, None], axis=-2, mode="clip")[..., 0, :]


def _mean(x: jax.Array, real: jax.Array | None) -> jax.Array:
    return mean(x, -2, None if real is None else real[..., None])


def _max(x: jax.Array, real: jax.Array | None) -> jax.Array:
    return maximum(x, -2, None if real is None else real[..., None])


def _attended(kernel: jax.Array, x: jax.Array, real: jax.Array | None) -> jax.Array:
    x = cleared(x, real)
    wide = joint(x.dtype, jnp.float32)
    scores = (x @ kernel.astype(x.dtype))[..., 0].astype(wide)
    if real is not None:
        # A row without real steps, all cleared, is averaged: 0, where softmax would give NaN.
        counts = real | ~jnp.any(real, axis=-1, keepdims=True)
        scores = jnp.where(counts, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("...t,...td->...d", weights.astype(x.dtype), x,
                      preferred_element_type=wide).astype(x.dtype)


_FIXED: dict[str, Callable[[jax.Array, jax.Array | None], jax.Array]] = {
    "first": _first, "last": _last, "mean": _mean, "max": _max,
}
