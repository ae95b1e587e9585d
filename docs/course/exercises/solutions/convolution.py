"""A convolution, solved: a sum over the places of the kernel."""

import jax
import jax.numpy as jnp


def convolution(kernel: jax.Array, x: jax.Array) -> jax.Array:
    places, time = len(kernel), x.shape[-2]
    around = [(0, 0)] * (x.ndim - 2) + [(places // 2, places // 2), (0, 0)]
    padded = jnp.pad(x, around)
    y = sum(padded[..., j : j + time, :] @ kernel[j] for j in range(places))
    return jnp.asarray(y, x.dtype)
