"""A convolution over time, as networks compute it: the kernel is not flipped.

    y[t, o] = sum_j sum_i w[j, i, o] x[t + j - (J - 1) / 2, i]

J is odd, and x is zero outside. The output has the dtype of x. Use neither `jax.lax.conv` nor
`np.convolve`.
"""

import jax


def convolution(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """kernel (J, I, O), x (..., T, I) -> (..., T, O)."""
    raise NotImplementedError
