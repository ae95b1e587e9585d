"""Samplers: from noise to images, by repeated calls of a denoiser.

Both visit the steps of a schedule, or fewer steps spread over it, from the last to the first in one
`jax.lax.scan`. At each step the net predicts the noise in x; the rest of x is an estimate of the
image; the next x is that estimate with the noise level of the step before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array, check_count, held
from diffprog.core.dtypes import outside, wide
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import beside, settled
from diffprog.core.plans import Params, State
from diffprog.diffusion.denoising import (
    check_denoiser,
    check_null,
    check_predict,
    check_prediction,
    null_inputs,
)
from diffprog.diffusion.process import Predict, check_schedule, image_and_noise

__all__ = ["ddim", "ddpm"]


def ddpm(
    net: Layer, params: Params, x: jax.Array, schedule: np.ndarray, *, steps: int | None = None,
    state: State | None = None, key: jax.Array, predict: Predict = "noise",
    guidance_scale: float = 1.0, null_class: int | None = None,
    null: Mapping[str, Any] | None = None, **side: Any,
) -> jax.Array:
    """Ancestral sampling: ``x ~ normal(mean, var)`` of the step before, given x and its image.

    ``mean = (sqrt(b) * (1 - a/b) * image + sqrt(a/b) * (1 - b) * x) / (1 - a)`` and ``var = (1 - b)
    / (1 - a) * (1 - a/b)``; a and b are the schedule now and one step before. This is the smaller
    of the paper's two variances, exact if all data are one image. The last step adds no noise.

    Shapes:
        x: standard normal noise (batch, ...) -> images of the same shape and dtype.

    Args:
        net: a net that takes the side input `time`, ints (batch,).
        params, state: parameters and state of the net.
        schedule: the schedule of the training.
        key: PRNG key of the noise.
        steps: number of steps, spread evenly over the schedule; the first one is the last of the
            schedule. None takes all.
        predict: the prediction of the net, as in training.
        guidance_scale: the factor s of classifier-free guidance, ``y(null) + s * (y(condition) -
            y(null))``: 1 is the net itself, larger ones trade variety for fidelity to the
            condition, 0 ignores the condition. The paper's w is s - 1.
        null_class: the class that means no condition; required if guidance_scale is not 1.
        null: the null values if the condition is no class, as in `denoising`.
        side: `condition`, (batch,) or another shape that the net takes, and other side inputs.

    Raises:
        LayerError: a schedule that does not decrease in (0, 1); more steps than it has; guidance
            without null_class or null, or without the condition; a net that takes no time or
            returns another shape.

    Example:
        >>> net = dp.models.dit(1, width=8, depth=1, heads=2, classes=10)
        >>> key, x, digits = jax.random.key(0), jnp.ones((2, 8, 8, 1)), jnp.array([3, 7])
        >>> params, state = net.init(key, x, time=jnp.zeros(2, int), condition=digits)
        >>> noise = jax.random.normal(key, x.shape)
        >>> schedule = dp.diffusion.cosine_noise(100)
        >>> dp.diffusion.ddpm(net, params, noise, schedule, key=key, steps=4, guidance_scale=3.0,
        ...                   null_class=10, condition=digits).shape
        (2, 8, 8, 1)

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, eq. 7 and algorithm 2; fewer steps: Nichol and
    Dhariwal 2021, arXiv:2102.09672, section 4; guidance: Ho and Salimans 2022, arXiv:2207.12598,
    eq. 6.
    """
    now, before = _levels(schedule, steps)
    weights = {
        "image": np.sqrt(before) * (1 - now / before) / (1 - now),
        "x": np.sqrt(now / before) * (1 - before) / (1 - now),
        "noise": np.zeros_like(now),
        "fresh": np.sqrt((1 - before) / (1 - now) * (1 - now / before)),
    }
    return _sample(net, params, x, schedule, weights, key=key, state=state, predict=predict,
                   guidance_scale=guidance_scale, null_class=null_class, null=null, side=side)


def ddim(
    net: Layer, params: Params, x: jax.Array, schedule: np.ndarray, *, steps: int | None = None,
    eta: float = 0.0, state: State | None = None, key: jax.Array | None = None,
    predict: Predict = "noise", guidance_scale: float = 1.0, null_class: int | None = None,
    null: Mapping[str, Any] | None = None, **side: Any,
) -> jax.Array:
    """DDIM sampling: ``x = sqrt(b) * image + sqrt(1 - b - v) * noise + sqrt(v) * fresh noise``.

    Image and noise are the parts of x, a and b the schedule now and one step before, and
    ``v = eta**2 * (1 - b) / (1 - a) * (1 - a/b)``. With eta 0, the default, sampling is
    deterministic and needs few steps. With eta 1 it equals `ddpm` in distribution and, for the same
    key, in value.

    Shapes:
        x: standard normal noise (batch, ...) -> images of the same shape and dtype.

    Args:
        eta: standard deviation of the fresh noise relative to that of `ddpm`, in [0, 1].
        key: PRNG key of the fresh noise; not needed with eta 0.
        net, params, schedule, state, steps, predict, guidance_scale, null_class, null, side: as in
            `ddpm`.

    Raises:
        LayerError: as in `ddpm`; an eta outside [0, 1], or above 0 without a key.

    Example:
        >>> net = dp.models.dit(1, width=8, depth=1, heads=2)
        >>> noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
        >>> params, state = net.init(jax.random.key(0), noise, time=jnp.zeros(2, int))
        >>> dp.diffusion.ddim(net, params, noise, dp.diffusion.cosine_noise(100), steps=10).shape
        (2, 8, 8, 1)

    Source: Song, Meng, Ermon 2020, arXiv:2010.02502, eq. 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise LayerError("eta in [0, 1]", repr(eta),
                         "pass 0 for no fresh noise, 1 for as much as in ddpm")
    if eta and key is None:
        raise LayerError("a key for an eta above 0", "none", "pass key=jax.random.key(seed)")
    now, before = _levels(schedule, steps)
    variance = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
    weights = {
        "image": np.sqrt(before),
        "x": np.zeros_like(now),
        "noise": np.sqrt(np.maximum(1 - before - variance, 0)),
        "fresh": np.sqrt(variance),
    }
    return _sample(net, params, x, schedule, weights, key=key if eta else None, state=state,
                   predict=predict, guidance_scale=guidance_scale, null_class=null_class,
                   null=null, side=side)


def _levels(schedule: Any, steps: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The schedule at the visited steps, last to first, and one visited step before each."""
    schedule = check_schedule(schedule)
    now = schedule[_times(len(schedule), steps)]
    return now, np.append(now[1:], 1.0)


def _times(length: int, steps: int | None) -> np.ndarray:
    """The visited steps of a schedule of this length, from the last one down."""
    if steps is None:
        return np.arange(length)[::-1]
    check_count("steps", steps)
    if steps > length:
        raise LayerError(f"at most {length} steps, those of the schedule", repr(steps), "lower it")
    return (np.arange(steps, 0, -1) * length // steps) - 1


def _sample(
    net: Layer, params: Params, x: jax.Array, schedule: Any, weights: dict[str, np.ndarray], *,
    key: jax.Array | None, state: State | None, predict: Predict, guidance_scale: float,
    null_class: int | None, null: Mapping[str, Any] | None, side: dict[str, Any],
) -> jax.Array:
    """Check the arguments and run all steps; `weights` are those of the terms of the next x."""
    check_array(x, rank=1, axes="(batch, ...)")
    check_predict(predict)
    side = held({name: value for name, value in side.items() if value is not None})
    check_denoiser(net)
    check_null(null_class, null)
    guided = guidance_scale != 1
    if guided and null_class is None and null is None:
        raise LayerError("a null_class for guidance, or null", "none",
                         "pass the null_class= or null= of denoising")
    if guided and null is None and "condition" not in side:
        raise LayerError("a condition for guidance", "none", "pass condition=labels")
    nulls = null_inputs(side, null_class, null) if guided else {}
    now, _ = _levels(schedule, len(weights["x"]))
    scales = weights | {"signal": np.sqrt(now), "spread": np.sqrt(1 - now)}
    scales = {name: jnp.asarray(values, wide(x).dtype) for name, values in scales.items()}
    times = jnp.asarray(_times(len(schedule), len(now)), jnp.int32)
    return _scan(params, {} if state is None else state, x, key, times, scales, side, nulls,
                 guidance_scale if guided else None, net=net, predict=predict)


@functools.partial(jax.jit, static_argnames=("net", "predict"))
def _scan(
    params: Params, state: State, x: jax.Array, key: jax.Array | None, times: jax.Array,
    scales: dict[str, jax.Array], side: dict[str, Any], nulls: dict[str, Any],
    guidance_scale: Any, *, net: Layer, predict: Predict,
) -> jax.Array:
    """The loop over times (steps,), with scales (steps,) by name."""
    shared, inside = outside((params, state, side, nulls))  # the constants of the loop

    def step(noisy: jax.Array, now: Any) -> tuple[jax.Array, None]:
        params, state, side, nulls = inside(shared)
        denoiser = _Denoiser(net, params, state, side, nulls, guidance_scale)
        time, scale = now
        y = denoiser(noisy.astype(x.dtype), beside(jnp.full(x.shape[:1], time), x))
        check_prediction(y, x)
        image, noise = image_and_noise(wide(y), noisy, scale["signal"], scale["spread"], predict)
        mean = scale["image"] * image + scale["x"] * noisy + scale["noise"] * noise
        if key is None:
            return mean, None
        fresh = jax.random.normal(jax.random.fold_in(key, time), x.shape, noisy.dtype)
        return mean + scale["fresh"] * beside(fresh, x), None

    first = settled(lambda noisy, now: step(noisy, now)[0], wide(x), (times, scales))
    return jax.lax.scan(step, first, (times, scales))[0].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Denoiser:
    """The prediction of a net, with classifier-free guidance if there is a `guidance_scale`."""

    net: Layer
    params: Params
    state: State
    side: dict[str, Any]
    nulls: dict[str, Any]
    guidance_scale: Any

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        if self.guidance_scale is None:
            return self._predict(x, time, {})
        pairs = jax.tree.map(lambda own, null: jnp.stack([own, beside(null, own)]),
                             {name: self.side[name] for name in self.nulls}, self.nulls)
        conditional, unconditional = jax.vmap(lambda side: self._predict(x, time, side))(pairs)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _predict(self, x: jax.Array, time: jax.Array, side: dict[str, Any]) -> jax.Array:
        return self.net.apply(
            self.params, self.state, x, time=time, **self.side | side)[0]
