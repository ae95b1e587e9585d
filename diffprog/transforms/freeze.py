"""Frozen parameters."""

from __future__ import annotations

from typing import Any

from diffprog.core.computed import Computed, Patterns
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.transforms.reparam import reparametrized

__all__ = ["freeze"]


@factory
def freeze(layer: Any, pattern: Patterns = "**", *, exclude: Patterns = ()) -> Layer:
    """Freeze parameters: ``y = f(x; stop_gradient(w))``.

    Parameters and state have the structure of the layer's. No gradient reaches frozen parameters,
    and `make_step` keeps them from the optimizer, whose weight decay would shrink them; in a loop
    of your own, see `trainable`. Running statistics are not parameters: those of a batch norm
    inside still change in training, and dropout still drops. ``freeze(pin(layer, train=False))``
    freezes a layer completely.

    Args:
        layer: any layer.
        pattern: paths of the frozen parameters, or a tuple of several patterns.
        exclude: paths of parameters that stay trainable, or a tuple of several patterns.

    Raises:
        LayerError: at ``init``: a pattern that matches nothing.

    Example:
        >>> net = dp.serial(body=dp.freeze(dp.linear(8)), head=dp.linear(3))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> grads = jax.grad(lambda p: net(p, jnp.ones((2, 4))).sum())(params)
        >>> jax.tree.map(lambda g: bool(jnp.any(g)), grads["body"])
        {'bias': False, 'kernel': False}
    """
    own = Computed(lambda key, leaf: leaf, lambda leaf: leaf, pattern, exclude, constant="**")
    return reparametrized(
        as_layer(layer), own, lambda layer: freeze(layer, pattern, exclude=exclude))
