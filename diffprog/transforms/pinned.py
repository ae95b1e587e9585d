"""A part with a mode of its own, whatever the net around it does."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from diffprog.core.computed import Pinned
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, around, as_layer
from diffprog.core.notation import code
from diffprog.core.plans import Params, State

__all__ = ["pin"]


@factory
def pin(layer: Any, *, train: bool) -> Layer:
    """The layer in one mode, whatever that of the net is: ``y = f(x, train=train)``.

    Pinned to inference, ``train=False``, it gives in training what it gives at rest without a key:
    it draws nothing, and its statistics stay as they are. So the batch norm of a pretrained body is
    kept in fine-tuning, and a teacher is ``freeze(pin(teacher, train=False))``: `pin` is of the
    mode, and gradients reach the parameters all the same; `freeze` is of the parameters.

    Pinned to training, ``train=True``, it gives at rest what it gives in training: dropout drops,
    which is Monte Carlo dropout, and batch norm takes the statistics of the batch, and moves its
    own in every call whose state is kept. What draws does so at rest where a key is given,
    ``net(params, x, state=state, key=key)``; without one it is at rest, like all that draws.

    Of two of them around each other the inner one counts, but what the outer one pins to inference
    is given no key. It keeps the kind and the names of what it wraps; ``replace(net,
    "**/batch_norm_*", lambda norm: pin(norm, train=False))`` finds parts by path. A stream goes on
    in either mode.

    Args:
        layer: any layer.
        train: the mode: True for training, False for inference.

    Raises:
        LayerError: at composition, if `train` is no bool.

    Example:
        >>> net = dp.linear(4) >> dp.batch_norm() >> dp.pin(dp.dropout(0.5), train=True)
        >>> x = jnp.ones((2, 3))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> keys = jax.random.split(jax.random.key(1), 100)
        >>> jax.vmap(lambda key: net(params, x, state=state, key=key))(keys).std(0).shape
        (2, 4)

    Source: Monte Carlo dropout: Gal and Ghahramani 2016, arXiv:1506.02142, section 4.
    """
    layer = as_layer(layer)
    if not isinstance(train, bool):
        raise LayerError("train as a Python bool", code(train),
                         "pass True for training, or False for inference")
    pinned = train

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        # At rest nothing needs a key; in training the layer itself asks for the one it lacks.
        quiet = layer.random and key is None and not train
        return layer.apply(params, state, x, key=key if pinned else None,
                           train=pinned and not quiet, **side)

    return dataclasses.replace(
        layer, apply=apply, planner=lambda x, side: layer.plan(x, **side),
        random=layer.random and pinned, computed=(Pinned(pinned), *layer.computed),
        **around(layer, lambda layer: pin(layer, train=pinned)),
    )
