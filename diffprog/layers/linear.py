"""Linear and bilinear maps of the last axis; leading axes are free."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_features, check_leaves
from diffprog.core.dtypes import along
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, stateless
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, parameter
from diffprog.core.plans import Params

__all__ = ["bilinear", "linear"]


@factory
def linear(
    features: int, *, bias: bool = True, kernel_init: Initializer = "lecun_normal",
    bias_init: Initializer = "zeros",
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
        LayerError: x is not a floating-point array with at least one axis.

    Example:
        >>> net = dp.linear(3)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> net(params, jnp.ones((2, 4))).shape
        (2, 3)
    """
    check_count("features", features)

    def init(key: jax.Array, x: Any) -> Params:
        check_array(x, rank=1, axes="(..., features)")
        shape = (x.shape[-1], features)
        return affine_params(key, shape, x, bias, kernel_init, bias_init)

    def forward(params: Params, x: jax.Array) -> jax.Array:
        check_array(x, rank=1, axes="(..., features)")  # integers would round the kernel to zeros
        return affine(params, x, features)

    return stateless(init, forward, name="linear", casts=True)


def affine_params(
    key: jax.Array, shape: tuple[int, ...], x: Any, bias: bool, kernel_init: Initializer,
    bias_init: Initializer,
) -> Params:
    """``kernel`` of `shape` and, if `bias`, a ``bias`` of its last axis, drawn for input x."""
    params = {"kernel": parameter(key, "kernel", kernel_init, shape, x)}
    if bias:
        params["bias"] = parameter(key, "bias", bias_init, shape[-1:], x)
    return params


def affine(params: Params, x: jax.Array, features: int) -> jax.Array:
    """``x @ kernel + bias``, (..., D) -> (..., features), in the dtype of x; the bias is optional.

    Leaves of another size raise: a bias of one feature would be broadcast.
    """
    check_leaves(params, features)
    rows = x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x  # XLA's gradient is faster on a matrix
    y = rows @ params["kernel"].astype(x.dtype)  # (rows, features)
    if "bias" in params:
        y = y + along(params["bias"], y)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@factory
def bilinear(
    features: int, *, bias: bool = True, kernel_init: Initializer = "lecun_normal",
    bias_init: Initializer = "zeros",
) -> Layer:
    """A bilinear form of two inputs: ``y[k] = a @ kernel[:, :, k] @ b + bias[k]``.

    Shapes:
        x: a pair (a, b) of (..., A) and (..., B) with equal leading axes -> (..., features), in
            their dtype.
        params: ``kernel`` (A, B, features); ``bias`` (features,).

    Args:
        features: size of the last axis of y; positive.
        bias: False leaves the bias out.
        kernel_init: initializer; with ``lecun_normal``, of fan-in A * B, the variance of y is the
            product of the variances of a and b.
        bias_init: initializer; zeros.

    Raises:
        LayerError: x is not a pair of floating-point arrays with equal leading axes and dtype, or
            its features differ from those at `init`.

    Example:
        >>> net, x = dp.bilinear(3), (jnp.ones((2, 4)), jnp.ones((2, 5)))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> params["kernel"].shape, net(params, x).shape
        ((4, 5, 3), (2, 3))

    Source: Tenenbaum and Freeman 2000, Neural Computation 12, eq. 1 and 2.
    """
    check_count("features", features)

    def init(key: jax.Array, x: Any) -> Params:
        a, b = _pair(x)
        shape = (a.shape[-1], b.shape[-1], features)
        return affine_params(key, shape, a, bias, kernel_init, bias_init)

    def forward(params: Params, x: Any) -> jax.Array:
        a, b = _pair(x)  # (..., A), (..., B)
        check_leaves(params, features)
        check_features(params["kernel"].shape[0], a)
        check_features(params["kernel"].shape[1], b)
        y = jnp.einsum("...i,ijk,...j->...k", a, params["kernel"].astype(a.dtype), b)
        return y + along(params["bias"], y) if bias else y

    return stateless(init, forward, name="bilinear", casts=True)


def _pair(x: Any) -> Any:
    """The pair (a, b), after a check of axes and dtypes."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise LayerError("a pair of inputs (a, b)", show(x), "put branch or parallel before it")
    a, b = x
    for part in x:
        check_array(part, rank=1, axes="(..., features)")
    if (a.shape[:-1], a.dtype) != (b.shape[:-1], b.dtype):
        raise LayerError("two inputs of equal leading axes and dtype", show(x),
                         "bring them to one shape and dtype")
    return a, b


def shift() -> Layer:
    """A bias without a kernel: ``y = x + bias``."""

    def init(key: jax.Array, x: Any) -> Params:
        return {"bias": parameter(key, "bias", "zeros", x.shape[-1:], x)}

    def forward(params: Params, x: jax.Array) -> jax.Array:
        return x + along(params["bias"], x)

    return stateless(init, forward, name="bias", casts=True)
