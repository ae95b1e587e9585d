"""A residual block with the norm first, for a net that is deep.

    y = x + W2 relu(W1 norm(x)),    norm(x) = (x - mean(x)) / sqrt(var(x) + 1e-5)

Mean and variance are over the features of each vector. There are no biases, and the norm has no
scale. The output has the dtype of x. The block must begin as the identity: choose the initial W2
accordingly.
"""

import jax


def init(key: jax.Array, features: int, hidden: int) -> dict[str, jax.Array]:
    """The parameters: "first" (features, hidden), "second" (hidden, features)."""
    raise NotImplementedError


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """x (..., features) -> (..., features)."""
    raise NotImplementedError
