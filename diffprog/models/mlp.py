"""The multilayer perceptron: linear maps with an activation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from diffprog.core.arguments import check_count
from diffprog.core.errors import LayerError
from diffprog.core.factories import known
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.linear import linear
from diffprog.wiring.combinators import serial

__all__ = ["mlp"]


@known
def mlp(
    hidden: Sequence[int], features: int, *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu, dropout: float = 0.0,
) -> Layer:
    """Multilayer perceptron: ``y = W_n a(... a(W_1 x + b_1) ...) + b_n``.

    Shapes:
        x: (..., D) -> (..., features).
        params: ``body/linear_<i>`` for each hidden size, ``head``.

    Args:
        hidden: sizes of the hidden layers, in order; an empty sequence makes a single linear layer.
        features: size of the last axis of y.
        activation: a JAX function of arrays, or a layer.
        dropout: dropout rate of the hidden layers, in [0, 1).

    Raises:
        LayerError: at composition, for sizes that are not positive ints.

    Example:
        >>> net = dp.models.mlp((64, 32), 10)
        >>> net
        serial(body=serial(linear(64), jax.nn.relu, linear(32), jax.nn.relu), head=linear(10))

    Source: Rumelhart, Hinton, Williams 1986, Nature 323, 533-536.
    """
    if isinstance(hidden, int) or not isinstance(hidden, Sequence):
        raise LayerError("hidden as a sequence of sizes", show(hidden),
                         "pass (64, 32), for example")
    check_count("features", features)
    body = []
    for size in hidden:
        body += [linear(size), activation]
        if dropout:
            body.append(dropping(dropout))
    head = linear(features)
    return serial(body=serial(*body), head=head) if body else serial(head=head)
