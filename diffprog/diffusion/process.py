"""The diffusion process: an image is noised step by step.

``x_t = sqrt(a_t) * x + sqrt(1 - a_t) * noise``. A schedule is the array of a_t for t = 0, 1, ...,
in the papers alpha-bar of 1, 2, ...: the fraction of the variance that is still image. What a net
predicts is the noise, or the velocity ``sqrt(a_t) * noise - sqrt(1 - a_t) * x``, the derivative of
x_t by the angle arccos(sqrt(a_t)); each of them gives the other, and x.

Ho, Jain, Abbeel 2020, arXiv:2006.11239; Salimans and Ho 2022, arXiv:2202.00512.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array, check_count
from diffprog.core.errors import LayerError
from diffprog.core.meshes import placed, reshaped
from diffprog.core.notation import show
from diffprog.losses.entries import wide

__all__ = ["add_noise", "cosine_noise", "linear_noise"]

Predict = Literal["noise", "velocity"]


def linear_noise(
    steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
) -> np.ndarray:
    """Noise whose variance grows in equal parts: ``a_t = prod(1 - beta_0, ..., 1 - beta_t)``.

    Args:
        steps: how many; positive.
        beta_start, beta_end: variance that the first and the last step add, in (0, 1). The
            paper's are for 1000 steps; for fewer, take larger ones.

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
            raise LayerError(f"{name} in (0, 1)", repr(beta), "pass a share of the variance")
    return np.cumprod(1 - np.linspace(beta_start, beta_end, steps))


def cosine_noise(steps: int = 1000, *, offset: float = 0.008) -> np.ndarray:
    """Noise that comes and goes gently: ``a_t = f(t + 1) / f(0)``, ``f(t) = cos(angle of t)**2``.

    The angle is ``(t / steps + offset) / (1 + offset) * pi / 2``. No step takes more than 99.9 %
    of the variance, so that the last ones leave something.

    Args:
        steps: how many; positive.
        offset: keeps the first steps from being too small to matter; not negative.

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
    share = (np.arange(steps + 1) / steps + offset) / (1 + offset)
    kept = np.cos(share * math.pi / 2) ** 2
    return np.cumprod(np.maximum(kept[1:] / kept[:-1], 1e-3))


def add_noise(x: jax.Array, noise: jax.Array, schedule: np.ndarray, time: jax.Array) -> jax.Array:
    """What is left of x after some steps: ``x_t = sqrt(a_t) * x + sqrt(1 - a_t) * noise``.

    Shapes:
        x: (batch, ...) -> the same.
        noise: of the shape of x, standard normal.
        schedule: (steps,).
        time: ints (batch,) in [0, steps), the t of each example; others give NaN, because nothing
            can be raised under `jax.jit`.

    Raises:
        LayerError: as `denoising` does, and for arrays of other shapes.

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
    signal, spread = shares(checked(schedule), time, x)
    image, noise = x.astype(signal.dtype), noise.astype(signal.dtype)
    return (signal * image + spread * noise).astype(x.dtype)


def checked(schedule: Any) -> np.ndarray:
    """A schedule in float64; raise unless it falls from step to step inside of (0, 1)."""
    found = np.asarray(schedule, np.float64)
    if found.ndim != 1 or not found.size or not (
            0 < found[-1] and found[0] < 1 and (np.diff(found) < 0).all()):
        raise LayerError("a schedule of numbers that fall inside of (0, 1)", show(schedule),
                         "pass cosine_noise(1000), for example")
    return found


def shares(schedule: Any, time: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What image and noise are multiplied by at these steps; axes as x, float32 or wider."""
    def own(share: np.ndarray) -> jax.Array:
        found = jnp.asarray(share, wide(x).dtype).at[time].get(
            mode="fill", fill_value=np.nan, wrap_negative_indices=False,
            out_sharding=placed(time, time.ndim, 0))
        return reshaped(found, time.ndim, *(1,) * (x.ndim - time.ndim))

    return own(np.sqrt(schedule)), own(np.sqrt(1 - np.asarray(schedule)))


def image_and_noise(
    y: jax.Array, x: jax.Array, signal: jax.Array, spread: jax.Array, predict: Predict
) -> tuple[jax.Array, jax.Array]:
    """The two parts of ``x = signal * image + spread * noise``, by what a net predicts of it."""
    if predict == "noise":
        return (x - spread * y) / signal, y
    return signal * x - spread * y, spread * x + signal * y
