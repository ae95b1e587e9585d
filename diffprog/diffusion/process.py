"""The diffusion process: noise is added to an image step by step.

``x_t = sqrt(a_t) * x + sqrt(1 - a_t) * noise``. A schedule is the array of a_t, t = 0, 1, ...,
which the papers call alpha-bar_1, alpha-bar_2, ...: the fraction of the variance that belongs to
the image. A net predicts the noise, or the velocity ``sqrt(a_t) * noise - sqrt(1 - a_t) * x``, the
derivative of x_t by the angle arccos(sqrt(a_t)). Either one, with x_t, determines the image.

Ho, Jain, Abbeel 2020, arXiv:2006.11239; Salimans and Ho 2022, arXiv:2202.00512.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array, check_count
from diffprog.core.dtypes import wide
from diffprog.core.errors import LayerError
from diffprog.core.meshes import placed, reshaped
from diffprog.core.notation import show

__all__ = ["add_noise", "cosine_noise", "linear_noise"]

Predict = Literal["noise", "velocity"]


def linear_noise(
    steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
) -> np.ndarray:
    """The schedule of linear variances: ``a_t = prod(1 - beta_0, ..., 1 - beta_t)``.

    Args:
        steps: number of steps; positive.
        beta_start, beta_end: fraction of variance replaced by noise in the first and in the last
            step, in (0, 1). The defaults of the paper fit 1000 steps; use larger ones for fewer.

    Raises:
        LayerError: beta_start or beta_end is outside (0, 1).

    Example:
        >>> dp.diffusion.linear_noise(2, beta_start=0.5, beta_end=0.75).tolist()
        [0.5, 0.125]

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, section 4.
    """
    check_count("steps", steps)
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta < 1:
            raise LayerError(f"{name} in (0, 1)", repr(beta), "pass a fraction of the variance")
    return np.cumprod(1 - np.linspace(beta_start, beta_end, steps))


def cosine_noise(steps: int = 1000, *, offset: float = 0.008) -> np.ndarray:
    """The cosine schedule: ``a_t = f(t + 1) / f(0)``, ``f(t) = cos(angle(t))**2``.

    The angle is ``(t / steps + offset) / (1 + offset) * pi / 2``. A step replaces at most 99.9 % of
    the variance, so that a_t stays positive.

    Args:
        steps: number of steps; positive.
        offset: keeps the noise of the first steps from vanishing; not negative.

    Raises:
        LayerError: offset is negative.

    Example:
        >>> [round(a, 3) for a in dp.diffusion.cosine_noise(4).tolist()]
        [0.847, 0.494, 0.144, 0.0]

    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    check_count("steps", steps)
    if not offset >= 0:
        raise LayerError("offset of at least 0", repr(offset), "pass 0.008, as the paper does")
    position = (np.arange(steps + 1) / steps + offset) / (1 + offset)  # in (0, 1]
    f = np.cos(position * math.pi / 2) ** 2
    return np.cumprod(np.maximum(f[1:] / f[:-1], 1e-3))


def add_noise(x: jax.Array, noise: jax.Array, schedule: np.ndarray, time: jax.Array) -> jax.Array:
    """Noisy images at given steps: ``x_t = sqrt(a_t) * x + sqrt(1 - a_t) * noise``.

    Shapes:
        x: (batch, ...) -> the same.
        noise: the shape of x, standard normal.
        schedule: (steps,).
        time: ints (batch,) in [0, steps), the step t of each example. Others give NaN: values
            cannot be checked under `jax.jit`.

    Raises:
        LayerError: an invalid schedule, as in `denoising`; arrays of other shapes.

    Example:
        >>> x, noise = jnp.full((2, 1), 10.0), jnp.ones((2, 1))
        >>> y = dp.diffusion.add_noise(x, noise, np.array([0.64, 0.36]), jnp.array([0, 1]))
        >>> [round(float(number), 3) for number in y[:, 0]]
        [8.6, 6.8]

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, eq. 4.
    """
    check_array(x, rank=1, axes="(batch, ...)")
    if noise.shape != x.shape or time.shape != x.shape[:1]:
        raise LayerError(f"noise of shape {x.shape} and time of shape {x.shape[:1]}",
                         f"{show(noise)} and {show(time)}", "draw noise for each number of x")
    signal, spread = scales(check_schedule(schedule), time, x)
    image, noise = x.astype(signal.dtype), noise.astype(signal.dtype)
    return (signal * image + spread * noise).astype(x.dtype)


def check_schedule(schedule: Any) -> np.ndarray:
    """The schedule in float64; raise unless it is decreasing in (0, 1)."""
    values = np.asarray(schedule, np.float64)
    if values.ndim != 1 or not values.size or not (
            0 < values[-1] and values[0] < 1 and (np.diff(values) < 0).all()):
        raise LayerError("a schedule (steps,) that decreases in (0, 1)", show(schedule),
                         "pass cosine_noise(1000), for example")
    return values


def scales(schedule: Any, time: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``sqrt(a_t)`` and ``sqrt(1 - a_t)``, (batch, 1, ...) of the rank of x, float32 or wider."""

    def at_time(values: np.ndarray) -> jax.Array:
        scale = jnp.asarray(values, wide(x).dtype).at[time].get(
            mode="fill", fill_value=np.nan, wrap_negative_indices=False,
            out_sharding=placed(time, time.ndim, 0))
        return reshaped(scale, time.ndim, *(1,) * (x.ndim - time.ndim))

    return at_time(np.sqrt(schedule)), at_time(np.sqrt(1 - np.asarray(schedule)))


def image_and_noise(
    y: jax.Array, x: jax.Array, signal: jax.Array, spread: jax.Array, predict: Predict
) -> tuple[jax.Array, jax.Array]:
    """The two parts of ``x = signal * image + spread * noise``, by the prediction y of a net."""
    if predict == "noise":
        return (x - spread * y) / signal, y
    return signal * x - spread * y, spread * x + signal * y
