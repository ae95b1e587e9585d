"""Normalization: subtract a mean, divide by a standard deviation, scale and shift.

What differs is over which axes mean and variance are taken, and whether they are remembered. Here
are the layers that look at each example alone; `batch_norm.py` has the one that does not. What they
share is in `statistics.py`.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from diffprog.core.arguments import check_array, check_count
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, stateless
from diffprog.core.masks import cleared, refuse_segments, widened
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, parameter_dtype
from diffprog.core.plans import Params, State
from diffprog.layers.norms.statistics import (
    check_eps,
    check_width,
    draw_scale_and_bias,
    inits_of,
    mean_square,
    normalized,
    real_entries,
    scale_and_shift,
    scaled,
    standardized,
    tamed,
)
from diffprog.layers.spatial.window import AXES, cannot_stream, takes

__all__ = ["group_norm", "instance_norm", "layer_norm", "rms_norm"]


@factory
def layer_norm(
    *, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Initializer = "ones", bias_init: Initializer = "zeros",
) -> Layer:
    """Standardize the last axis: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    Mean and variance (biased, divisor D) are those of each vector along the last axis. Squares do
    not overflow: a vector is standardized however large its numbers are.

    Shapes:
        x: (..., D) -> (..., D), in the dtype of x.
        params: ``scale`` (D,), ones; ``bias`` (D,), zeros.

    Args:
        eps: added to the variance, in squared units of x; positive.
        scale: False leaves the factor out.
        bias: False leaves the shift out.
        scale_init, bias_init: initializers.

    Raises:
        LayerError: x is no floating-point array of at least one axis, has a single feature, or
            another number of them than `init` saw.

    Example:
        >>> norm, x = dp.layer_norm(), jnp.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> norm(params, x)[1].tolist()
        [0.0, 0.0, 0.0]

    Source: Ba, Kiros, Hinton 2016, arXiv:1607.06450, eq. 3 and 4.
    """
    check_eps(eps)
    inits = inits_of(scale, scale_init, bias, bias_init)

    def init(key: jax.Array, x: Any) -> Params:
        return draw_scale_and_bias(key, x, inits)

    def forward(params: Params, x: jax.Array) -> jax.Array:
        check_array(x, rank=1, axes="(..., features)")
        check_width(params, x)
        if x.shape[-1] == 1:
            raise LayerError("several features", show(x),
                             "leave it out: a number less its mean is 0, whatever it is")
        y = standardized(x.astype(parameter_dtype(x)), eps)
        return scale_and_shift(params, y).astype(x.dtype)

    return stateless(init, forward, name="layer_norm", casts=True)


@factory
def rms_norm(
    *, eps: float = 1e-5, scale: bool = True, scale_init: Initializer = "ones",
) -> Layer:
    """Divide by the root mean square of the last axis: ``y = scale * x / sqrt(mean(x^2) + eps)``.

    No mean is subtracted and nothing is added: the direction of each vector stays. Of a single
    feature that is its sign. Squares do not overflow, as in `layer_norm`.

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
    inits = {"scale": scale_init} if scale else {}

    def init(key: jax.Array, x: Any) -> Params:
        return draw_scale_and_bias(key, x, inits)

    def forward(params: Params, x: jax.Array) -> jax.Array:
        check_array(x, rank=1, axes="(..., features)")
        check_width(params, x)
        wide, factor = tamed(x.astype(parameter_dtype(x)), -1)
        y = normalized(params, wide, mean_square(wide, -1), scaled(eps, factor))
        return y.astype(x.dtype)

    return stateless(init, forward, name="rms_norm", casts=True)


@factory
def group_norm(
    groups: int, *, dims: int = 2, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Initializer = "ones", bias_init: Initializer = "zeros",
) -> Layer:
    """Standardize groups of channels: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    Mean and variance (biased) are those of one example and one group of neighbouring channels, over
    the last `dims` axes before the channels. Scale and bias belong to the channels.
    ``group_norm(1, dims=0)`` is `layer_norm`; one group per channel is `instance_norm`.

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
            groups, or another than `init` saw; a group is a single number; streaming and segments,
            unless dims is 0.

    Example:
        >>> norm, x = dp.group_norm(2, dims=0), jnp.array([[1.0, 3.0, 5.0, 5.0]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> [round(float(y), 3) for y in norm(params, x)[0]]
        [-1.0, 1.0, 0.0, 0.0]

    Source: Wu and He 2018, arXiv:1803.08494, eq. 1, 2, 6 and 7.
    """
    check_count("groups", groups)
    check_count("dims", dims, least=0)
    return _grouped(groups, dims, eps, inits_of(scale, scale_init, bias, bias_init))


@factory
def instance_norm(
    *, dims: int = 2, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Initializer = "ones", bias_init: Initializer = "zeros",
) -> Layer:
    """Standardize each channel alone: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    Mean and variance (biased) are those of one example and one channel, over the last `dims` axes
    before the channels: it is `group_norm` with one group per channel.

    Shapes:
        x, mask, params: as in `group_norm`.

    Args:
        dims: axes of space or time, 1 to 3.
        eps, scale, bias, scale_init, bias_init: as in `group_norm`.

    Raises:
        LayerError: x has fewer than dims + 1 axes, or another number of channels than `init` saw;
            a channel is a single number; streaming and segments.

    Example:
        >>> norm, x = dp.instance_norm(dims=1), jnp.array([[[1.0, 5.0], [3.0, 5.0]]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> [round(float(y), 3) for y in norm(params, x)[0, :, 0]]
        [-1.0, 1.0]

    Source: Ulyanov, Vedaldi, Lempitsky 2016, arXiv:1607.08022, eq. 4.
    """
    check_count("dims", dims)
    return _grouped(None, dims, eps, inits_of(scale, scale_init, bias, bias_init))


def _grouped(
    groups: int | None, dims: int, eps: float, inits: dict[str, Initializer]
) -> Layer:
    """Statistics of each example and group of channels; one group per channel if None."""
    check_eps(eps)
    if dims > 3:
        raise LayerError("dims of at most 3", f"{dims}", "leave the first axes to the batch")
    axes = (*range(-dims - 2, -2), -1)  # those of split(x): space, and the channels of a group

    def check(x: Any) -> int:
        """The number of groups."""
        check_array(x, rank=dims + 1, axes=AXES.get(dims, "(..., channels)"))
        channels = x.shape[-1]
        count = groups or channels
        if channels % count:
            raise LayerError(f"channels in {groups} equal groups", f"{channels} in {show(x)}",
                             "choose groups that divide the channels")
        if channels == count and math.prod(x.shape[-dims - 1 : -1]) == 1:
            raise LayerError("several numbers in a group", show(x), "choose fewer groups, or leave "
                             "it out: a number less its mean is 0, whatever it is")
        return count

    def init(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        check(x)
        return draw_scale_and_bias(key, x, inits), {}

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False,
        mask: jax.Array | None = None, segments: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        refuse_segments(segments)
        count = check(x)
        check_width(params, x)
        if not x.size:
            return x, state  # the mean of nothing would be NaN, and the gradient too

        def split(a: jax.Array) -> jax.Array:  # (..., S..., C) to (..., S..., groups, C / groups)
            return a.reshape(*a.shape[:-1], count, a.shape[-1] // count)

        wide, factor = tamed(split(cleared(x, mask).astype(parameter_dtype(x))), axes)
        real = None if mask is None else real_entries(widened(mask, x.shape)[..., None], axes)
        centered = wide - wide.mean(axes, keepdims=True, where=real)
        var = mean_square(centered, axes, real=real)
        y = normalized(jax.tree.map(split, params), centered, var, scaled(eps, factor))
        return cleared(y.reshape(x.shape).astype(x.dtype), mask), state

    if not dims:
        return Layer(init, apply, casts=True)
    return Layer(init, apply, cannot_stream, side=takes(dims), casts=True)
