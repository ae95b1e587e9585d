"""What the norms share: the division by a standard deviation, scale and shift.

All statistics are taken in float32 or wider, because bfloat16 loses small variances: x comes here
in the dtype of parameters.
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
    """Raise unless all have the features of x: a single feature would broadcast silently."""
    for leaf in leaves.values():
        check_features(leaf.shape[-1], x)


def inits_of(
    scale: bool, scale_init: Initializer, bias: bool, bias_init: Initializer
) -> dict[str, Initializer]:
    """The initializers of what is not left out."""
    inits = {"scale": scale_init} if scale else {}
    if bias:
        inits["bias"] = bias_init
    return inits


def draw_scale_and_bias(key: jax.Array, x: Any, inits: dict[str, Initializer]) -> Params:
    """What is named, one of each per feature."""
    check_array(x, rank=1, axes="(..., features)")
    return {name: parameter(key, name, init, x.shape[-1:], x) for name, init in inits.items()}


def scale_and_shift(params: Params, y: jax.Array) -> jax.Array:
    """``y * scale + bias``, each if it is there."""
    y = y * along(params["scale"], y) if "scale" in params else y
    return y + along(params["bias"], y) if "bias" in params else y


def tamed(x: jax.Array, axes: int | tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """``x * factor``, whose squares are far from overflow, and the factor.

    It is 1 where no |x| along the axes is above 2**16, and a power of two below 1 elsewhere, which
    costs no bit; a constant to the gradient. An eps beside the squares of x is `scaled` likewise.
    """
    largest = jnp.abs(jax.lax.stop_gradient(x)).max(axes, keepdims=True, initial=0)
    exponents = jnp.finfo(x.dtype).nexp
    power = jax.lax.reduce_precision(largest / 2, exponents, 0)  # the half never rounds to infinity
    factor = 2.0**15 / jnp.maximum(power, 2.0**15)
    return x * factor, factor


def scaled(eps: float, factor: jax.Array) -> jax.Array:
    """``eps * factor**2``; never 0, by which equal numbers, without their mean, were divided."""
    return jnp.maximum(eps * factor * factor, jnp.finfo(factor.dtype).tiny)


def normalized(
    params: Params, x: jax.Array, square: jax.Array, eps: float | jax.Array
) -> jax.Array:
    """x divided by the root of `square`, its variance or mean square; then scale and shift."""
    factor = jax.lax.rsqrt(square + eps)
    if "scale" in params:
        factor = factor * along(params["scale"], factor)  # one product with x, the larger array
    y = x * jax.lax.broadcast_to_rank(factor, x.ndim)
    return y + along(params["bias"], y) if "bias" in params else y


def mean_square(
    x: jax.Array, axes: int | tuple[int, ...], *, keepdims: bool = True,
    real: jax.Array | None = None,
) -> jax.Array:
    """The mean of squares, which is the variance if x has no mean; of the real entries, if given.

    Squares come before the mean: XLA compiles this order into half the program.
    """
    return jnp.square(x).mean(axes, keepdims=keepdims, where=real)


def real_entries(real: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The entries that count: the real ones; where none along the axes is real, all.

    All were cleared then: statistics of zeros are finite, where those of nothing are NaN.
    """
    return real | ~real.any(axes, keepdims=True)


# `standardized` has a derivative of its own, because XLA makes twice the program of the one that
# JAX finds. This one is linear in the tangent, so that it serves all modes and orders; the product
# comes before its mean here too.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _standardized(x: jax.Array, eps: float) -> jax.Array:
    """Each vector along the last axis without its mean, divided by its standard deviation."""
    return _with_inverse(x, eps)[0]


@_standardized.defjvp
def _tangent(eps: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """``dy = (dx - mean(dx) - y * mean(dx * y)) / sqrt(var + eps)``."""
    (x,), (dx,) = primals, tangents
    y, inverse = _with_inverse(x, eps)
    shared = (dx * y).mean(-1, keepdims=True)
    return y, inverse * (dx - dx.mean(-1, keepdims=True) - y * shared)


def _with_inverse(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The standardized x, and one over the standard deviation."""
    x, factor = tamed(x, -1)
    centered = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(mean_square(centered, -1) + scaled(eps, factor))
    return centered * inverse, inverse * factor


standardized = jax.jit(_standardized, static_argnums=1)  # traced once for all norms of one shape
