"""Low-rank adaptation: a frozen kernel plus a trainable product of two narrow matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count
from diffprog.core.computed import Computed, Patterns
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.core.notation import show
from diffprog.core.parameters import parameter
from diffprog.transforms.reparam import reparametrized

__all__ = ["lora"]


@factory
def lora(layer: Any, rank: int, pattern: Patterns = "**/kernel") -> Layer:
    """Learn a low-rank update of frozen kernels: ``y = f(x; base + down @ up)``.

    A kernel (in, out) becomes `base`, which is frozen, `down` (in, rank) and `up` (rank, out).
    `up` starts at zero, so that the output initially equals that of `layer`; there is no further
    scale. All other parameters still train; ``freeze(lora(net, 8), exclude=("**/down", "**/up"))``
    trains the factors only. `dp.tree.unmerge` converts pretrained parameters, and `dp.tree.merge`
    adds the update to the kernels after training.

    Kernels with leading axes, such as those of a convolution, get factors for each position.

    Args:
        layer: any layer.
        rank: rank of the update; positive, at most the smaller side of the kernel.
        pattern: paths of the kernels, or a tuple of several patterns.

    Raises:
        LayerError: at ``init``, for a pattern that matches nothing, a leaf with fewer than two
            axes, or a rank larger than the matrix.

    Example:
        >>> net = dp.repeat(3, dp.lora(dp.residual(dp.linear(8)), rank=2))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 8)))
        >>> jax.tree.map(jnp.shape, params["body"]["kernel"])
        {'base': (3, 8, 8), 'down': (3, 8, 2), 'up': (3, 2, 8)}

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """
    check_count("rank", rank)

    def make(key: jax.Array, kernel: jax.Array) -> dict[str, jax.Array]:
        if kernel.ndim < 2 or rank > min(kernel.shape[-2:]):
            raise LayerError(f"kernels (..., in, out) of at least {rank} by {rank}", show(kernel),
                             "choose a smaller rank, or a pattern that matches larger ones")
        *leading, inputs, outputs = kernel.shape
        down = parameter(key, "down", "he_uniform", (*leading, inputs, rank), kernel)
        up = jnp.zeros((*leading, rank, outputs), kernel.dtype)
        return {"base": kernel, "down": down, "up": up}

    def use(tree: dict[str, jax.Array]) -> jax.Array:
        return tree["base"] + tree["down"] @ tree["up"]

    return reparametrized(as_layer(layer), Computed(make, use, pattern, constant="base"),
                          lambda layer: lora(layer, rank, pattern))
