"""The parts of a Transformer block besides attention: feed-forward net, residual sum with norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_fraction
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.guards import check_composable
from diffprog.core.layer import Layer, as_layer
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, fold
from diffprog.core.plans import Params, State, spec
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.linear import affine, affine_params
from diffprog.layers.norms.norm import layer_norm
from diffprog.wiring.children import Children
from diffprog.wiring.program import wire

__all__ = ["add_norm", "ffn", "pre_norm"]


@factory
def ffn(
    hidden: int, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu, *,
    bias: bool = True, dropout: float = 0.0, kernel_init: Initializer = "lecun_normal",
    out_init: Initializer | None = None, bias_init: Initializer = "zeros",
) -> Layer:
    """The position-wise feed-forward net: ``y = activation(x @ W_1 + b_1) @ W_2 + b_2``.

    Input and output have the same number of features. The gated variant is
    ``swiglu(hidden) >> linear(width)``.

    Shapes:
        x: (..., D) -> (..., D), in the dtype of x.
        params: ``up`` (kernel (D, hidden)) and ``down`` (kernel (hidden, D)), each with a
            ``bias``.

    Args:
        hidden: number of hidden features, usually 4 * D; positive.
        activation: a function of an array, such as `dp.gelu`.
        bias: False leaves both biases out.
        dropout: fraction of the hidden features dropped in training, in [0, 1).
        kernel_init, bias_init: initializers, of both maps.
        out_init: initializer of the kernel of ``down``; kernel_init if None.

    Raises:
        LayerError: the activation is a layer, or changes shape or dtype; x is not a floating-point
            array with at least one axis.

    Example:
        >>> net = dp.ffn(8, dp.gelu)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> params["down"]["kernel"].shape, net(params, jnp.ones((2, 4))).shape
        ((8, 4), (2, 4))

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 2.
    """
    check_count("hidden", hidden)
    check_fraction("dropout", dropout)
    _check_activation(activation)
    drop = dropping(dropout)

    def init(key: jax.Array, x: Any) -> tuple[Params, State]:
        check_array(x, rank=1, axes="(..., features)")
        width = x.shape[-1]
        drawn = {"up": ((width, hidden), kernel_init),
                 "down": ((hidden, width), kernel_init if out_init is None else out_init)}
        params = {
            name: affine_params(fold(key, name), shape, x, bias, kernel, bias_init)
            for name, (shape, kernel) in drawn.items()
        }
        return params, {}

    def apply(
        params: Params, state: State, x: jax.Array, *, key: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=1, axes="(..., features)")
        rows = x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x  # (rows, D), once for both maps
        up = affine(params["up"], rows, hidden)  # (rows, hidden)
        active = activation(up)  # (rows, hidden)
        if spec(active) != spec(up):
            raise LayerError(
                f"an activation that keeps shape and dtype, {show(up)}", show(active),
                "pass an elementwise function, or write swiglu(hidden) >> linear(width)")
        active, _ = drop.apply({}, {}, active, key=key, train=train)
        y = affine(params["down"], active, x.shape[-1])  # (rows, D)
        return y.reshape(x.shape), state

    return Layer(init, apply, random=dropout > 0, casts=True)


def _check_activation(activation: Any) -> None:
    wants = "an activation that is a function of an array"
    if isinstance(activation, Layer):
        raise LayerError(wants, show(activation),
                         "write linear(...) >> layer >> linear(...) for a layer with parameters")
    if isinstance(activation, int):
        raise LayerError(wants, show(activation),
                         f"write ffn({activation}): init reads the size of the input off x")
    if not callable(activation):
        raise LayerError(wants, show(activation), "pass jax.nn.relu, for example")
    check_composable(activation)


@factory
def add_norm(body: Any, norm: Any = None, *, dropout: float = 0.0) -> Layer:
    """A post-norm residual block: ``y = norm(x + dropout(body(x)))``.

    Args:
        body: a layer that keeps the shape, such as attention or `ffn`.
        norm: the norm; ``layer_norm()`` if None.
        dropout: fraction of the body's output dropped in training, in [0, 1).

    Raises:
        LayerError: at ``init``, if the body changes shape or dtype.

    Example:
        >>> encoder = dp.repeat(6, dp.add_norm(dp.self_attention(4)) >> dp.add_norm(dp.ffn(64)))
        >>> encoder.plan(jnp.ones((2, 10, 16))).y.shape
        (2, 10, 16)

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1 and 5.4.
    """

    def formula(x: Any, body: Callable[[Any], Any], norm: Callable[[Any], Any]) -> jax.Array:
        return norm(_residual_sum(x, body(x)))

    return _block(add_norm, formula, body, norm, dropout)


@factory
def pre_norm(body: Any, norm: Any = None, *, dropout: float = 0.0) -> Layer:
    """A pre-norm residual block: ``y = x + dropout(body(norm(x)))``.

    The residual stream itself is not normalized, so gradients reach early layers unchanged. A net
    of such blocks ends with one more norm.

    Args:
        body, norm, dropout: as in `add_norm`.

    Raises:
        LayerError: as in `add_norm`.

    Example:
        >>> block = dp.pre_norm(dp.self_attention(4, causal=True)) >> dp.pre_norm(dp.ffn(64))
        >>> decoder = dp.repeat(6, block) >> dp.layer_norm()
        >>> decoder.plan(jnp.ones((2, 10, 16))).y.shape
        (2, 10, 16)

    Source: Xiong et al. 2020, arXiv:2002.04745, table 1.
    """

    def formula(x: Any, body: Callable[[Any], Any], norm: Callable[[Any], Any]) -> jax.Array:
        return _residual_sum(x, body(norm(x)))

    return _block(pre_norm, formula, body, norm, dropout)


def _block(
    made_by: Callable[..., Layer], formula: Callable[..., jax.Array], body: Any, norm: Any,
    dropout: float,
) -> Layer:
    """``formula(x, body, norm)`` as a layer with the children `body`, `norm`, and maybe `drop`."""
    check_fraction("dropout", dropout)
    drop = dropping(dropout)
    default_norm = layer_norm()

    children = {"body": as_layer(body)}
    children["norm"] = default_norm if norm is None else as_layer(norm)
    if dropout:
        children["drop"] = drop

    def flow(layers: Children, x: Any) -> jax.Array:
        def dropped_body(x: Any) -> Any:
            y = layers.body(x)
            return layers.drop(y) if dropout else y

        return formula(x, dropped_body, layers.norm)

    def build(children: Mapping[str, Layer]) -> Layer:
        layer = wire(flow, children, name=made_by.__name__, rebuild=build)
        norm = children["norm"]
        return layer.described(made_by, {
            "body": children["body"],
            "norm": None if norm is default_norm else norm,
            "dropout": dropout,
        })

    return build(children)


def _residual_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    if spec(x) != spec(y):
        raise LayerError(f"a body that keeps the shape of x, {show(x)}", show(y),
                         "give it the number of features and the dtype of x")
    return jnp.add(x, y)
