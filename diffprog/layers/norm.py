"""Normalization: subtract a mean, divide by a standard deviation, scale and shift.

What differs is over which axes mean and variance are taken, and whether they are remembered.
All statistics are taken in float32 or wider, because bfloat16 loses small variances. Here are the
layers that look at each example alone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.arguments import check_array, check_count, check_features
from diffprog.errors import LayerError
from diffprog.factories import factory
from diffprog.layer import Layer, stateless
from diffprog.layers.window import AXES, cannot_stream
from diffprog.masks import cleared, widened
from diffprog.notation import show
from diffprog.parameters import Initializer, parameter, parameter_dtype
from diffprog.plans import Params, State

__all__ = ["group_norm", "instance_norm", "layer_norm", "rms_norm"]


@factory
def layer_norm(
    *, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Initializer = "ones", bias_init: Initializer = "zeros",
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
    check_eps(eps)

    def init(key: jax.Array, x: Any) -> Params:
        return affine(key, x, scale and scale_init, bias and bias_init)

    def forward(params: Params, x: jax.Array) -> jax.Array:
        check_array(x, rank=1, axes="(..., features)")
        return scaled(params, standardized(x.astype(parameter_dtype(x)), eps)).astype(x.dtype)

    return stateless(init, forward, name="layer_norm")


@factory
def rms_norm(
    *, eps: float = 1e-5, scale: bool = True, scale_init: Initializer = "ones",
) -> Layer:
    """Divide by the root mean square of the last axis: ``y = scale * x / sqrt(mean(x^2) + eps)``.

    No mean is subtracted and nothing is added: the direction of each vector stays.

    Shapes:
        x: (..., D) -> (..., D), in the dtype of x.
        params: ``scale`` (D,), ones.

    Args:
        eps: added to the mean square, in squared units of x; positive.
        scale: False leaves the factor out.
        scale_init: initializer.

    Raises:
        LayerError: x is no floating-point array of at least one axis, or has another number of
            features than `init` saw.

    Example:
        >>> norm, x = dp.rms_norm(), jnp.array([[3.0, 4.0, 0.0, 0.0]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> [round(float(y), 3) for y in norm(params, x)[0]]
        [1.2, 1.6, 0.0, 0.0]

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    check_eps(eps)

    def init(key: jax.Array, x: Any) -> Params:
        return affine(key, x, scale and scale_init, False)

    def forward(params: Params, x: jax.Array) -> jax.Array:
        check_array(x, rank=1, axes="(..., features)")
        wide = x.astype(parameter_dtype(x))
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        return transformed(params, wide, mean_square, eps).astype(x.dtype)

    return stateless(init, forward, name="rms_norm")


@factory
def group_norm(
    groups: int, *, dims: int = 2, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Initializer = "ones", bias_init: Initializer = "zeros",
) -> Layer:
    """Standardize groups of channels: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    Mean and variance (biased) are those of one example and one group of neighbouring channels, over
    the last `dims` axes before the channels. Scale and bias belong to the channels.

    Shapes:
        x: (..., S..., C) -> (..., S..., C) with `dims` axes S, in the dtype of x.
        mask, if dims is 1: booleans (batch,) or (batch, time), True = real; the statistics are
            those of real positions, and y is 0 at the others.
        params: ``scale`` (C,), ones; ``bias`` (C,), zeros.

    Args:
        groups: how many groups; divides C.
        dims: axes of space or time, 0 to 3.
        eps: added to the variance, in squared units of x; positive.
        scale: False leaves the factor out.
        bias: False leaves the shift out.
        scale_init, bias_init: initializers.

    Raises:
        LayerError: x has fewer than dims + 1 axes, a number of channels that is no multiple of
            groups, or another than `init` saw; streaming, unless dims is 0.

    Example:
        >>> norm, x = dp.group_norm(2, dims=0), jnp.array([[1.0, 3.0, 5.0, 5.0]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> [round(float(y), 3) for y in norm(params, x)[0]]
        [-1.0, 1.0, 0.0, 0.0]

    Source: Wu and He 2018, arXiv:1803.08494, eq. 1, 2, 6 and 7.
    """
    check_count("groups", groups)
    check_count("dims", dims, least=0)
    return _grouped(groups, dims, eps, scale and scale_init, bias and bias_init)


@factory
def instance_norm(
    *, dims: int = 2, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Initializer = "ones", bias_init: Initializer = "zeros",
) -> Layer:
    """Standardize each channel alone: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    Mean and variance (biased) are those of one example and one channel, over the last `dims` axes
    before the channels: it is `group_norm` with one group per channel.

    Shapes:
        x: (..., S..., C) -> (..., S..., C) with `dims` axes S, in the dtype of x.
        mask, if dims is 1: booleans (batch,) or (batch, time), True = real; the statistics are
            those of real positions, and y is 0 at the others.
        params: ``scale`` (C,), ones; ``bias`` (C,), zeros.

    Args:
        dims: axes of space or time, 1 to 3.
        eps: added to the variance, in squared units of x; positive.
        scale: False leaves the factor out.
        bias: False leaves the shift out.
        scale_init, bias_init: initializers.

    Raises:
        LayerError: x has fewer than dims + 1 axes, or another number of channels than `init` saw;
            streaming.

    Example:
        >>> norm, x = dp.instance_norm(dims=1), jnp.array([[[1.0, 5.0], [3.0, 5.0]]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> [round(float(y), 3) for y in norm(params, x)[0, :, 0]]
        [-1.0, 1.0]

    Source: Ulyanov, Vedaldi, Lempitsky 2016, arXiv:1607.08022, eq. 4.
    """
    check_count("dims", dims)
    return _grouped(None, dims, eps, scale and scale_init, bias and bias_init)


def _grouped(groups: int | None, dims: int, eps: float, scale_init: Any, bias_init: Any) -> Layer:
    """Statistics of each example and group of channels; one group per channel if None."""
    check_eps(eps)
    if dims > 3:
        raise LayerError("dims of at most 3", f"{dims}", "leave the first axes to the batch")
    axes = (*range(-dims - 2, -2), -1)  # space, and the channels of a group, after splitting

    def init(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        return affine(key, x, scale_init, bias_init), {}

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=dims + 1, axes=AXES.get(dims, "(..., channels)"))
        for leaf in params.values():
            check_features(leaf.shape[-1], x)
        channels = x.shape[-1]
        count = groups or channels
        if channels % count:
            raise LayerError(f"channels in {groups} equal groups", f"{channels} in {show(x)}",
                             "choose groups that divide the channels")
        split = lambda a: a.reshape(*a.shape[:-1], count, channels // count)  # noqa: E731
        wide = split(cleared(x, mask).astype(parameter_dtype(x)))
        real = None if mask is None else real_entries(widened(mask, x.shape)[..., None], axes)
        _, centered, var = moments(wide, axes, keepdims=True, real=real)
        y = transformed(jax.tree.map(split, params), centered, var, eps)
        return cleared(y.reshape(x.shape).astype(x.dtype), mask), state

    side = frozenset({"mask"} if dims == 1 else ())
    return Layer(init, apply, cannot_stream if dims else None, side=side)


# What all norms share, `batch_norm` too.


def check_eps(eps: Any) -> None:
    """Raise unless eps is a positive float."""
    if not isinstance(eps, float) or eps <= 0:
        raise LayerError("eps as a positive float", repr(eps), "pass 1e-5, for example")


def affine(key: jax.Array, x: Any, scale_init: Any, bias_init: Any) -> Params:
    """``scale`` and ``bias``, one of each per feature; False leaves one out."""
    check_array(x, rank=1, axes="(..., features)")
    inits = {"scale": scale_init, "bias": bias_init}
    return {
        name: parameter(key, name, init, x.shape[-1:], x) for name, init in inits.items() if init
    }


def real_entries(real: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The real entries; where none along the axes is real, all of them, which were cleared."""
    return real | ~real.any(axes, keepdims=True)


def moments(
    x: jax.Array, axes: int | tuple[int, ...], *, keepdims: bool = False,
    real: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean along the axes, x without it, and the variance; of the real entries if they are given.

    Squares come before the mean: XLA compiles this order into half the program.
    """
    mean = jnp.mean(x, axes, keepdims=keepdims, where=real)
    centered = x - mean
    return mean, centered, jnp.square(centered).mean(axes, keepdims=keepdims, where=real)


@functools.partial(jax.jit, static_argnums=1)  # traced once for all norms of one shape
def standardized(x: jax.Array, eps: float) -> jax.Array:
    """Each vector along the last axis without its mean, divided by its standard deviation."""
    return _standardized(x, eps)


# XLA makes twice the program of the derivative that JAX finds. This one is linear in the tangent,
# so that it serves all modes and orders; the product comes before its mean here too.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _standardized(x: jax.Array, eps: float) -> jax.Array:
    return _with_inverse(x, eps)[0]


@_standardized.defjvp
def _tangent(eps: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """``dy = (dx - mean(dx) - y * mean(dx * y)) / sqrt(var + eps)``."""
    (x,), (dx,) = primals, tangents
    y, inverse = _with_inverse(x, eps)
    along = (dx * y).mean(-1, keepdims=True)
    return y, inverse * (dx - dx.mean(-1, keepdims=True) - y * along)


def _with_inverse(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The standardized x, and one over the standard deviation."""
    _, centered, var = moments(x, -1, keepdims=True)
    inverse = jax.lax.rsqrt(var + eps)
    return centered * inverse, inverse


def transformed(params: Params, centered: jax.Array, var: jax.Array, eps: float) -> jax.Array:
    """Divide by the standard deviation, then scale and shift."""
    _check_width(params, centered)
    factor = jax.lax.rsqrt(var + eps)
    if "scale" in params:
        factor = factor * params["scale"]
    y = centered * factor
    return y + params["bias"] if "bias" in params else y


def scaled(params: Params, y: jax.Array) -> jax.Array:
    """Scale and shift, each if it is there."""
    _check_width(params, y)
    y = y * params["scale"] if "scale" in params else y
    return y + params["bias"] if "bias" in params else y


def _check_width(params: Params, x: jax.Array) -> None:
    for leaf in params.values():
        check_features(leaf.shape[-1], x)  # a single feature would broadcast silently
