"""Quantization-aware training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count
from diffprog.core.computed import Computed, Patterns
from diffprog.core.dtypes import wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.transforms.reparam import check_kernel, reparametrized

__all__ = ["quantize"]


@factory
def quantize(layer: Any, bits: int = 8, pattern: Patterns = "**/kernel") -> Layer:
    """Train with quantized weights: ``y = f(x; round(w / step) * step)``.

    The step of each output feature is ``max |w| / (2 ** (bits - 1) - 1)``, so that each weight is
    one of 2 ** bits - 1 integers times the step of its feature. The gradient is that of the
    straight-through estimator, which ignores the rounding. The parameters are those of the layer,
    in full precision; `merge` returns the rounded ones.

    Args:
        layer: any layer.
        bits: bits of the integers, including the sign; from 2 to 16.
        pattern: paths of the kernels, or a tuple of several patterns.

    Raises:
        LayerError: at composition, for bits outside 2 to 16; at ``init``, for a pattern that
            matches nothing, or a leaf with one axis.

    Example:
        >>> net = dp.quantize(dp.linear(3), bits=2)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> kernel = dp.tree.merge(net, params)[0]["kernel"]
        >>> [len(set(column.tolist())) <= 3 for column in kernel.T]
        [True, True, True]

    Source: Jacob et al. 2017, arXiv:1712.05877, section 3; Bengio, Leonard, Courville 2013,
    arXiv:1308.3432, for the gradient.
    """
    check_count("bits", bits)
    if not 2 <= bits <= 16:
        raise LayerError("bits from 2 to 16", str(bits), "choose 8, for example")

    def use(kernel: jax.Array) -> jax.Array:
        check_kernel(kernel)
        wide = kernel.astype(wide_dtype(kernel))
        largest = jnp.max(jnp.abs(wide), range(kernel.ndim - 1), keepdims=True)   # (1, ..., out)
        step = jnp.where(largest == 0, 1, largest) / (2 ** (bits - 1) - 1)
        rounded = wide + jax.lax.stop_gradient(jnp.round(wide / step) * step - wide)
        return rounded.astype(kernel.dtype)

    return reparametrized(as_layer(layer), Computed(lambda key, kernel: kernel, use, pattern),
                          lambda layer: quantize(layer, bits, pattern))
