"""Steps without effect where the loss or a gradient is not finite, and scales of the loss.

Both are one mechanism: the scale is found by trying, and a step in which it was so large that a
gradient overflowed is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count
from diffprog.core.dtypes import standard_promotion, wide
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.nets import trainable
from diffprog.core.notation import code
from diffprog.core.paths import paths
from diffprog.core.plans import Params

__all__ = ["LossScale"]

# Bounds of a scale: steps with NaN in the data would halve it to 0, good ones double it to inf.
LEAST, MOST = 1.0, 2.0**64


class LossScale(NamedTuple):
    """A scale of the loss for gradients in float16: ``grad(scale * loss) / scale``.

    float16 rounds numbers below 3e-8 to zero, and cotangents in a net are often smaller. Scaled by
    a power of two they keep all bits. The scale is doubled after `period` steps in a row without an
    overflow, and halved by a step with one, which is skipped; it stays within 1 and 2**64. Without
    overflow and underflow, as in float32, the result is that without a scale, bit for bit.

    Attributes:
        initial: the first scale, a power of two from 1 to 2**64.
        period: number of steps; positive.

    Example:
        >>> net = dp.mixed(dp.linear(3), jnp.float16)
        >>> step = dp.make_step(net, dp.classification(), optax.sgd(0.1), report=["loss_scale"],
        ...                     loss_scale=dp.training.LossScale(2.0**10, period=2))
        >>> batch = jnp.ones((2, 4)), jnp.array([0, 2])
        >>> state = step.init(jax.random.key(0), batch[0])
        >>> for _ in range(2):
        ...     state, metrics = step.apply(state, batch)
        >>> float(metrics["loss_scale"])  # for the next step
        2048.0

    Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.2.
    """

    initial: float = 2.0**15
    period: int = 2000


class Guarded(NamedTuple):
    """The state of a `Guard`.

    Attributes:
        inner: the state of its optimizer.
        skipped: whether the last step was skipped.
        broken: if the guard is to tell them, which gradients were not finite in the last step that
            was skipped, and at last whether the loss was not: (leaves + 1,); else ``()``.
        scale, good: the scale of the loss, and the steps since it changed; ``()`` without one.
    """

    inner: Any
    skipped: Any
    broken: Any
    scale: Any
    good: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Guard:
    """An optimizer that leaves parameters and state as they are if loss or gradient is not finite.

    Gradients of frozen parameters do not count.
    """

    net: Layer
    optimizer: Any
    tells: bool
    scaling: LossScale | None

    def init(self, params: Params) -> Guarded:
        leaves = len(jax.tree.leaves(params))
        scaled = (jnp.float32(self.scaling.initial), jnp.int32(0)) if self.scaling else ((), ())
        broken = jnp.zeros(leaves + 1, bool) if self.tells else ()
        return Guarded(self.optimizer.init(params), jnp.array(False), broken, *scaled)

    def update(
        self, grads: Any, state: Guarded, params: Params, *, value: Any, **extra: Any
    ) -> tuple[Any, Guarded]:
        updates, inner = self.optimizer.update(grads, state.inner, params, value=value, **extra)
        trains = jax.tree.leaves(trainable(self.net, params))
        finite = [jnp.isfinite(leaf).all() if trained else jnp.array(True)
                  for leaf, trained in zip(jax.tree.leaves(grads), trains, strict=True)]
        broken = ~jnp.stack([*finite, jnp.isfinite(value)])
        skipped = broken.any()
        keep = functools.partial(jnp.where, skipped)
        state = state._replace(inner=jax.tree.map(keep, state.inner, inner), skipped=skipped)
        if self.tells:
            state = state._replace(broken=keep(broken, state.broken))
        if self.scaling:
            state = _rescaled(state, self.scaling.period)
        return jax.tree.map(lambda u: keep(jnp.zeros_like(u), u), updates), state


def _rescaled(state: Guarded, period: int) -> Guarded:
    """The state with the scale for the next step."""
    good = jnp.where(state.skipped, 0, state.good + 1)
    grows = good == period
    scale = jnp.where(state.skipped, jnp.maximum(state.scale / 2, LEAST),
                      jnp.where(grows, jnp.minimum(state.scale * 2, MOST), state.scale))
    return state._replace(scale=scale, good=jnp.where(grows, 0, good))


def guarded(net: Layer, optimizer: Any, non_finite: Any, scaling: Any) -> Any:
    """The optimizer with the guard that `make_step` was asked for, if any."""
    if non_finite not in (None, "raise", "skip"):
        raise LayerError("non_finite out of None, raise, skip", code(non_finite),
                         "choose one of them")
    if scaling is not None:
        _check_scaling(scaling)
        if non_finite == "raise":
            raise LayerError('non_finite="skip" or None with loss_scale', "'raise'",
                             "leave it out: a scale is found by steps that overflow")
    if non_finite is None and scaling is None:
        return optimizer
    return Guard(net, optimizer, non_finite == "raise", scaling)


def _check_scaling(scaling: Any) -> None:
    """Raise unless `scaling` is a valid `LossScale`."""
    if not isinstance(scaling, LossScale):
        raise LayerError("loss_scale as a LossScale", code(scaling),
                         "pass dp.training.LossScale(), for example")
    check_count("period", scaling.period)
    initial = scaling.initial
    if not (LEAST <= initial <= MOST and math.frexp(initial)[0] == 0.5):
        raise LayerError("initial as a power of two from 1 to 2**64", code(initial),
                         "pass 2.0**15: other scales round the gradients")


def loss_scale(opt_state: Any) -> jax.Array | None:
    """The scale of the loss in the state of an optimizer; None without one."""
    scaled = isinstance(opt_state, Guarded) and not isinstance(opt_state.scale, tuple)
    return opt_state.scale if scaled else None  # type: ignore[union-attr]


@standard_promotion()
def unscaled(grads: Any, scale: jax.Array) -> Any:
    """The gradient of the loss, of that of ``scale * loss``."""
    return jax.tree.map(lambda g: (wide(g) / scale).astype(g.dtype), grads)


def unguarded(opt_state: Any) -> Any:
    """The state of the optimizer itself."""
    return opt_state.inner if isinstance(opt_state, Guarded) else opt_state


def broken_paths(opt_state: Any, params: Params) -> tuple[list[str], bool]:
    """The paths of the gradients that were not finite in the last step that was skipped, and
    whether its loss was not; nothing unless the guard tells them.
    """
    if not isinstance(opt_state, Guarded) or isinstance(opt_state.broken, tuple):
        return [], False
    *grads, loss = jax.device_get(opt_state.broken).tolist()
    return [path for path, is_broken in zip(paths(params), grads, strict=True) if is_broken], loss
