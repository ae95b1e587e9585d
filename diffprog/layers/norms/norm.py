"""Normalization: subtract a mean, divide by a standard deviation, scale and shift.

The layers differ in the axes of mean and variance. Those of this file normalize each example alone;
`batch_norm.py` normalizes over the batch; `statistics.py` has the functions that all share.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from diffprog.core.arguments import check_array, check_count
from diffprog.core.dtypes import wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, stateless
from diffprog.core.masks import cleared, refuse_segments, widened
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer
from diffprog.core.plans import Params, State
from diffprog.layers.norms.statistics import (
    check_eps,
    check_width,
    draw_scale_and_bias,
    inits_of,
    mean_square,
    normalized,
    scale_and_shift,
    scaled,
    standardized,
    tamed,
    valid_entries,
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
    not overflow, however large the entries are.

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
            a different number of features than in `init`.

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
                             "leave it out: a single number minus its mean is always 0")
        y = standardized(x.astype(wide_dtype(x)), eps)  # (..., D)
        return scale_and_shift(params, y).astype(x.dtype)

    return stateless(init, forward, name="layer_norm", casts=True)


@factory
def rms_norm(
    *, eps: float = 1e-5, scale: bool = True, scale_init: Initializer = "ones",
) -> Layer:
    """Divide by the root mean square of the last axis: ``y = scale * x / sqrt(mean(x^2) + eps)``.

    There is no mean and no bias: without scale each vector keeps its direction, and a single
    feature its sign. Squares do not overflow, as in `layer_norm`.

    Shapes:
        x: (..., D) -> (..., D), in the dtype of x.
        params: ``scale`` (D,), ones.

    Args:
        eps: added to the mean square, in squared units of x; positive.
        scale: False leaves the factor out.
        scale_init: initializer.

    Raises:
        LayerError: x is no floating-point array of at least one axis, or has a different number of
            features than in `init`.

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
        wide, factor = tamed(x.astype(wide_dtype(x)), -1)
        square = mean_square(wide, -1)  # (..., 1)
        y = normalized(params, wide, square, scaled(eps, factor))  # (..., D)
        return y.astype(x.dtype)

    return stateless(init, forward, name="rms_norm", casts=True)


@factory
def group_norm(
    groups: int, *, dims: int = 2, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Initializer = "ones", bias_init: Initializer = "zeros",
) -> Layer:
    """Standardize groups of channels: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    Mean and variance (biased) are those of one example and one group of adjacent channels, over the
    last `dims` axes before the channels. Each channel has its own scale and bias.
    ``group_norm(1, dims=0)`` is `layer_norm`; one group per channel is `instance_norm`.

    Shapes:
        x: (..., S..., C) -> (..., S..., C) with `dims` axes S, in the dtype of x.
        mask, if dims is 1: booleans (batch,) or (batch, time), True = valid; the statistics are
            those of valid positions, and y is 0 at the others.
        params: ``scale`` (C,), ones; ``bias`` (C,), zeros.

    Args:
        groups: number of groups; divides C.
        dims: number of axes of space or time, 0 to 3.
        eps: added to the variance, in squared units of x; positive.
        scale: False leaves the factor out.
        bias: False leaves the shift out.
        scale_init, bias_init: initializers.

    Raises:
        LayerError: x has fewer than dims + 1 axes, a number of channels that is no multiple of
            groups, or another number than in `init`; a group is a single number; streaming and
            segments, unless dims is 0.

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
        dims: number of axes of space or time, 1 to 3.
        eps, scale, bias, scale_init, bias_init: as in `group_norm`.

    Raises:
        LayerError: x has fewer than dims + 1 axes, or a different number of channels than in
            `init`; a channel is a single number; streaming and segments.

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
        raise LayerError("dims of at most 3", f"{dims}", "use the first axes as batch axes")
    axes = (*range(-dims - 2, -2), -1)  # of (..., S..., groups, C / groups): all but the groups

    def init(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        _number_of_groups(x, groups, dims)
        return draw_scale_and_bias(key, x, inits), {}

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False,
        mask: jax.Array | None = None, segments: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        refuse_segments(segments)
        count = _number_of_groups(x, groups, dims)
        check_width(params, x)
        if not x.size:
            return x, state  # the mean of no entries would be NaN, and its gradient too

        def split(a: jax.Array) -> jax.Array:
            return a.reshape(*a.shape[:-1], count, a.shape[-1] // count)

        wide = split(cleared(x, mask).astype(wide_dtype(x)))  # (..., S..., groups, C / groups)
        wide, factor = tamed(wide, axes)
        valid = None
        if mask is not None:
            valid = valid_entries(widened(mask, x.shape)[..., None], axes)
        centered = wide - wide.mean(axes, keepdims=True, where=valid)
        var = mean_square(centered, axes, valid=valid)  # (..., 1..., groups, 1)
        y = normalized(jax.tree.map(split, params), centered, var, scaled(eps, factor))
        return cleared(y.reshape(x.shape).astype(x.dtype), mask), state

    if not dims:
        return Layer(init, apply, casts=True)
    return Layer(init, apply, cannot_stream, side=takes(dims), casts=True)


def _number_of_groups(x: Any, groups: int | None, dims: int) -> int:
    """The number of groups, after a check of x; one for each channel if `groups` is None."""
    check_array(x, rank=dims + 1, axes=AXES.get(dims, "(..., channels)"))
    channels = x.shape[-1]
    count = groups or channels
    if channels % count:
        raise LayerError(f"channels divisible by groups={groups}", f"{channels} in {show(x)}",
                         "choose groups that divide the channels")
    if channels == count and math.prod(x.shape[-dims - 1 : -1]) == 1:
        raise LayerError("several numbers in a group", show(x), "choose fewer groups, or leave "
                         "it out: a single number minus its mean is always 0")
    return count
