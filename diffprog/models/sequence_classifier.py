"""A class for a sequence: read it, collapse it to one vector, and decide."""

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
    """The scores of classes: ``y = collapse(body(embed(x))) @ W + b``.

    Shapes:
        x: ints (batch, time) in [0, vocabulary) -> (batch, classes).
        mask: booleans (batch, time), True = real; padding changes nothing.
        params: ``embed``, ``body``, ``collapse`` if it attends, and ``head``.

    Args:
        vocabulary: how many ids there are.
        classes: how many.
        body: what maps vectors (batch, time, width) to vectors, such as
            ``recurrent(gru(128), bidirectional=True)`` or ``sinusoidal_positions() >>
            transformer_encoder(2)``.
        width: size of the vectors that are read.
        method: which vector stands for the sequence, as in `collapse`.

    Raises:
        LayerError: as `collapse` and the body do.

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
