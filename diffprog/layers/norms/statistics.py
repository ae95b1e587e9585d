"""Shared by the norms: mean and variance, division by the standard deviation, scale and shift.

All statistics are taken in float32 or wider, because bfloat16 loses small variances: the functions
get x in the dtype of the parameters.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_features
from diffprog.core.dtypes import along
from diffprog.core.errors import LayerError
from diffprog.core.parameters import Initializer, parameter
from diffprog.core.plans import Params


def check_eps(eps: Any) -> None:
    """Raise unless eps is a positive float."""
    if not isinstance(eps, float) or eps <= 0:
        raise LayerError("eps as a positive float", repr(eps), "pass 1e-5, for example")


def check_width(leaves: Params, x: Any) -> None:
    """Raise unless all leaves have the features of x: a single feature would be broadcast."""
    for leaf in leaves.values():
        check_features(leaf.shape[-1], x)


def inits_of(
    scale: bool, scale_init: Initializer, bias: bool, bias_init: Initializer
) -> dict[str, Initializer]:
    """The initializers of scale and bias, unless they are left out."""
    inits = {"scale": scale_init} if scale else {}
    if bias:
        inits["bias"] = bias_init
    return inits


def draw_scale_and_bias(key: jax.Array, x: Any, inits: dict[str, Initializer]) -> Params:
    """The parameters with these initializers, each with one entry per feature."""
    check_array(x, rank=1, axes="(..., features)")
    return {name: parameter(key, name, init, x.shape[-1:], x) for name, init in inits.items()}


def scale_and_shift(params: Params, y: jax.Array) -> jax.Array:
    """``y * scale + bias``, both optional."""
    if "scale" in params:
        y = y * along(params["scale"], y)
    if "bias" in params:
        y = y + along(params["bias"], y)
    return y


def tamed(x: jax.Array, axes: int | tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """``x * factor`` and the factor, which keeps squares from overflow.

    The factor is 1 if all |x| along the axes are at most 2**16, otherwise a smaller power of two,
    so that nothing is rounded; it has no gradient. An eps that is added to squares of the result
    must be `scaled`.
    """
    largest = jnp.abs(jax.lax.stop_gradient(x)).max(axes, keepdims=True, initial=0)
    exponents = jnp.finfo(x.dtype).nexp
    power = jax.lax.reduce_precision(largest / 2, exponents, 0)  # halves never round to infinity
    factor = 2.0**15 / jnp.maximum(power, 2.0**15)
    return x * factor, factor


def scaled(eps: float, factor: jax.Array) -> jax.Array:
    """``eps * factor**2``; at least the smallest normal number, since it may be the divisor."""
    return jnp.maximum(eps * factor * factor, jnp.finfo(factor.dtype).tiny)


def normalized(
    params: Params, x: jax.Array, square: jax.Array, eps: float | jax.Array
) -> jax.Array:
    """``scale * x / sqrt(square + eps) + bias``; square is the variance or mean square of x."""
    factor = jax.lax.rsqrt(square + eps)
    if "scale" in params:
        factor = factor * along(params["scale"], factor)  # so that x has a single product
    y = x * jax.lax.broadcast_to_rank(factor, x.ndim)
    return y + along(params["bias"], y) if "bias" in params else y


def mean_square(
    x: jax.Array, axes: int | tuple[int, ...], *, keepdims: bool = True,
    valid: jax.Array | None = None,
) -> jax.Array:
    """The mean of squares over the valid entries: the variance, if x is centered.

    The square comes before the mean: XLA compiles this order to half the program.
    """
    return jnp.square(x).mean(axes, keepdims=keepdims, where=valid)


def valid_entries(valid: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The valid entries; all entries, if none along the axes is valid.

    These are zeros then, with finite statistics, while the mean of no entries is NaN.
    """
    return valid | ~valid.any(axes, keepdims=True)


# `standardized` has its own derivative, because that of JAX compiles to twice the program. It is
# linear in the tangent, so that it works in all modes and orders. As in `mean_square`, the product
# comes before the mean.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _standardized(x: jax.Array, eps: float) -> jax.Array:
    """``(x - mean) / sqrt(var + eps)`` of each vector along the last axis."""
    return _with_inverse(x, eps)[0]


@_standardized.defjvp
def _tangent(eps: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """``dy = (dx - mean(dx) - y * mean(dx * y)) / sqrt(var + eps)``."""
    (x,), (dx,) = primals, tangents
    y, inverse = _with_inverse(x, eps)
    shared = (dx * y).mean(-1, keepdims=True)
    return y, inverse * (dx - dx.mean(-1, keepdims=True) - y * shared)


def _with_inverse(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The standardized x, and the inverse of its standard deviation."""
    x, factor = tamed(x, -1)
    centered = x - x.mean(-1, keepdims=True)
    var = mean_square(centered, -1)  # (..., 1)
    inverse = jax.lax.rsqrt(var + scaled(eps, factor))
    return centered * inverse, inverse * factor


standardized = jax.jit(_standardized, static_argnums=1)  # traced once for all norms of one shape
