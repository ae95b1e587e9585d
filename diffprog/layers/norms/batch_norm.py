"""Normalization by the statistics of the batch, which are remembered for use at rest."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_share, known
from diffprog.core.dtypes import along
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import cleared, counted, widened
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, parameter, parameter_dtype
from diffprog.core.plans import Params, State
from diffprog.layers.norms.statistics import (
    check_eps,
    check_width,
    draw_scale_and_bias,
    inits_of,
    mean_square,
    normalized,
    real_entries,
    scaled,
    tamed,
)

__all__ = ["batch_norm"]


@factory
def batch_norm(
    *, momentum: float = 0.9, eps: float = 1e-5, scale: bool = True, bias: bool = True,
    scale_init: Initializer = "ones", bias_init: Initializer = "zeros",
) -> Layer:
    """Standardize each channel: ``y = scale * (x - mean) / sqrt(var + eps) + bias``.

    With ``train=True`` mean and variance (biased, divisor n) are those of the batch, over all axes
    but the last, and the running statistics move: ``running = momentum * running + (1 - momentum) *
    batch``, with the unbiased variance (divisor n - 1). Otherwise the running statistics are used,
    so that examples do not mix.

    With a mask the batch is that of the real entries. What stands at the others reaches nothing,
    and y is 0 there; where fewer than two are real, the running statistics stay.

    Under `jax.jit` the statistics of a batch that is sharded are those of all of it; under
    `jax.vmap` each call has its own. A bias before this layer is cancelled in training: use
    ``linear(..., bias=False)``.

    Shapes:
        x: (..., C) -> (..., C), in the dtype of x.
        mask: booleans over leading axes of x, such as (batch,) or (batch, time), True = real.
        params: ``scale`` (C,), ones; ``bias`` (C,), zeros.
        state: ``mean`` (C,), zeros; ``var`` (C,), ones.

    Args:
        momentum: the share of the running statistics that is kept, in [0, 1); PyTorch's momentum is
            1 - this.
        eps: added to the variance, in squared units of x; positive.
        scale: False leaves the factor out.
        bias: False leaves the shift out.
        scale_init, bias_init: initializers.

    Raises:
        LayerError: training with one value per channel, whose variance is undefined; no state; x of
            another number of channels than `init` saw; a mask that does not fit x.

    Example:
        >>> norm, x = dp.batch_norm(), jnp.array([[1.0], [3.0]])
        >>> params, state = norm.init(jax.random.key(0), x)
        >>> y, state = norm.apply(params, state, x, train=True)
        >>> [round(float(v[0]), 3) for v in (y[0], state["mean"], state["var"])]
        [-1.0, 0.2, 1.1]
        >>> norm(params, x, state=state).shape  # by the running statistics
        (2, 1)

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2.
    """
    check_eps(eps)
    check_share("momentum", momentum)
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
        wide = cleared(x, mask).astype(parameter_dtype(x))
        if not train:
            centered = wide - along(state["mean"], wide)
            y = normalized(params, centered, state["var"].astype(wide.dtype), eps)
            return cleared(y.astype(x.dtype), mask), state
        entries = math.prod(x.shape[:-1])  # of each channel
        if known(entries) and entries < 2:
            raise LayerError("several values per channel in training", show(x),
                             "take a larger batch: a variance needs two")
        axes = tuple(range(x.ndim - 1))
        real = real_count = None
        if mask is not None:
            real = widened(mask, x.shape)
            real_count = counted(real, entries // real.size).astype(wide.dtype)
            real = real_entries(real, axes)
        wide, factor = tamed(wide, axes)
        mean = wide.mean(axes, where=real)
        centered = wide - along(mean, wide)
        var = mean_square(centered, axes, keepdims=False, real=real)
        factor = factor.reshape(mean.shape)
        y = normalized(params, centered, var, scaled(eps, factor)).astype(x.dtype)
        mean, var = mean / factor, var / factor / factor
        to_unbiased = (entries / (entries - 1) if real_count is None
                       else real_count / jnp.maximum(real_count - 1, 1))
        batch = jax.lax.stop_gradient({"mean": mean, "var": var * to_unbiased})

        def move(old: jax.Array, new: jax.Array) -> jax.Array:
            moved = (momentum * old.astype(new.dtype) + (1 - momentum) * new).astype(old.dtype)
            return moved if real_count is None else jnp.where(real_count < 2, old, moved)

        return cleared(y, mask), jax.tree.map(move, state, batch)

    # It has no start: at rest no position sees another, so that it streams as it is.
    return Layer(init, apply, side=frozenset({"mask"}), casts=True)
