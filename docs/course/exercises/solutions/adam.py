"""Adam, solved."""

import jax
import jax.numpy as jnp


def step(
    w: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array, t: int, rate: float = 1e-3,
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    size = jnp.sqrt(v / (1 - b2**t)) + eps
    return w - rate * m / (1 - b1**t) / size, m, v
