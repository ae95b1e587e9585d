"""A residual block, solved: with W2 = 0 the branch is silent at first."""

import jax
import jax.numpy as jnp


def init(key: jax.Array, features: int, hidden: int) -> dict[str, jax.Array]:
    first = jax.random.normal(key, (features, hidden)) * jnp.sqrt(2 / features)
    return {"first": first, "second": jnp.zeros((hidden, features))}


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    normal = centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    branch = jax.nn.relu(normal @ params["first"]) @ params["second"]
    return x + branch.astype(x.dtype)
