"""Low-rank adaptation: a kernel stays as it is, and what is added to it has few parameters."""

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
    """Learn a change of low rank to kernels that stay: ``y = f(x; base + down @ up)``.

    A kernel (in, out) becomes `base`, which no gradient reaches, `down` (in, rank) and `up`
    (rank, out), which begins at zero, so that the layer begins as it was. All other leaves train
    on; ``freeze(lora(net, 8), exclude=("**/down", "**/up"))`` trains nothing else. Begin from
    parameters that are there by `unmerge`, and end with `merge`: the plain net takes the sum.

    Leading axes, such as the positions of a convolution's kernel, each have factors of their own.

    Args:
        layer: any layer.
        rank: of the change; positive, at most the smaller side of the kernel.
        pattern: of the paths of the kernels, or a tuple of several.

    Raises:
        LayerError: at ``init``: a pattern that matches nothing, or a leaf that is no matrix; a
            rank that is larger than it.

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
        *leading, wide, narrow = kernel.shape
        drawn = parameter(key, "down", "he_uniform", (*leading, wide, rank), kernel)
        return {"base": kernel, "down": drawn,
                "up": jnp.zeros((*leading, rank, narrow), kernel.dtype)}

    def use(tree: dict[str, jax.Array]) -> jax.Array:
        return tree["base"] + tree["down"] @ tree["up"]

    return reparametrized(as_layer(layer), Computed(make, use, pattern, constant="base"),
                          lambda layer: lora(layer, rank, pattern))
