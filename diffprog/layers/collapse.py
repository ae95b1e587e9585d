"""Pooling over time: a sequence of vectors becomes one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_features, check_leaves
from diffprog.core.dtypes import wide_dtype
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
    """Pool over time: ``y = sum_t w[t] * x[t]``, or the maximum of each feature.

    The weights w select the first or the last step, or are equal for the mean. For attention they
    are learned: ``w = softmax(x @ kernel)`` over time. Masked steps are ignored, so "first" is the
    first valid step. The gradient of a tied maximum goes to the first of the equal values. Sums are
    taken in float32 or wider.

    Shapes:
        x: (..., time, D) -> (..., D), in the dtype of x.
        params: ``kernel`` (D, 1) for attention; otherwise none.
        mask: booleans with the leading axes of x, True = valid; a row without a valid step returns
            exactly 0 and has no gradient.

    Args:
        method: "first", "last", "mean", "max" or "attention".
        kernel_init: initializer, for attention.

    Raises:
        LayerError: at composition, for an unknown method; x has fewer than two axes or no steps, or
            is not floating-point for a mean or attention; segments; in ``start``, because pooling
            needs the whole sequence.

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
        valid = over_steps(mask, x)  # (..., time)
        if not learned:
            return _FIXED[method](x, valid), state
        check_features(params["kernel"].shape[0], x)
        check_leaves(params, 1)
        return _attention(params["kernel"], x, valid), state

    return Layer(init, apply, cannot_stream, bare=not learned, side=takes(1), casts=True)


def _first(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    if valid is None:
        return x[..., 0, :]
    # A row without a valid step selects step 0, which `_step` sets to 0.
    return _step(x, valid, jnp.argmax(valid, axis=-1))


def _last(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    if valid is None:
        return x[..., -1, :]
    return _step(x, valid, x.shape[-2] - 1 - jnp.argmax(jnp.flip(valid, -1), axis=-1))


def _step(x: jax.Array, valid: jax.Array, index: jax.Array) -> jax.Array:
    x = cleared(x, valid)
    return jnp.take_along_axis(x, index[..., None, None], axis=-2, mode="clip")[..., 0, :]


def _mean(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    return mean(x, -2, None if valid is None else valid[..., None])


def _max(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    return maximum(x, -2, None if valid is None else valid[..., None])


def _attention(kernel: jax.Array, x: jax.Array, valid: jax.Array | None) -> jax.Array:
    x = cleared(x, valid)
    wide = wide_dtype(x)
    scores = (x @ kernel.astype(x.dtype))[..., 0].astype(wide)  # (..., time)
    if valid is not None:
        # Softmax of -inf alone is NaN. A row without valid steps, which is all zeros, is averaged.
        attended = valid | ~jnp.any(valid, axis=-1, keepdims=True)
        scores = jnp.where(attended, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # (..., time)
    y = jnp.einsum("...t,...td->...d", weights.astype(x.dtype), x, preferred_element_type=wide)
    return y.astype(x.dtype)  # (..., D)


_FIXED: dict[str, Callable[[jax.Array, jax.Array | None], jax.Array]] = {
    "first": _first, "last": _last, "mean": _mean, "max": _max,
}
