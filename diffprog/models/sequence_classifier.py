"""Sequence classification: embed, encode, collapse to one vector, and classify."""

from __future__ import annotations

from typing import Any

from diffprog.core.arguments import check_count
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.layers.collapse import collapse
from diffprog.layers.embedding import embedding
from diffprog.layers.linear import linear
from diffprog.layers.masking import hide
from diffprog.wiring.combinators import serial

__all__ = ["sequence_classifier"]


@known
def sequence_classifier(
    vocabulary: int, classes: int, body: Any, *, width: int = 128, method: str = "mean"
) -> Layer:
    """The logits of classes: ``y = collapse(body(embed(x))) @ W + b``.

    Shapes:
        x: ints (batch, time) in [0, vocabulary) -> (batch, classes).
        mask: booleans (batch, time), True for valid tokens; padding has no effect.
        params: ``embed``, ``body``, ``collapse`` if it attends, and ``head``.

    Args:
        vocabulary: number of tokens.
        classes: number of classes.
        body: a layer of vectors, (batch, time, width) -> (batch, time, D), such as
            ``recurrent(gru(128), bidirectional=True)`` or ``sinusoidal_positions() >>
            transformer_encoder(2)``.
        width: size of the embedding vectors.
        method: how the sequence becomes one vector, as in `collapse`.

    Raises:
        LayerError: as `collapse` and the body.

    Example:
        >>> body = dp.recurrent(dp.gru(16))
        >>> net = dp.models.sequence_classifier(11, 3, body, width=8, method="last")
        >>> net.plan(jnp.ones((2, 5), int)).y.shape
        (2, 3)

    Source: with method="mean" and no body: Joulin et al. 2016, arXiv:1607.01759.
    """
    check_count("classes", classes)
    return serial(hide=hide(), embed=embedding(vocabulary, width), body=body,
                  collapse=collapse(method), head=linear(classes))
