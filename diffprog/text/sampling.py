"""Sampling of the next token: temperature, top-k, top-p, and one key or one for each row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffprog.core.arguments import check_array, check_count
from diffprog.core.dtypes import is_key, wide
from diffprog.core.errors import LayerError
from diffprog.core.notation import show
from diffprog.text.prompts import NO_TOKEN

__all__ = ["sample"]

Temperature = float | jax.Array | np.ndarray


def sample(
    key: jax.Array, logits: jax.Array, *, temperature: Temperature = 1.0,
    top_k: int | None = None, top_p: float | None = None,
) -> jax.Array:
    """Sample ids: ``id ~ softmax(logits / temperature)``, among the most probable ones.

    Shapes:
        logits: (..., vocabulary) -> ints (...), -1 for a row with a NaN logit.

    Args:
        key, temperature, top_k, top_p: as in `generate`; keys and temperatures are one for all
            rows, or (...). Temperature 0 is argmax, whatever the key is.

    Raises:
        LayerError: an argument is out of its range or has another shape.

    Example:
        >>> int(dp.text.sample(jax.random.key(0), jnp.array([0.0, 9.0, 1.0]), top_k=1))
        1
    """
    check_array(logits, 1, "(..., vocabulary)")
    check_sampling(temperature, top_k, top_p, logits.shape[:-1])
    check_top_k(top_k, logits.shape[-1])
    valid = ~jnp.isnan(logits).any(-1)
    if is_greedy(temperature):
        return jnp.where(valid, logits.argmax(-1), NO_TOKEN)
    check_keys(key, logits.shape[:-1])
    ids = draw(key, logits, traced_options(temperature, top_p), top_k)
    return jnp.where(valid, ids, NO_TOKEN)


def is_greedy(temperature: Any) -> bool:
    """Is the temperature known to be 0 in all rows?"""
    return not isinstance(temperature, Tracer) and bool(np.all(np.asarray(temperature) == 0))


def traced_options(temperature: Any, top_p: float | None) -> dict[str, Any]:
    """The options that a program takes as arrays, so that other values need no compilation."""
    return {"temperature": jnp.asarray(temperature, float), "top_p": None if top_p == 1 else top_p}


def draw(
    key: jax.Array, logits: jax.Array, options: dict[str, Any], top_k: int | None
) -> jax.Array:
    """Sampled ids (...) by logits (..., vocabulary); sorts only for top_k or top_p."""
    logits = wide(logits)
    temperature = options["temperature"].astype(logits.dtype)
    temperature = jnp.broadcast_to(temperature, logits.shape[:-1])    # (...)
    cold = temperature == 0
    argmax = logits.argmax(-1).astype(jnp.int32)
    logits = logits / jnp.where(cold, 1, temperature)[..., None]
    categorical = vmap_keys(
        key, lambda key, logits: jax.random.categorical(key, logits).astype(jnp.int32))
    if top_k is None and options["top_p"] is None:
        return jnp.where(cold, argmax, categorical(key, logits))
    logits, order = jax.lax.top_k(logits, logits.shape[-1] if top_k is None else top_k)
    if options["top_p"] is not None:
        probs = jax.nn.softmax(logits)
        before = probs.cumsum(-1) - probs
        logits = jnp.where(before < options["top_p"], logits, -jnp.inf)
    place = categorical(key, logits)                                  # (...), index in the order
    token = jnp.take_along_axis(order, place[..., None], axis=-1)[..., 0]
    return jnp.where(cold, argmax, token)


def vmap_keys(key: Any, function: Any) -> Any:
    """``function(key, ...)``, mapped over all axes of an array of keys."""
    for _ in range(len(_key_shape(key))):
        function = jax.vmap(function)
    return function


def log_prob(logits: jax.Array, token: jax.Array) -> jax.Array:
    """The log-probability (...) of tokens (...) by logits (..., vocabulary)."""
    logits = wide(logits)
    own = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def check_keys(key: Any, rows: tuple[int, ...]) -> None:
    """Raise unless it is one key, or one for each row."""
    raw = getattr(key, "dtype", None) == np.uint32 and key.shape[-1:] in ((2,), (4,))
    if not (is_key(key) or raw) or _key_shape(key) not in ((), rows):
        raise LayerError(f"a key, or one for each row, {rows}", show(key),
                         "pass jax.random.key(seed), or jax.random.split(key, rows)")


def check_sampling(
    temperature: Any, top_k: int | None, top_p: float | None, rows: tuple[int, ...]
) -> None:
    """Raise for options out of their range; the values of traced temperatures are not checked."""
    if np.shape(temperature) not in ((), rows):
        raise LayerError(f"one temperature, or one for each row, {rows}", show(temperature),
                         "pass a number, or an array of this shape")
    if not isinstance(temperature, Tracer):
        each = np.asarray(temperature).reshape(-1)
        # Smaller numbers are 0 in float32.
        wrong = [t for t in each.tolist() if isinstance(t, (str, bool)) or t is None
                 or not (t == 0 or 1e-30 <= t < np.inf)]
        if wrong:
            raise LayerError("temperature as 0 or a number of at least 1e-30", repr(wrong[0]),
                             "choose 0 for greedy decoding, 1 for the probabilities of the net")
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and (np.shape(top_p) or not 0 < top_p <= 1):
        raise LayerError("top_p in (0, 1]", show(top_p),
                         "pass a probability, or None to leave it out")


def check_top_k(top_k: int | None, vocabulary: int) -> None:
    """Raise if top_k exceeds the vocabulary."""
    if top_k is not None and top_k > vocabulary:
        raise LayerError(f"top_k of at most {vocabulary}, the vocabulary", repr(top_k), "lower it")


def _key_shape(key: Any) -> tuple[int, ...]:
    """The shape of an array of keys, without the last axis of raw uint32 keys."""
    return key.shape if is_key(key) else key.shape[:-1]
