"""A step of Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1).

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
    w = w - rate * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The first step has t = 1; m and v begin at zero.
"""

import jax


def step(
    w: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array, t: int, rate: float = 1e-3,
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Parameters, moments, gradient and number of the step -> the new w, m and v."""
    raise NotImplementedError
