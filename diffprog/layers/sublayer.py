"""What surrounds attention in a Transformer: the feed-forward net, and residual sums with norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_share
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.guards import check_composable
from diffprog.core.layer import Layer, as_layer
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, fold, parameter
from diffprog.core.plans import Params, State, spec
from diffprog.layers.dropout import dropout as dropping
from diffprog.layers.linear import affine
from diffprog.layers.norms.norm import layer_norm
from diffprog.wiring.children import Children
from diffprog.wiring.program import wire

__all__ = ["add_norm", "ffn", "pre_norm"]


@factory
def ffn(
    hidden: int, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu, *,
    bias: bool = True, dropout: float = 0.0, kernel_init: Initializer = "lecun_normal",
    bias_init: Initializer = "zeros",
) -> Layer:
    """Widen, bend, and narrow again: ``y = activation(x @ W_1 + b_1) @ W_2 + b_2``.

    The same for every position; as many features come out as go in. A gated one is written
    ``swiglu(hidden) >> linear(width)``.

    Shapes:
        x: (..., D) -> (..., D), in the dtype of x.
        params: ``up`` (kernel (D, hidden)) and ``down`` (kernel (hidden, D)), each with a
            ``bias``.

    Args:
        hidden: size of the hidden axis, mostly 4 * D; positive.
        activation: a function of an array, such as `dp.gelu`.
        bias: False leaves both biases out.
        dropout: share of the hidden values that is dropped in training, in [0, 1).
        kernel_init, bias_init: initializers, of both maps.

    Raises:
        LayerError: the activation is a layer, or changes the shape; x is no floating-point array
            of at least one axis.

    Example:
        >>> net = dp.ffn(8, dp.gelu)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> params["down"]["kernel"].shape, net(params, jnp.ones((2, 4))).shape
        ((8, 4), (2, 4))

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 2.
    """
    check_count("hidden", hidden)
    check_share("dropout", dropout)
    if isinstance(activation, Layer) or not callable(activation):
        remedy = "pass jax.nn.relu, for example"
        if isinstance(activation, Layer):
            remedy = "write linear(...) >> layer >> linear(...) for a layer with parameters"
        elif isinstance(activation, int):
            remedy = f"write ffn({activation}): init reads the size of the input off x"
        raise LayerError("an activation that is a function of an array", show(activation), remedy)
    check_composable(activation)
    drop = dropping(dropout)

    def init(key: jax.Array, x: Any) -> tuple[Params, State]:
        check_array(x, rank=1, axes="(..., features)")
        params: Params = {}
        for name, shape in (("up", (x.shape[-1], hidden)), ("down", (hidden, x.shape[-1]))):
            own = fold(key, name)
            params[name] = {"kernel": parameter(own, "kernel", kernel_init, shape, x)}
            if bias:
                params[name]["bias"] = parameter(own, "bias", bias_init, shape[1:], x)
        return params, {}

    def apply(
        params: Params, state: State, x: jax.Array, *, key: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=1, axes="(..., features)")
        rows = x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x  # once for both maps
        wide = affine(params["up"], rows, hidden)
        bent = activation(wide)
        if spec(bent) != spec(wide):
            raise LayerError(f"an activation that keeps {show(wide)} as it is", show(bent),
                             "pass a function of each entry, or write "
                             "swiglu(hidden) >> linear(width)")
        kept, _ = drop.apply({}, {}, bent, key=key, train=train)
        return affine(params["down"], kept, x.shape[-1]).reshape(x.shape), state

    return Layer(init, apply, random=dropout > 0, casts=True)


@factory
def add_norm(body: Any, norm: Any = None, *, dropout: float = 0.0) -> Layer:
    """Post-norm, as in 2017: ``y = norm(x + dropout(body(x)))``.

    Args:
        body: a layer that keeps the shape, such as attention or `ffn`.
        norm: the norm; ``layer_norm()`` if None.
        dropout: share of the body's values that is dropped in training, in [0, 1).

    Raises:
        LayerError: at ``init``, if the body does not keep shape and dtype.

    Example:
        >>> encoder = dp.repeat(6, dp.add_norm(dp.self_attention(4)) >> dp.add_norm(dp.ffn(64)))
        >>> encoder.plan(jnp.ones((2, 10, 16))).y.shape
        (2, 10, 16)

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1 and 5.4.
    """
    return _around(add_norm, lambda x, body, norm: norm(_sum(x, body(x))), body, norm, dropout)


@factory
def pre_norm(body: Any, norm: Any = None, *, dropout: float = 0.0) -> Layer:
    """The norm before the body: ``y = x + dropout(body(norm(x)))``.

    The sum is never normalized, so that gradients reach deep layers as they are; a norm stands at
    the end of the whole net.

    Args:
        body, norm, dropout: as in `add_norm`.

    Raises:
        LayerError: as `add_norm` does.

    Example:
        >>> block = dp.pre_norm(dp.self_attention(4, causal=True)) >> dp.pre_norm(dp.ffn(64))
        >>> decoder = dp.repeat(6, block) >> dp.layer_norm()
        >>> decoder.plan(jnp.ones((2, 10, 16))).y.shape
        (2, 10, 16)

    Source: Xiong et al. 2020, arXiv:2002.04745, table 1.
    """
    return _around(pre_norm, lambda x, body, norm: _sum(x, body(norm(x))), body, norm, dropout)


def _around(
    made_by: Callable[..., Layer], formula: Callable[..., jax.Array], body: Any, norm: Any,
    dropout: float,
) -> Layer:
    """The program of a formula of x, a body whose values may be dropped, and a norm."""
    check_share("dropout", dropout)
    drop = dropping(dropout)
    usual = layer_norm()

    def flow(layers: Children, x: Any) -> jax.Array:
        body = (lambda x: layers.drop(layers.body(x))) if dropout else layers.body
        return formula(x, body, layers.norm)

    def build(children: Mapping[str, Layer]) -> Layer:
        layer = wire(flow, children, name=made_by.__name__, rebuild=build)
        norm = None if children["norm"] is usual else children["norm"]
        settings = {"body": children["body"], "norm": norm, "dropout": dropout}
        return layer.described(made_by, settings)

    children = {"body": as_layer(body), "norm": usual if norm is None else as_layer(norm)}
    return build(children | {"drop": drop} if dropout else children)


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    if spec(x) != spec(y):
        raise LayerError(f"a body that keeps the shape of x, {show(x)}", show(y),
                         "let it have as many features, and the dtype of x")
    return jnp.add(x, y)
