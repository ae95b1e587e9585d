"""Attention: each query takes a mean of the values, weighted by how well the keys fit it.

    y[t] = sum_s w[t, s] v[s],    w[t] = softmax over s of (q[t] . k[s] / sqrt(D))

A key whose mask is False has no weight.
"""

import jax


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """query (T, D), key (S, D), value (S, E), mask (S,) of booleans -> (T, E)."""
    raise NotImplementedError
