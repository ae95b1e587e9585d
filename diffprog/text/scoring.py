"""How likely a net finds texts that are given."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.layer import Layer
from diffprog.core.plans import Params, State
from diffprog.text.prompts import Begin, Prompts, begun, check_scores
from diffprog.text.sampling import surprise

__all__ = ["log_probabilities"]


def log_probabilities(
    net: Layer, params: Params, texts: Prompts, *, state: State | None = None, **side: Any
) -> jax.Array:
    """Of texts that are given: ``y[t] = log p(text[t + 1] | text[: t + 1])``, in nats.

    Of a prompt of n tokens and what was written behind it, ``y[:, n - 1 :]`` is of what was
    written, and its sum is the score that `generate` gives; ``-y.mean()`` is the cross entropy.

    Shapes:
        Returns floats (batch, longest - 1), 0 behind the end of a text.

    Args:
        net, params, state: as in `generate`.
        texts: ints (batch, time), or a list of lists of ints, which may differ in length.
        side: as in `generate`.

    Raises:
        LayerError: as `generate` does of prompts. What is out of the vocabulary gives NaN.

    Example:
        >>> net = dp.models.gpt(11, length=8, width=16, depth=2, heads=4)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((1, 8), int))
        >>> written = dp.text.generate(net, params, [[1, 2, 3]], 5)
        >>> text = jnp.concatenate([jnp.array([[1, 2, 3]]), written.tokens], 1)
        >>> y = dp.text.log_probabilities(net, params, text)
        >>> bool(jnp.allclose(y[:, 2:].sum(1), written.log_probs, rtol=1e-3))
        True
    """
    begin = begun(net, params, state, texts, 1, side)
    y = _scored(begin, net=net)
    width = y.shape[1] + 1
    lengths = np.full(len(y), width) if begin.mask is None else np.asarray(begin.mask).sum(1)
    # Texts stand at the end of their rows.
    place = np.arange(lengths.max() - 1) + (width - lengths)[:, None]
    y = jnp.take_along_axis(y, jnp.asarray(np.minimum(place, width - 2)), 1)
    return jnp.where(place < width - 1, y, 0)


@functools.partial(jax.jit, static_argnames="net")
def _scored(begin: Begin, *, net: Layer) -> jax.Array:
    """Of each row, padding too, the log-probability of all tokens but the first."""
    ids = jnp.asarray(begin.ids)
    logits, _ = net.apply(begin.params, begin.state, ids, mask=begin.mask, **begin.side)
    check_scores(logits, ids)
    return surprise(logits[:, :-1], ids[:, 1:])
