"""Activation functions that `jax.nn` lacks or defines differently, and gated linear units.

An activation without parameters is a plain function, and can be passed wherever a layer is
expected: `jax.nn.identity`, `dp.binary_step`, `jax.nn.sigmoid`, `jnp.tanh`, `jax.nn.relu`,
`jax.nn.leaky_relu` (slope 0.01), and the exact `dp.gelu`. `docs/defaults.md` lists their formulas
and derivatives. Activations with parameters are layers: `prelu`, `glu` and `swiglu`. (`jax.nn.glu`
is the function without parameters, whose last axis holds both halves.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_leaves
from diffprog.core.dtypes import along
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, stateless
from diffprog.core.parameters import Initializer, parameter
from diffprog.core.plans import Params
from diffprog.layers.linear import linear
from diffprog.wiring.children import Children
from diffprog.wiring.program import wire

__all__ = ["binary_step", "gelu", "glu", "prelu", "swiglu"]

_QUARTER = jax.nn.initializers.constant(0.25)


def gelu(x: jax.Array) -> jax.Array:
    """The exact Gaussian error linear unit: ``y = x * Phi(x)``, with Phi the standard normal CDF.

    `jax.nn.gelu` computes the tanh approximation by default.

    Example:
        >>> [round(float(y), 4) for y in dp.gelu(jnp.array([-1.0, 0.0, 1.0]))]
        [-0.1587, 0.0, 0.8413]

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, eq. 1.
    """
    return jax.nn.gelu(x, approximate=False)


def binary_step(x: jax.Array) -> jax.Array:
    """The binary step ``y = 1 if x >= 0 else 0``, with the straight-through gradient ``dy = dx``.

    The true derivative is zero wherever it exists, so no layer before the step could be trained.
    The gradient of the identity replaces it.

    Example:
        >>> dp.binary_step(jnp.array([-2.0, 0.0, 3.0])).tolist()
        [0.0, 1.0, 1.0]
        >>> float(jax.grad(dp.binary_step)(-2.0))
        1.0

    Source: Bengio, Leonard, Courville 2013, arXiv:1308.3432.
    """
    return _step(x)


@jax.custom_jvp
def _step(x: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, jnp.ones_like(x), jnp.zeros_like(x))


_step.defjvps(lambda tangent, y, x: tangent)


@factory
def prelu(*, shared: bool = False, scale_init: Initializer = _QUARTER) -> Layer:
    """A rectifier with a learned negative slope: ``y = max(x, 0) + scale * min(x, 0)``.

    Shapes:
        x: (..., C) -> (..., C), in the dtype of x.
        params: ``scale`` (C,), or (1,) if `shared`.

    Args:
        shared: True uses one slope for all channels, the default of PyTorch.
        scale_init: initializer of the slope; the constant 0.25, as in the paper.

    Raises:
        LayerError: x is not a floating-point array with at least one axis, or its number of
            channels differs from that at `init`.

    Example:
        >>> net, x = dp.prelu(), jnp.array([-2.0, 3.0])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> net(params, x).tolist()
        [-0.5, 3.0]

    Source: He, Zhang, Ren, Sun 2015, arXiv:1502.01852, eq. 1.
    """

    def init(key: jax.Array, x: Any) -> Params:
        check_array(x, rank=1, axes="(..., channels)")
        shape = (1,) if shared else x.shape[-1:]
        return {"scale": parameter(key, "scale", scale_init, shape, x)}

    def forward(params: Params, x: jax.Array) -> jax.Array:
        check_array(x, rank=1, axes="(..., channels)")
        check_leaves(params, 1 if shared else x.shape[-1])
        return jnp.where(x > 0, x, along(params["scale"], x) * x)

    return stateless(init, forward, name="prelu", casts=True)


@factory
def glu(
    features: int, *, bias: bool = True, kernel_init: Initializer = "lecun_normal",
    bias_init: Initializer = "zeros",
) -> Layer:
    """A gated linear unit: ``y = sigmoid(x @ W + b) * (x @ V + c)``.

    Shapes:
        x: (..., D) -> (..., features), in the dtype of x.
        params: ``gate`` (W and b) and ``up`` (V and c), each a ``kernel`` (D, features) and a
            ``bias`` (features,).

    Args:
        features: size of the last axis of y; positive.
        bias: False leaves both biases out.
        kernel_init, bias_init: initializers, of both maps.

    Raises:
        LayerError: x is not a floating-point array with at least one axis.

    Example:
        >>> net = dp.glu(3)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(params), net(params, jnp.ones((2, 4))).shape
        (['gate', 'up'], (2, 3))

    Source: Dauphin, Fan, Auli, Grangier 2016, arXiv:1612.08083, eq. 1; Shazeer 2020,
    arXiv:2002.05202, eq. 4.
    """
    settings = {"features": features, "bias": bias, "kernel_init": kernel_init,
                "bias_init": bias_init}
    return _gated(glu, jax.nn.sigmoid, settings)


@factory
def swiglu(
    features: int, *, bias: bool = False, kernel_init: Initializer = "lecun_normal",
    bias_init: Initializer = "zeros",
) -> Layer:
    """A gated linear unit with SiLU: ``y = silu(x @ W) * (x @ V)``, silu(z) = z sigmoid(z).

    Shapes:
        x: (..., D) -> (..., features), in the dtype of x.
        params: ``gate`` (W) and ``up`` (V), each a ``kernel`` (D, features) and, if `bias`, a
            ``bias`` (features,).

    Args:
        features: size of the last axis of y; positive.
        bias: True adds a bias to both maps; Transformers omit it.
        kernel_init, bias_init: initializers, of both maps.

    Raises:
        LayerError: x is not a floating-point array with at least one axis.

    Example:
        >>> net = dp.swiglu(8) >> dp.linear(4)
        >>> net.plan(jnp.ones((2, 4))).y.shape
        (2, 4)

    Source: Shazeer 2020, arXiv:2002.05202, eq. 5 and 6.
    """
    settings = {"features": features, "bias": bias, "kernel_init": kernel_init,
                "bias_init": bias_init}
    return _gated(swiglu, jax.nn.silu, settings)


def _gated(
    made_by: Callable[..., Layer], activation: Callable[[jax.Array], jax.Array],
    settings: dict[str, Any],
) -> Layer:
    """``activation(gate(x)) * up(x)``, where `gate` and `up` are ``linear(**settings)``."""
    projection = linear(**settings)
    original = {"gate": projection, "up": projection}

    def flow(layers: Children, x: jax.Array) -> jax.Array:
        gate = activation(layers.gate(x))  # (..., features)
        up = layers.up(x)  # (..., features)
        return gate * up

    def build(children: Mapping[str, Layer]) -> Layer:
        layer = wire(flow, children, name=made_by.__name__, rebuild=build)
        if children == original:
            return layer.described(made_by, settings)
        return layer  # a child was replaced: repr shows the children instead of the settings

    return build(original)
