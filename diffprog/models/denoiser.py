"""What the nets that remove noise have in common: they are told how noisy x is, and of what class.

Ho, Jain, Abbeel 2020, arXiv:2006.11239, appendix B: the step is read as waves, like a position.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.layers.embedding import embedding
from diffprog.layers.positions.absolute import sinusoidal_positions
from diffprog.models.mlp import mlp
from diffprog.wiring.children import Children
from diffprog.wiring.program import program

_WAVES = sinusoidal_positions()


def time_and_class(size: int, features: int, classes: int | None) -> Layer:
    """What an image's net is told: ``y = mlp(waves(time)) + embedding[condition]``.

    Shapes:
        x: images (..., H, W, C), of which shape and dtype are read -> (..., features).
        time: ints (...). condition: ints (...), `classes` standing for none; if absent, none.
        params: ``time``, and with classes ``classes``.

    Args:
        size: how many features the waves have; even.
        features: of y, and hidden ones.
        classes: how many there are; None for a net that knows of none.
    """
    own = {} if classes is None else {"classes": embedding(classes + 1, features)}
    if classes is not None:
        check_count("classes", classes)

    @program(time=mlp((features,), features, activation=jax.nn.silu), **own)
    def told(
        layers: Children, x: jax.Array, *, time: Any = None, condition: Any = None
    ) -> jax.Array:
        batch = x.shape[:-3]
        time = _ints("time", time, batch)
        y = layers.time(waves(time[..., None], size, x.dtype)[..., 0, :])
        if classes is None:
            if condition is not None:
                raise LayerError("no condition, for a net without classes", show(condition),
                                 "give the net classes=10, for example")
            return y
        condition = jnp.full(batch, classes) if condition is None else condition
        return y + layers.classes(_ints("condition", condition, batch)).astype(y.dtype)

    return told


def waves(numbers: jax.Array, features: int, dtype: Any) -> jax.Array:
    """Sines and cosines of ints: (..., n) -> (..., n, features), as `sinusoidal_positions` adds."""
    return _WAVES({}, jnp.zeros((*numbers.shape, features), dtype), positions=numbers)


def check_images(x: Any, multiple: int) -> None:
    """Raise unless x is images whose sides are multiples of a number."""
    check_array(x, rank=3, axes="(..., height, width, channels)")
    if any(side % multiple for side in x.shape[-3:-1]):
        raise LayerError(f"images with sides that are multiples of {multiple}", show(x),
                         "pad or crop them")


def _ints(name: str, given: Any, shape: tuple[int, ...]) -> jax.Array:
    """The side input, if it is an int for each image."""
    if given is None or given.shape != shape or not jnp.issubdtype(given.dtype, jnp.integer):
        got = "none" if given is None else show(given)
        raise LayerError(f"{name} as ints of shape {shape}", got, "give one to each image")
    return given
