"""Drawing of the next token: by temperature, of the likeliest alone, by one key or one for each."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffprog.core.arguments import check_array, check_count
from diffprog.core.errors import LayerError
from diffprog.core.notation import show
from diffprog.losses.entries import wide
from diffprog.text.prompts import NOTHING

__all__ = ["sample"]

Temperature = float | jax.Array | np.ndarray


def sample(
    key: jax.Array, logits: jax.Array, *, temperature: Temperature = 1.0,
    top_k: int | None = None, top_p: float | None = None,
) -> jax.Array:
    """Draw ids: ``id ~ softmax(logits / temperature)``, of the likeliest alone.

    Shapes:
        logits: (..., vocabulary) -> ints (...), -1 where a logit is NaN.

    Args:
        key, temperature, top_k, top_p: as in `generate`, keys and temperatures being one for all
            rows or (...); at temperature 0 the first of the likeliest, whatever the key is.

    Raises:
        LayerError: an argument is out of its range or of another shape.

    Example:
        >>> int(dp.text.sample(jax.random.key(0), jnp.array([0.0, 9.0, 1.0]), top_k=1))
        1
    """
    check_array(logits, 1, "(..., vocabulary)")
    check_sampling(temperature, top_k, top_p, logits.shape[:-1])
    check_top_k(top_k, logits.shape[-1])
    known = ~jnp.isnan(logits).any(-1)
    if is_greedy(temperature):
        return jnp.where(known, logits.argmax(-1), NOTHING)
    check_keys(key, logits.shape[:-1])
    return jnp.where(known, drawn(key, logits, numbers(temperature, top_p), top_k), NOTHING)


def is_greedy(temperature: Any) -> bool:
    """Is it known that nothing is drawn?"""
    return not isinstance(temperature, Tracer) and bool(np.all(np.asarray(temperature) == 0))


def numbers(temperature: Any, top_p: float | None) -> dict[str, Any]:
    """What a program is given as values, so that others need none of their own."""
    return {"temperature": jnp.asarray(temperature, float), "top_p": None if top_p == 1 else top_p}


def drawn(
    key: jax.Array, logits: jax.Array, numbers: dict[str, Any], top_k: int | None
) -> jax.Array:
    """Draw of the likeliest; nothing is sorted where all tokens may be drawn."""
    logits = wide(logits)
    temperature = numbers["temperature"].astype(logits.dtype)
    temperature = jnp.broadcast_to(temperature, logits.shape[:-1])
    cold, likeliest = temperature == 0, logits.argmax(-1).astype(jnp.int32)
    logits = logits / jnp.where(cold, 1, temperature)[..., None]
    choose = over_keys(key, lambda *given: jax.random.categorical(*given).astype(jnp.int32))
    if top_k is None and numbers["top_p"] is None:
        return jnp.where(cold, likeliest, choose(key, logits))
    logits, order = jax.lax.top_k(logits, logits.shape[-1] if top_k is None else top_k)
    if numbers["top_p"] is not None:
        shares = jax.nn.softmax(logits)
        logits = jnp.where(shares.cumsum(-1) - shares < numbers["top_p"], logits, -jnp.inf)
    place = choose(key, logits)
    token = jnp.take_along_axis(order, place[..., None], axis=-1)[..., 0]
    return jnp.where(cold, likeliest, token)


def over_keys(key: jax.Array, function: Any) -> Any:
    """A function of a key and more, mapped over several keys: each row draws by its own."""
    for _ in range(len(_shape(key))):
        function = jax.vmap(function)
    return function


def surprise(logits: jax.Array, token: jax.Array) -> jax.Array:
    """The log-probability of a token."""
    logits = wide(logits)
    own = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def check_keys(key: Any, rows: tuple[int, ...]) -> None:
    """Raise unless it is one key, or one for each row."""
    typed = jnp.issubdtype(getattr(key, "dtype", bool), jax.dtypes.prng_key)
    raw = getattr(key, "dtype", None) == np.uint32 and key.shape[-1:] in ((2,), (4,))
    if not (typed or raw) or _shape(key) not in ((), rows):
        raise LayerError(f"a key, or one for each row, {rows}", show(key),
                         "pass jax.random.key(seed), or jax.random.split(key, rows)")


def check_sampling(
    temperature: Any, top_k: int | None, top_p: float | None, rows: tuple[int, ...]
) -> None:
    """Raise for what cannot be drawn by; of traced temperatures only the shape is known."""
    if np.shape(temperature) not in ((), rows):
        raise LayerError(f"one temperature, or one for each row, {rows}", show(temperature),
                         "pass a number, or an array of this shape")
    if not isinstance(temperature, Tracer):
        each = np.asarray(temperature).reshape(-1)
        # Less is 0 in float32.
        wrong = [t for t in each.tolist() if isinstance(t, (str, bool)) or t is None
                 or not (t == 0 or 1e-30 <= t < np.inf)]
        if wrong:
            raise LayerError("temperature as 0 or a number of at least 1e-30", repr(wrong[0]),
                             "choose 0 for the likeliest token, 1 to draw as the net says")
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and (np.shape(top_p) or not 0 < top_p <= 1):
        raise LayerError("top_p in (0, 1]", show(top_p),
                         "pass a probability, or None to leave it out")


def check_top_k(top_k: int | None, vocabulary: int) -> None:
    """Raise for more tokens than there are."""
    if top_k is not None and top_k > vocabulary:
        raise LayerError(f"top_k of at most {vocabulary}, the vocabulary", repr(top_k), "lower it")


def _shape(key: Any) -> tuple[int, ...]:
    """The shape of an array of keys, by the old kind of which one has an axis of its own."""
    return key.shape if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.shape[:-1]
