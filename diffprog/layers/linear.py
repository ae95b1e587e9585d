"""A linear map of the last axis; the leading axes are free."""

from __future__ import annotations

from typing import Any

import jax

from diffprog.errors import check_array, check_count, check_leaves
from diffprog.layer import Layer, Params, factory, stateless
from diffprog.parameters import parameter

__all__ = ["linear"]

_LECUN_NORMAL = jax.nn.initializers.lecun_normal()
_ZEROS = jax.nn.initializers.zeros


@factory
def linear(
    features: int, *, bias: bool = True, kernel_init: Any = _LECUN_NORMAL, bias_init: Any = _ZEROS
) -> Layer:
    """Multiply the last axis by a matrix: ``y = x @ kernel + bias``.

    Shapes:
        x: (..., D) -> (..., features), in the dtype of x.
        params: ``kernel`` (D, features); ``bias`` (features,).

    Args:
        features: size of the last axis of y; positive.
        bias: False leaves the bias out.
        kernel_init: initializer; ``lecun_normal`` keeps the variance of x (LeCun et al. 1998,
            Efficient BackProp, section 4.6).
        bias_init: initializer; zeros.

    Raises:
        LayerError: x is no floating-point array of at least one axis.

    Example:
        >>> net = dp.linear(3)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> net(params, jnp.ones((2, 4))).shape
        (2, 3)
    """
    check_count("features", features)

    def init(key: jax.Array, x: Any) -> Params:
        check_array(x, rank=1, axes="(..., features)")
        params = {"kernel": parameter(key, "kernel", kernel_init, (x.shape[-1], features), x)}
        if bias:
            params["bias"] = parameter(key, "bias", bias_init, (features,), x)
        return params

    def forward(params: Params, x: jax.Array) -> jax.Array:
        check_array(x, rank=1, axes="(..., features)")  # integers would round the kernel to zeros
        check_leaves(params, features)
        y = x @ params["kernel"].astype(x.dtype)
        return y + params["bias"].astype(x.dtype) if bias else y

    return stateless(init, forward, name="linear")
