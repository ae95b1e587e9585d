"""Samplers: from noise to images, by asking a denoiser again and again.

Both go down the steps of a schedule, or fewer that are spread over it, as one `jax.lax.scan`. At
each the net says what of x is noise; what is left is taken as the image, and x becomes that image
with the noise of the step before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array, check_count, held
from diffprog.core.dtypes import outside
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import beside, settled
from diffprog.core.plans import Params, State
from diffprog.diffusion.denoising import (
    check_denoiser,
    check_null,
    check_predict,
    check_prediction,
    checked,
    untold,
)
from diffprog.diffusion.process import Predict, image_and_noise
from diffprog.losses.entries import wide

__all__ = ["ddim", "ddpm"]


def ddpm(
    net: Layer, params: Params, x: jax.Array, schedule: np.ndarray, *, steps: int | None = None,
    state: State | None = None, key: jax.Array, predict: Predict = "noise",
    guidance_scale: float = 1.0, null_class: int | None = None,
    null: Mapping[str, Any] | None = None, **side: Any,
) -> jax.Array:
    """Walk back at random: ``x ~ normal(mean, var)`` of the step before, given x and its image.

    ``mean = (sqrt(b) * (1 - a/b) * image + sqrt(a/b) * (1 - b) * x) / (1 - a)`` and ``var = (1 - b)
    / (1 - a) * (1 - a/b)``, a and b being the shares of the image now and one step before. This is
    the smaller of the paper's two variances, the one that is exact for a single image; the last
    step adds no noise.

    Shapes:
        x: standard normal noise (batch, ...) -> images of the same shape and dtype.

    Args:
        net: a net that takes the side input `time`, ints (batch,).
        params, state: of the net.
        schedule: the one that the net was trained with.
        key: of the noise that is drawn.
        steps: how many, spread evenly over the schedule, whose last is always the first that is
            taken; all of them if None.
        predict: what the net was trained to predict.
        guidance_scale: how far the condition is followed, s in ``y(null) + s * (y(condition) -
            y(null))``: 1 follows the net, more trades variety for likeness to the class, and 0
            ignores the condition. The paper's w is s - 1.
        null_class: the class that stands for none; needed where guidance_scale is not 1.
        null: in place of it what stands for none where that is no class, as in `denoising`.
        side: `condition`, (batch,) or what the net takes, and other side inputs of the net.

    Raises:
        LayerError: a schedule that does not fall in (0, 1); more steps than it has; guidance
            without null_class or null, or without the condition; a net that takes no time, or gives
            another shape.

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
    now, before = _path(schedule, steps)
    weights = {
        "image": np.sqrt(before) * (1 - now / before) / (1 - now),
        "x": np.sqrt(now / before) * (1 - before) / (1 - now),
        "noise": np.zeros_like(now),
        "fresh": np.sqrt((1 - before) / (1 - now) * (1 - now / before)),
    }
    return _walked(net, params, x, schedule, weights, key=key, state=state, predict=predict,
                   guidance_scale=guidance_scale, null_class=null_class, null=null, side=side)


def ddim(
    net: Layer, params: Params, x: jax.Array, schedule: np.ndarray, *, steps: int | None = None,
    eta: float = 0.0, state: State | None = None, key: jax.Array | None = None,
    predict: Predict = "noise", guidance_scale: float = 1.0, null_class: int | None = None,
    null: Mapping[str, Any] | None = None, **side: Any,
) -> jax.Array:
    """Walk back straight: ``x = sqrt(b) * image + sqrt(1 - b - v) * noise + sqrt(v) * fresh``.

    Image and noise are the parts of x, a and b the shares of the image now and one step before,
    and ``v = eta**2 * (1 - b) / (1 - a) * (1 - a/b)``. With eta 0, the default, nothing is drawn:
    each noise has its image, and few steps do. With eta 1 it is `ddpm`, in distribution and, for
    the same key, in value.

    Shapes:
        x: standard normal noise (batch, ...) -> images of the same shape and dtype.

    Args:
        eta: how much of the noise is drawn anew, from 0 to 1.
        key: of fresh noise; not needed with eta 0.
        net, params, schedule, state, steps, predict, guidance_scale, null_class, null, side: as in
            `ddpm`.

    Raises:
        LayerError: as `ddpm` does; for an eta outside [0, 1], and one above 0 without a key.

    Example:
        >>> net = dp.models.dit(1, width=8, depth=1, heads=2)
        >>> noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
        >>> params, state = net.init(jax.random.key(0), noise, time=jnp.zeros(2, int))
        >>> dp.diffusion.ddim(net, params, noise, dp.diffusion.cosine_noise(100), steps=10).shape
        (2, 8, 8, 1)

    Source: Song, Meng, Ermon 2020, arXiv:2010.02502, eq. 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise LayerError("eta in [0, 1]", repr(eta), "pass 0 for no fresh noise, 1 for ddpm's")
    if eta and key is None:
        raise LayerError("a key for an eta above 0", "none", "pass key=jax.random.key(seed)")
    now, before = _path(schedule, steps)
    drawn = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
    weights = {
        "image": np.sqrt(before),
        "x": np.zeros_like(now),
        "noise": np.sqrt(np.maximum(1 - before - drawn, 0)),
        "fresh": np.sqrt(drawn),
    }
    return _walked(net, params, x, schedule, weights, key=key if eta else None, state=state,
                   predict=predict, guidance_scale=guidance_scale, null_class=null_class,
                   null=null, side=side)


def _path(schedule: Any, steps: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The shares of the image at the steps that are taken, last to first, and one step before."""
    schedule = checked(schedule)
    shares = schedule[_times(len(schedule), steps)]
    return shares, np.append(shares[1:], 1.0)


def _times(length: int, steps: int | None) -> np.ndarray:
    """Which of `length` steps are taken, from the last one down."""
    if steps is None:
        return np.arange(length)[::-1]
    check_count("steps", steps)
    if steps > length:
        raise LayerError(f"at most {length} steps, those of the schedule", repr(steps), "lower it")
    return (np.arange(steps, 0, -1) * length // steps) - 1


def _walked(
    net: Layer, params: Params, x: jax.Array, schedule: Any, weights: dict[str, np.ndarray], *,
    key: jax.Array | None, state: State | None, predict: Predict, guidance_scale: float,
    null_class: int | None, null: Mapping[str, Any] | None, side: dict[str, Any],
) -> jax.Array:
    """Take all steps: x becomes the sum of image, x, noise and fresh noise by these weights."""
    check_array(x, rank=1, axes="(batch, ...)")
    check_predict(predict)
    side = held({name: value for name, value in side.items() if value is not None})
    check_denoiser(net)
    check_null(null_class, null)
    if guidance_scale != 1 and null_class is None and null is None:
        raise LayerError("a null_class for guidance, or null", "none",
                         "pass what stood for none in denoising(..., null_class=) or (..., null=)")
    if guidance_scale != 1 and null is None and "condition" not in side:
        raise LayerError("a condition for guidance", "none", "pass condition=labels")
    none = {} if guidance_scale == 1 else untold(side, null_class, null)
    now, _ = _path(schedule, len(weights["x"]))
    each = weights | {"signal": np.sqrt(now), "spread": np.sqrt(1 - now)}
    each = {name: jnp.asarray(values, wide(x).dtype) for name, values in each.items()}
    times = jnp.asarray(_times(len(schedule), len(now)), jnp.int32)
    return _scanned(params, {} if state is None else state, x, key, times, each, side,
                    none, None if guidance_scale == 1 else guidance_scale, net=net, predict=predict)


@functools.partial(jax.jit, static_argnames=("net", "predict"))
def _scanned(
    params: Params, state: State, x: jax.Array, key: jax.Array | None, times: jax.Array,
    each: dict[str, jax.Array], side: dict[str, Any], none: dict[str, Any], guidance_scale: Any, *,
    net: Layer, predict: Predict,
) -> jax.Array:
    held, inside = outside((params, state, side, none))  # what all steps read

    def step(seen: jax.Array, now: Any) -> tuple[jax.Array, None]:
        params, state, side, none = inside(held)
        ask = _asking(net, params, state, side, none, guidance_scale)
        time, w = now
        y = ask(seen.astype(x.dtype), beside(jnp.full(x.shape[:1], time), x))
        check_prediction(y, x)
        image, noise = image_and_noise(wide(y), seen, w["signal"], w["spread"], predict)
        mean = w["image"] * image + w["x"] * seen + w["noise"] * noise
        if key is None:
            return mean, None
        fresh = jax.random.normal(jax.random.fold_in(key, time), x.shape, seen.dtype)
        return mean + w["fresh"] * beside(fresh, x), None

    begun = settled(lambda seen, now: step(seen, now)[0], wide(x), (times, each))
    return jax.lax.scan(step, begun, (times, each))[0].astype(x.dtype)


def _asking(
    net: Layer, params: Params, state: State, side: dict[str, Any], none: dict[str, Any],
    guidance_scale: Any,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """What the net predicts of x at a time; with guidance, beyond what it predicts of none."""

    def ask(x: jax.Array, time: jax.Array, **other: Any) -> jax.Array:
        return net.apply(params, state, x, time=time, **side | other)[0]

    if guidance_scale is None:
        return ask

    def both(x: jax.Array, time: jax.Array) -> jax.Array:
        pairs = jax.tree.map(lambda own, none: jnp.stack([own, beside(none, own)]),
                             {name: side[name] for name in none}, none)
        told, free = jax.vmap(lambda own: ask(x, time, **own))(pairs)
        return free + guidance_scale * (told - free)

    return both
