"""Activations are plain functions; here are those that `jax.nn` lacks or defines otherwise.

The usual ones, each a layer wherever a layer is expected: the identity `jax.nn.identity`, the
binary step `dp.binary_step`, the logistic sigmoid `jax.nn.sigmoid`, the hyperbolic tangent
`jnp.tanh`, the rectifier `jax.nn.relu`, the leaky one with slope 0.01 `jax.nn.leaky_relu` and the
exact `dp.gelu`. `docs/defaults.md` has their formulas and derivatives. Those with parameters are
layers: `prelu`, and the gated units `glu` and `swiglu`; `jax.nn.glu` is the plain function of a
last axis that holds both halves.
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
    """The Gaussian error linear unit, exact: ``y = x * Phi(x)``, Phi the normal distribution.

    `jax.nn.gelu` computes an approximation by tanh unless told otherwise.

    Example:
        >>> [round(float(y), 4) for y in dp.gelu(jnp.array([-1.0, 0.0, 1.0]))]
        [-0.1587, 0.0, 0.8413]

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, eq. 1.
    """
    return jax.nn.gelu(x, approximate=False)


def binary_step(x: jax.Array) -> jax.Array:
    """Fire or not: ``y = 1 if x >= 0 else 0``, with the straight-through gradient ``dy = dx``.

    The true derivative is zero wherever it exists, so nothing before the step would be trained:
    the gradient passes as if the step were the identity.

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
    """A rectifier that learns its slope: ``y = max(x, 0) + scale * min(x, 0)``.

    Shapes:
        x: (..., C) -> (..., C), in the dtype of x.
        params: ``scale`` (C,), or (1,) if shared; 0.25.

    Args:
        shared: True gives all channels one slope, as PyTorch does unless told otherwise.
        scale_init: initializer of the slope; 0.25 is that of the paper.

    Raises:
        LayerError: x is no floating-point array of at least one axis, or has another number of
            channels than `init` saw.

    Example:
        >>> net, x = dp.prelu(), jnp.array([-2.0, 3.0])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> net(params, x).tolist()
        [-0.5, 3.0]

    Source: He, Zhang, Ren, Sun 2015, arXiv:1502.01852, eq. 1.
    """

    def init(key: jax.Array, x: Any) -> Params:
        check_array(x, rank=1, axes="(..., channels)")
        return {"scale": parameter(key, "scale", scale_init, (1,) if shared else x.shape[-1:], x)}

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
    """A linear map behind a learned gate: ``y = sigmoid(x @ W + b) * (x @ V + c)``.

    Shapes:
        x: (..., D) -> (..., features), in the dtype of x.
        params: ``gate`` (W and b) and ``up`` (V and c), each a ``kernel`` (D, features) and a
            ``bias`` (features,).

    Args:
        features: size of the last axis of y; positive.
        bias: False leaves both biases out.
        kernel_init, bias_init: initializers, of both maps.

    Raises:
        LayerError: x is no floating-point array of at least one axis.

    Example:
        >>> net = dp.glu(3)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(params), net(params, jnp.ones((2, 4))).shape
        (['gate', 'up'], (2, 3))

    Source: Dauphin, Fan, Auli, Grangier 2016, arXiv:1612.08083, eq. 1; Shazeer 2020,
    arXiv:2002.05202, eq. 4.
    """
    return _gated(glu, jax.nn.sigmoid, features=features, bias=bias, kernel_init=kernel_init,
                  bias_init=bias_init)


@factory
def swiglu(
    features: int, *, bias: bool = False, kernel_init: Initializer = "lecun_normal",
    bias_init: Initializer = "zeros",
) -> Layer:
    """A linear map behind a gate by silu: ``y = silu(x @ W) * (x @ V)``, silu(z) = z sigmoid(z).

    Shapes:
        x: (..., D) -> (..., features), in the dtype of x.
        params: ``gate`` (W) and ``up`` (V), each a ``kernel`` (D, features) and, if asked for, a
            ``bias`` (features,).

    Args:
        features: size of the last axis of y; positive.
        bias: True adds a bias to both maps; transformers leave it out.
        kernel_init, bias_init: initializers, of both maps.

    Raises:
        LayerError: x is no floating-point array of at least one axis.

    Example:
        >>> net = dp.swiglu(8) >> dp.linear(4)
        >>> net.plan(jnp.ones((2, 4))).y.shape
        (2, 4)

    Source: Shazeer 2020, arXiv:2002.05202, eq. 5 and 6.
    """
    return _gated(swiglu, jax.nn.silu, features=features, bias=bias, kernel_init=kernel_init,
                  bias_init=bias_init)


def _gated(
    made_by: Callable[..., Layer], gate: Callable[[jax.Array], jax.Array], **settings: Any
) -> Layer:
    """Two linear maps of x, one of them behind the gate; `settings` are those of `linear`."""
    part = linear(**settings)
    ways = {"gate": part, "up": part}

    def flow(layers: Children, x: jax.Array) -> jax.Array:
        return gate(layers.gate(x)) * layers.up(x)

    def build(children: Mapping[str, Layer]) -> Layer:
        layer = wire(flow, children, name=made_by.__name__, rebuild=build)
        # After surgery the settings would no longer be true, and repr shows the children.
        return layer.described(made_by, settings) if children == ways else layer

    return build(ways)
