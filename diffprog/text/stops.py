"""Stop tokens: a text ends with one of them, or with a sequence of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.errors import LayerError

Stop = tuple[tuple[int, ...], ...]


def as_stop(stop: Sequence[Any]) -> Stop:
    """The stop sequences as tuples of ints, which are hashable."""
    if not isinstance(stop, (list, tuple, range)) and not np.ndim(stop):
        raise LayerError("stop_tokens as a sequence of ids", repr(stop),
                         "pass stop_tokens=[0], for example")
    sequences = [np.atleast_1d(np.asarray(end)) for end in stop]
    for given, sequence in zip(stop, sequences, strict=True):
        if sequence.ndim != 1 or not sequence.size or sequence.dtype.kind not in "iu":
            raise LayerError("stop_tokens of ids, or of sequences of ids", repr(given),
                             "pass stop_tokens=[0, [4, 2]], for example")
    return tuple(tuple(map(int, sequence)) for sequence in sequences)


def check_stop(stop: Stop, vocabulary: int) -> None:
    """Raise for ids outside the vocabulary."""
    if wrong := [token for sequence in stop for token in sequence if not 0 <= token < vocabulary]:
        raise LayerError(f"stop_tokens in [0, {vocabulary})", repr(wrong[0]),
                         "leave it out: the net never generates it")


def stop_matches(texts: jax.Array, step: Any, stop: Stop) -> dict[int, jax.Array]:
    """Last token of a stop sequence -> the texts (..., steps) that it would end at this step.

    A stop sequence must lie in the generated tokens; the prompt is not searched.
    """
    matches: dict[int, jax.Array] = {}
    for *before, last in stop:
        if len(before) >= texts.shape[-1]:
            continue  # longer than any generated text
        tail = jax.lax.dynamic_slice_in_dim(texts, step - len(before), len(before), axis=-1)
        wanted = jax.lax.broadcast_to_rank(jnp.asarray(before, texts.dtype), texts.ndim)
        match = (tail == wanted).all(-1) & (step >= len(before))
        matches[last] = matches[last] | match if last in matches else match
    return matches
