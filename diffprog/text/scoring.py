"""Log-probabilities of given texts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.layer import Layer
from diffprog.core.plans import Params, State
from diffprog.text.prompts import PromptBatch, Prompts, check_logits_shape, prepare
from diffprog.text.sampling import log_prob

__all__ = ["log_probabilities"]


def log_probabilities(
    net: Layer, params: Params, texts: Prompts, *, state: State | None = None, **side: Any
) -> jax.Array:
    """Log-probability of each token of given texts: ``y[t] = log p(text[t + 1] | text[: t + 1])``.

    In nats. For a text that `generate` wrote after a prompt of n tokens, ``y[:, n - 1 :]`` belongs
    to the generated tokens and sums to the log_probs of `generate`. ``-y.mean()`` is the
    cross-entropy.

    Shapes:
        Returns floats (batch, longest - 1), 0 after the end of a text.

    Args:
        net, params, state: as in `generate`.
        texts: ints (batch, time), or a list of lists of ints, which may differ in length.
        side: as in `generate`.

    Raises:
        LayerError: as in `generate` for prompts. Ids outside the vocabulary give NaN.

    Example:
        >>> net = dp.models.gpt(11, length=8, width=16, depth=2, heads=4)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((1, 8), int))
        >>> written = dp.text.generate(net, params, [[1, 2, 3]], 5)
        >>> text = jnp.concatenate([jnp.array([[1, 2, 3]]), written.tokens], 1)
        >>> y = dp.text.log_probabilities(net, params, text)
        >>> bool(jnp.allclose(y[:, 2:].sum(1), written.log_probs, rtol=1e-3))
        True
    """
    batch = prepare(net, params, state, texts, 1, side)
    y = _log_probs(batch, net=net)                                    # (batch, width - 1)
    width = y.shape[1] + 1
    lengths = np.full(len(y), width) if batch.mask is None else np.asarray(batch.mask).sum(1)
    # Texts are padded on the left; the result is aligned on the left.
    place = np.arange(lengths.max() - 1) + (width - lengths)[:, None]  # (batch, longest - 1)
    y = jnp.take_along_axis(y, jnp.asarray(np.minimum(place, width - 2)), 1)
    return jnp.where(place < width - 1, y, 0)


@functools.partial(jax.jit, static_argnames="net")
def _log_probs(batch: PromptBatch, *, net: Layer) -> jax.Array:
    """The log-probability of all ids but the first of each row, padding included."""
    ids = jnp.asarray(batch.ids)
    logits, _ = net.apply(batch.params, batch.state, ids, mask=batch.mask, **batch.side)
    check_logits_shape(logits, ids)
    return log_prob(logits[:, :-1], ids[:, 1:])
