"""A leaf is drawn from a key of its own, which depends on its path alone.

So inserting a layer disturbs no sibling, and the same key gives the same network everywhere. What
it is drawn from is an initializer: a function ``(key, shape, dtype) -> array`` as those of
`jax.nn.initializers`, or the name of one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.dtypes import joint
from diffprog.errors import LayerError
from diffprog.notation import listed, show

Initializer = str | Callable[..., jax.Array]

_KINDS = jax.nn.initializers
INITIALIZERS: dict[str, Callable[..., jax.Array]] = {
    "zeros": _KINDS.zeros, "ones": _KINDS.ones,
    "normal": _KINDS.normal(0.02), "truncated_normal": _KINDS.truncated_normal(0.02),
    "lecun_normal": _KINDS.lecun_normal(), "lecun_uniform": _KINDS.lecun_uniform(),
    "glorot_normal": _KINDS.glorot_normal(), "glorot_uniform": _KINDS.glorot_uniform(),
    "he_normal": _KINDS.he_normal(), "he_uniform": _KINDS.he_uniform(),
    "orthogonal": _KINDS.orthogonal(), "delta_orthogonal": _KINDS.delta_orthogonal(),
}


def fold(key: jax.Array, name: str) -> jax.Array:
    """The key of the child `name`: it depends on the name alone, so siblings never disturb it."""
    return _folded(key, *_words(name))


def parameter(
    key: jax.Array, name: str, initializer: Initializer, shape: tuple[int, ...], x: Any
) -> jax.Array:
    """Draw the leaf `name` for input x: float64 if x is, else float32, from its own key.

    The draw is jitted, so that it compiles once for an initializer and shape, and gives the same
    bits whether the caller is eager, jitted, mapped or sharded. Its key is found by a program of
    its own, the same for all leaves: as a part of each draw it would take a third of its compiling.
    """
    draw = INITIALIZERS.get(initializer) if isinstance(initializer, str) else initializer
    if not callable(draw):
        raise LayerError(f"{name}_init as a function (key, shape, dtype) or a name "
                         f"({listed(INITIALIZERS)})", show(initializer),
                         "pass jax.nn.initializers.normal(0.02), for example")
    return _draw(fold(key, name), draw, shape, parameter_dtype(x))


def parameter_dtype(x: Any) -> Any:
    """The dtype of parameters and statistics for input x: float64 if x is, else float32."""
    return joint(x.dtype, jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: jax.Array, initializer: Any, shape: Any, dtype: Any) -> jax.Array:
    return initializer(key, shape, dtype)


@functools.partial(jax.jit, inline=True)  # one dispatch for both folds, and no call in a trace
def _folded(key: jax.Array, high: Any, low: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, high), low)


@functools.cache
def _words(name: str) -> tuple[np.uint32, np.uint32]:
    """A hash of the name, the same everywhere: of 64 bits, since names collide in 32."""
    high, low = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), "<u4")
    return high, low
