"""Normalization: subtract a mean, divide by a standard deviation, scale and shift.

What differs is over which axes mean and variance are taken, and whether they are remembered.
All statistics are taken in float32 or wider, because bfloat16 loses small variances.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.errors import LayerError, check_array, check_features, check_share
from diffprog.layer import Layer, Params, State, factory, stateless
from diffprog.notation import show
from diffprog.parameters import parameter

__all__ = ["batch_norm", "layer_norm"]

_ONES, _ZEROS = jax.nn.initializers.ones, jax.nn.initializers.zeros


@factory
def layer_norm(
    *, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Any = _ONES, bias_init: Any = _ZEROS,
) -> Layer:
    """Standardize the last axis: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    Mean and variance (biased, divisor D) are those of each vector along the last axis.

    Shapes:
        x: (..., D) -> (..., D), in the dtype of x.
        params: ``scale`` (D,), ones; ``bias`` (D,), zeros.

    Args:
        eps: added to the variance, in squared units of x; positive.
        scale: False leaves the factor out.
        bias: False leaves the shift out.
        scale_init, bias_init: initializers.

    Raises:
        LayerError: x is no floating-point array of at least one axis, or has another number of
            features than `init` saw.

    Example:
        >>> norm, x = dp.layer_norm(), jnp.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> norm(params, x)[1].tolist()
        [0.0, 0.0, 0.0]

    Source: Ba, Kiros, Hinton 2016, arXiv:1607.06450, eq. 3 and 4.
    """
    _check_eps(eps)

    def init(key: jax.Array, x: Any) -> Params:
        return _affine(key, x, scale and scale_init, bias and bias_init)

    def forward(params: Params, x: jax.Array) -> jax.Array:
        check_array(x, rank=1, axes="(..., features)")
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = wide.mean(-1, keepdims=True)
        centered = wide - mean
        var = jnp.square(centered).mean(-1, keepdims=True)
        return _transformed(params, centered, var, eps).astype(x.dtype)

    return stateless(init, forward, name="layer_norm")


@factory
def batch_norm(
    *, momentum: float = 0.9, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Any = _ONES, bias_init: Any = _ZEROS,
) -> Layer:
    """Standardize each channel: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    With ``train=True`` mean and variance (biased, divisor n) are those of the batch, over all axes
    but the last, and the running statistics move: ``running = momentum * running + (1 - momentum) *
    batch``, with the unbiased variance (divisor n - 1). Otherwise the running statistics are used,
    so that examples do not mix.

    Shapes:
        x: (..., C) -> (..., C), in the dtype of x.
        params: ``scale`` (C,), ones; ``bias`` (C,), zeros.
        state: ``mean`` (C,), zeros; ``var`` (C,), ones.

    Args:
        momentum: the share of the running statistics that is kept, in [0, 1).
        eps: added to the variance, in squared units of x; positive.
        scale: False leaves the factor out.
        bias: False leaves the shift out.
        scale_init, bias_init: initializers.

    Raises:
        LayerError: training with one value per channel, whose variance is undefined; no state; x of
            another number of channels than `init` saw.

    Example:
        >>> norm, x = dp.batch_norm(), jnp.array([[1.0], [3.0]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> y, state = norm.apply(params, state, x, train=True)
        >>> [round(float(v[0]), 3) for v in (y[0], state["mean"], state["var"])]
        [-1.0, 0.2, 1.1]

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2.
    """
    _check_eps(eps)
    check_share("momentum", momentum)

    def init(key: jax.Array, x: Any) -> tuple[Params, State]:
        params = _affine(key, x, scale and scale_init, bias and bias_init)
        shape = x.shape[-1:]
        return params, {
            "mean": parameter(key, "mean", _ZEROS, shape, x),
            "var": parameter(key, "var", _ONES, shape, x),
        }

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=1, axes="(..., features)")
        for leaf in state.values():
            check_features(leaf.shape[-1], x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not train:
            y = _transformed(params, wide - state["mean"], state["var"], eps)
            return y.astype(x.dtype), state
        n = x.size // x.shape[-1]
        if n < 2:
            raise LayerError("several values per channel in training", show(x),
                             "a variance needs two: take a larger batch")
        axes = tuple(range(x.ndim - 1))
        mean = wide.mean(axes)
        centered = wide - mean
        var = jnp.square(centered).mean(axes)
        y = _transformed(params, centered, var, eps).astype(x.dtype)
        batch = jax.lax.stop_gradient({"mean": mean, "var": var * (n / (n - 1))})
        move = lambda old, new: (momentum * old + (1 - momentum) * new).astype(old.dtype)  # noqa: E731
        return y, jax.tree.map(move, state, batch)

    return Layer(init, apply)


def _check_eps(eps: Any) -> None:
    if not isinstance(eps, float) or eps <= 0:
        raise LayerError("eps, a positive float", repr(eps), "for example 1e-5")


def _affine(key: jax.Array, x: Any, scale_init: Any, bias_init: Any) -> Params:
    """``scale`` and ``bias``, one of each per feature; False leaves one out."""
    check_array(x, rank=1, axes="(..., features)")
    inits = {"scale": scale_init, "bias": bias_init}
    return {
        name: parameter(key, name, init, x.shape[-1:], x) for name, init in inits.items() if init
    }


def _transformed(params: Params, centered: jax.Array, var: jax.Array, eps: float) -> jax.Array:
    """Divide by the standard deviation, then scale and shift."""
    for leaf in params.values():
        check_features(leaf.shape[-1], centered)  # a single feature would broadcast silently
    factor = jax.lax.rsqrt(var + eps)
    if "scale" in params:
        factor = factor * params["scale"]
    y = centered * factor
    return y + params["bias"] if "bias" in params else y
