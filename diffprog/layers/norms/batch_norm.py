"""Normalization by the statistics of the batch, with running statistics for inference."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_fraction, known
from diffprog.core.dtypes import along, wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import cleared, counted, widened
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, parameter
from diffprog.core.plans import Params, State
from diffprog.layers.norms.statistics import (
    check_eps,
    check_width,
    draw_scale_and_bias,
    inits_of,
    mean_square,
    normalized,
    scaled,
    tamed,
    valid_entries,
)

__all__ = ["batch_norm"]


@factory
def batch_norm(
    *, momentum: float = 0.9, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Initializer = "ones", bias_init: Initializer = "zeros",
) -> Layer:
    """Standardize each channel: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    With ``train=True`` mean and variance (biased, divisor n) are those of the batch, over all axes
    but the last, and the running statistics are updated: ``running = momentum * running +
    (1 - momentum) * batch``, with the unbiased variance (divisor n - 1). Inference uses the running
    statistics, so that each example is independent of the batch.

    With a mask the statistics are those of the valid entries, and y is 0 at the others; with fewer
    than two valid entries the running statistics stay the same.

    Under `jax.jit` the statistics of a sharded batch are global; under `jax.vmap` each call has its
    own. A bias before this layer is cancelled in training: use ``linear(..., bias=False)``.

    Shapes:
        x: (..., C) -> (..., C), in the dtype of x.
        mask: booleans over leading axes of x, such as (batch,) or (batch, time), True = valid.
        params: ``scale`` (C,), ones; ``bias`` (C,), zeros.
        state: ``mean`` (C,), zeros; ``var`` (C,), ones.

    Args:
        momentum: fraction of the running statistics that is kept, in [0, 1); 1 - PyTorch's
            momentum.
        eps: added to the variance, in squared units of x; positive.
        scale: False leaves the factor out.
        bias: False leaves the shift out.
        scale_init, bias_init: initializers.

    Raises:
        LayerError: training with one value per channel, whose variance is undefined; no state; x
            has a different number of channels than in `init`; the mask does not fit x.

    Example:
        >>> norm, x = dp.batch_norm(), jnp.array([[1.0], [3.0]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> y, state = norm.apply(params, state, x, train=True)
        >>> [round(float(v[0]), 3) for v in (y[0], state["mean"], state["var"])]
        [-1.0, 0.2, 1.1]
        >>> norm(params, x, state=state).shape  # inference: by the running statistics
        (2, 1)

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2.
    """
    check_eps(eps)
    check_fraction("momentum", momentum)
    inits = inits_of(scale, scale_init, bias, bias_init)

    def init(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        params = draw_scale_and_bias(key, x, inits)
        shape = x.shape[-1:]
        return params, {
            "mean": parameter(key, "mean", "zeros", shape, x),
            "var": parameter(key, "var", "ones", shape, x),
        }

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=1, axes="(..., features)")
        check_width(state, x)
        check_width(params, x)
        wide = cleared(x, mask).astype(wide_dtype(x))
        if train:
            y, mean, var, count = _by_batch(params, wide, mask, eps, x)
            batch = jax.lax.stop_gradient({"mean": mean, "var": var})
            return cleared(y, mask), _updated(state, batch, momentum, count)
        centered = wide - along(state["mean"], wide)
        y = normalized(params, centered, state["var"].astype(wide.dtype), eps)
        return cleared(y.astype(x.dtype), mask), state

    # No start: in inference positions do not mix, so that a stream is a sequence of calls.
    return Layer(init, apply, side=frozenset({"mask"}), casts=True)


def _by_batch(
    params: Params, wide: jax.Array, mask: jax.Array | None, eps: float, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Normalize x by the statistics of the batch.

    Args:
        params: scale and bias, each optional.
        wide: x with zeros at masked entries, in the dtype of the parameters.
        mask, eps, x: as in `batch_norm`.

    Returns:
        y, mean (C,), unbiased variance (C,), and the number of valid entries, None without a mask.
    """
    entries = math.prod(x.shape[:-1])  # of each channel
    if known(entries) and entries < 2:
        raise LayerError("several values per channel in training", show(x),
                         "take a larger batch: a variance needs two")
    axes = tuple(range(x.ndim - 1))
    valid = count = None
    if mask is not None:
        valid = widened(mask, x.shape)
        count = counted(valid, entries // valid.size).astype(wide.dtype)
        valid = valid_entries(valid, axes)
    wide, factor = tamed(wide, axes)
    mean = wide.mean(axes, where=valid)  # (C,)
    centered = wide - along(mean, wide)  # (..., C)
    var = mean_square(centered, axes, keepdims=False, valid=valid)  # (C,)
    factor = factor.reshape(mean.shape)
    y = normalized(params, centered, var, scaled(eps, factor)).astype(x.dtype)
    mean, var = mean / factor, var / factor / factor
    if count is None:
        return y, mean, var * (entries / (entries - 1)), count
    return y, mean, var * (count / jnp.maximum(count - 1, 1)), count


def _updated(
    state: State, batch: State, momentum: float, count: jax.Array | None
) -> State:
    """``momentum * state + (1 - momentum) * batch``; the state itself with fewer than two entries.
    """

    def update(old: jax.Array, new: jax.Array) -> jax.Array:
        new = (momentum * old.astype(new.dtype) + (1 - momentum) * new).astype(old.dtype)
        return new if count is None else jnp.where(count < 2, old, new)

    return jax.tree.map(update, state, batch)
