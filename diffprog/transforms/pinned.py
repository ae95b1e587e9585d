"""A layer in a fixed mode, training or inference, independent of the net around it."""

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
    """Fix the mode of a layer, whatever the mode of the net: ``y = f(x, train=train)``.

    Pinned to inference, ``train=False``, the layer computes in training as in inference without a
    key: it draws nothing, and its running statistics do not change. Use it for the batch norm of a
    pretrained body in fine-tuning. Gradients still reach the parameters; `freeze` stops them, so
    that a teacher is ``freeze(pin(teacher, train=False))``.

    Pinned to training, ``train=True``, the layer computes in inference as in training. Dropout
    drops, which is Monte Carlo dropout; batch norm uses the statistics of the batch and updates its
    running statistics in every call whose state is kept. In inference a random layer draws only if
    a key is given, ``net(params, x, state=state, key=key)``; without a key it is in inference mode.

    If one `pin` is inside another, the inner mode applies, but the outer ``train=False`` passes no
    key. The kind and the names of the layer stay. To pin layers by path, use ``replace(net,
    "**/batch_norm_*", lambda norm: pin(norm, train=False))``. Streaming works in either mode.

    Args:
        layer: any layer.
        train: the mode: True for training, False for inference.

    Raises:
        LayerError: at composition, if `train` is not a bool.

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
        # In inference a key is optional; in training the layer itself raises if it has none.
        keyless = layer.random and key is None and not train
        return layer.apply(params, state, x, key=key if pinned else None,
                           train=pinned and not keyless, **side)

    return dataclasses.replace(
        layer, apply=apply, planner=lambda x, side: layer.plan(x, **side),
        random=layer.random and pinned, computed=(Pinned(pinned), *layer.computed),
        **around(layer, lambda layer: pin(layer, train=pinned)),
    )
