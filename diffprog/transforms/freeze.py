"""Parameters that stay as they are."""

from __future__ import annotations

from typing import Any

from diffprog.core.computed import Computed, Patterns
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.transforms.reparam import reparametrized

__all__ = ["freeze"]


@factory
def freeze(layer: Any, pattern: Patterns = "**", *, exclude: Patterns = ()) -> Layer:
    """Keep parameters as they are: ``y = f(x; stop_gradient(w))``.

    The trees are those of the layer. No gradient reaches what is frozen, and `make_step` keeps it
    from the optimizer, which would shrink it by weight decay; in a loop of your own, see
    `trainable`. Statistics are no parameters: those of a batch norm inside still move in training,
    and dropout still drops. ``freeze(pin(layer, train=False))`` keeps all of a layer as it is.

    Args:
        layer: any layer.
        pattern: of the paths of what is frozen, or a tuple of several.
        exclude: of the paths of what is trained all the same, or a tuple of several.

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
