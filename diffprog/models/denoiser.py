"""The conditioning of denoisers: one vector from the noise step and the class of an image.

Ho, Jain, Abbeel 2020, arXiv:2006.11239, appendix B: the step is embedded like a position.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_ints
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.layers.embedding import embedding
from diffprog.layers.positions.absolute import sinusoidal_positions
from diffprog.models.mlp import mlp
from diffprog.wiring.children import Children
from diffprog.wiring.program import program

_POSITIONS = sinusoidal_positions()


def time_and_class(size: int, features: int, classes: int | None) -> Layer:
    """The conditioning vector of an image: ``y = mlp(sinusoids(time)) + embedding[condition]``.

    Shapes:
        x: images (..., H, W, C), used for their batch axes and dtype -> (..., features).
        time: ints (...), the noise step; required.
        condition: ints (...) in [0, classes]; the default is `classes`, which stands for no class.
        params: ``time``; with classes also ``classes``.

    Args:
        size: features of the sinusoidal embedding of time; even.
        features: features of y and of the hidden layer.
        classes: number of classes; None for a net without condition.
    """
    children = {"time": mlp((features,), features, activation=jax.nn.silu)}
    if classes is not None:
        check_count("classes", classes)
        children["classes"] = embedding(classes + 1, features)

    @program(**children)
    def time_and_class(
        layers: Children, x: jax.Array, *, time: Any = None, condition: Any = None
    ) -> jax.Array:
        batch = x.shape[:-3]
        check_ints("time", time, "pass one per image", shape=batch)
        waves = sinusoids(time[..., None], size, x.dtype)[..., 0, :]     # (..., size)
        y = layers.time(waves)                                           # (..., features)
        if classes is None:
            if condition is not None:
                raise LayerError("no condition, for a net without classes", show(condition),
                                 "build the net with classes=10, for example")
            return y
        condition = jnp.full(batch, classes) if condition is None else condition
        check_ints("condition", condition, "pass one per image", shape=batch)
        return y + layers.classes(condition).astype(y.dtype)

    return time_and_class


def sinusoids(numbers: jax.Array, features: int, dtype: Any) -> jax.Array:
    """The embedding of `sinusoidal_positions` for ints: (..., n) -> (..., n, features)."""
    zeros = jnp.zeros((*numbers.shape, features), dtype)
    return _POSITIONS({}, zeros, positions=numbers)


def check_images(x: Any, multiple: int) -> None:
    """Raise unless x is images whose height and width are multiples of a number."""
    check_array(x, rank=3, axes="(..., height, width, channels)")
    if any(side % multiple for side in x.shape[-3:-1]):
        raise LayerError(f"images with sides that are multiples of {multiple}", show(x),
                         "pad or crop them")
