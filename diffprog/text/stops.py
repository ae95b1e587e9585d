"""Where a text ends: at a token, or at several in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.errors import LayerError

Stop = tuple[tuple[int, ...], ...]


def as_stop(stop: Sequence[Any]) -> Stop:
    """Each end as a tuple of ints, by which programs are remembered."""
    if not isinstance(stop, (list, tuple, range)) and not np.ndim(stop):
        raise LayerError("stop_tokens as a sequence of ids", repr(stop),
            "pass stop_tokens=[0], for example")
    ends = [np.atleast_1d(np.asarray(end)) for end in stop]
    for given, end in zip(stop, ends, strict=True):
        if end.ndim != 1 or not end.size or end.dtype.kind not in "iu":
            raise LayerError("ends of a text as ids, or as sequences of ids", repr(given),
                             "pass stop_tokens=[0, [4, 2]], for example")
    return tuple(tuple(map(int, end)) for end in ends)


def check_stop(stop: Stop, vocabulary: int) -> None:
    """Raise for what a vocabulary of this size does not have."""
    if wrong := [token for end in stop for token in end if not 0 <= token < vocabulary]:
        raise LayerError(f"stop tokens in [0, {vocabulary})", repr(wrong[0]),
                         "leave it out: the net can never write it")


def ending(texts: jax.Array, step: Any, stop: Stop) -> dict[int, jax.Array]:
    """Token -> which texts (..., steps) it would end, if it stood at this step.

    What an end begins with is looked for in what was written, not in the prompt.
    """
    found: dict[int, jax.Array] = {}
    for *begin, last in stop:
        if len(begin) >= texts.shape[-1]:
            continue  # there will never be so many tokens
        before = jax.lax.dynamic_slice_in_dim(texts, step - len(begin), len(begin), axis=-1)
        wanted = jax.lax.broadcast_to_rank(jnp.asarray(begin, texts.dtype), texts.ndim)
        here = (before == wanted).all(-1) & (step >= len(begin))
        found[last] = found[last] | here if last in found else here
    return found
