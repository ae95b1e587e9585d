"""Recurrent cells: one time step of a recurrent network.

A cell is a streaming layer of one step ``x`` (..., D), whose streaming state is the carry. Without
that state it computes one step from a carry of zeros. `recurrent` scans a cell over time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_leaves
from diffprog.core.dtypes import along, check_chunk
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.guards import check_composable
from diffprog.core.layer import Layer
from diffprog.core.meshes import beside
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, fold, parameter
from diffprog.core.plans import Params, State
from diffprog.layers.linear import affine, affine_params

__all__ = ["gru", "lstm", "simple_rnn"]

Carry = dict[str, jax.Array]


def forget_ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The default bias of an `lstm`: ones for the forget gate, zeros for the others."""
    return jnp.repeat(jnp.asarray([0, 1, 0, 0], dtype), shape[-1] // 4)


@factory
def simple_rnn(
    features: int, *, activation: Callable[[Any], Any] = jnp.tanh, bias: bool = True,
    kernel_init: Initializer = "lecun_normal", hidden_init: Initializer = "orthogonal",
    bias_init: Initializer = "zeros",
) -> Layer:
    """One step of a simple recurrent cell: ``h = activation(x @ W + b + h @ U)``; y is h.

    Shapes:
        x: (..., D) -> (..., features), one time step, in the dtype of x. All axes but the last are
            batch axes: for a sequence wrap the cell in `recurrent`.
        params: ``input`` has the ``kernel`` W (D, features) and the ``bias`` b (features,);
            ``hidden`` has the ``kernel`` U (features, features).
        state while streaming: ``hidden`` (..., features), zeros at the start.

    Args:
        features: size of the last axis of y; positive.
        activation: a plain function.
        bias: False leaves the bias out.
        kernel_init: initializer of W; ``lecun_normal`` keeps the variance of x.
        hidden_init: initializer of U; an orthogonal matrix keeps the norm of the carry (Saxe,
            McClelland, Ganguli 2013, arXiv:1312.6120).
        bias_init: initializer of b; zeros.

    Raises:
        LayerError: x is no floating-point array of at least one axis, or the carry does not fit x.

    Example:
        >>> net = dp.recurrent(dp.simple_rnn(3))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 5, 4)))
        >>> net(params, jnp.ones((2, 5, 4))).shape
        (2, 5, 3)

    Source: Elman 1990, Cognitive Science 14, 179-211.
    """
    if not callable(activation):
        raise LayerError("activation as a function", show(activation), "pass jnp.tanh, for example")
    check_composable(activation)

    def step(params: Params, carry: Carry, wx: jax.Array, uh: jax.Array) -> Carry:
        return {"hidden": activation(wx + uh)}  # (..., features)

    init = _initializer(features, ["hidden"], bias, kernel_init, hidden_init, bias_init)
    return _cell(features, 1, ["hidden"], init, step)


@factory
def lstm(
    features: int, *, bias: bool = True, kernel_init: Initializer = "lecun_normal",
    hidden_init: Initializer = "orthogonal", bias_init: Initializer = forget_ones,
) -> Layer:
    """One step of an LSTM: ``c = s(f) * c + s(i) * tanh(g)``, ``h = s(o) * tanh(c)``; y is h.

    The gates are ``(i, f, g, o) = x @ W + b + h @ U``, and s is the logistic sigmoid. There is one
    bias; cuDNN and PyTorch have two, which are only added to each other.

    Shapes:
        x: (..., D) -> (..., features), one time step, in the dtype of x. All axes but the last are
            batch axes: for a sequence wrap the cell in `recurrent`.
        params: ``input`` has the ``kernel`` W (D, 4 * features) and the ``bias`` b
            (4 * features,); ``hidden`` has the ``kernel`` U (features, 4 * features).
        state while streaming: ``hidden`` h and ``cell`` c, each (..., features), zeros at the
            start.

    Args:
        features: size of the last axis of y; positive.
        bias: False leaves the bias out.
        kernel_init: initializer of W; ``lecun_normal`` keeps the variance of x.
        hidden_init: initializer of U, called for the square matrix of each gate; orthogonal (Saxe,
            McClelland, Ganguli 2013, arXiv:1312.6120).
        bias_init: initializer of b; zeros, but ones for f, so that the cell forgets little at
            first (Jozefowicz, Zaremba, Sutskever 2015, ICML).

    Raises:
        LayerError: x is no floating-point array of at least one axis, or the carry does not fit x.

    Example:
        >>> net = dp.recurrent(dp.lstm(3))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 5, 4)))
        >>> params["input"]["kernel"].shape, params["input"]["bias"].tolist()[:6]
        ((4, 12), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])

    Source: Hochreiter and Schmidhuber 1997, Neural Computation 9, 1735-1780, with the forget gate
    of Gers, Schmidhuber, Cummins 2000, Neural Computation 12, 2451-2471.
    """

    def step(params: Params, carry: Carry, wx: jax.Array, uh: jax.Array) -> Carry:
        i, f, g, o = jnp.split(wx + uh, 4, axis=-1)  # each (..., features)
        c = jax.nn.sigmoid(f) * carry["cell"] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return {"hidden": h, "cell": c}

    init = _initializer(features, "ifgo", bias, kernel_init, hidden_init, bias_init)
    return _cell(features, 4, ["hidden", "cell"], init, step)


@factory
def gru(
    features: int, *, bias: bool = True, kernel_init: Initializer = "lecun_normal",
    hidden_init: Initializer = "orthogonal", bias_init: Initializer = "zeros",
) -> Layer:
    """One step of a gated recurrent unit: ``h = (1 - z) * n + z * h``; y is h.

    The reset and update gates are ``(r, z) = sigmoid(x @ W + b + h @ U)``, the candidate is
    ``n = tanh(x @ W_n + b_n + r * (h @ U_n + c_n))``. The reset gate is applied after the product,
    as in the first version of the paper, in cuDNN and in PyTorch, so that all gates share two
    products.

    Shapes:
        x: (..., D) -> (..., features), one time step, in the dtype of x. All axes but the last are
            batch axes: for a sequence wrap the cell in `recurrent`.
        params: ``input`` has the ``kernel`` (D, 3 * features) and the ``bias`` (3 * features,) of
            r, z and n in this order; ``hidden`` has the ``kernel`` (features, 3 * features) and the
            ``bias`` (features,) c_n of the candidate alone.
        state while streaming: ``hidden`` (..., features), zeros at the start.

    Args:
        features, kernel_init, hidden_init: as in `lstm`.
        bias: False leaves both biases out.
        bias_init: initializer of both biases; zeros.

    Raises:
        LayerError: x is no floating-point array of at least one axis, or the carry does not fit x.

    Example:
        >>> net = dp.recurrent(dp.gru(3))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 5, 4)))
        >>> params["hidden"]["kernel"].shape, params["hidden"]["bias"].shape
        ((3, 9), (3,))

    Source: Cho et al. 2014, arXiv:1406.1078v1, section 2.3.
    """

    def step(params: Params, carry: Carry, wx: jax.Array, uh: jax.Array) -> Carry:
        x_r, x_z, x_n = jnp.split(wx, 3, axis=-1)  # each (..., features)
        h_r, h_z, h_n = jnp.split(uh, 3, axis=-1)
        if "bias" in params["hidden"]:
            check_leaves({"bias": params["hidden"]["bias"]}, features)
            h_n = h_n + along(params["hidden"]["bias"], h_n)
        z = jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
        return {"hidden": (1 - z) * n + z * carry["hidden"]}

    without_candidate_bias = _initializer(
        features, "rzn", bias, kernel_init, hidden_init, bias_init)

    def init(key: jax.Array, x: Any) -> tuple[Params, State]:
        params, state = without_candidate_bias(key, x)
        if bias:
            params["hidden"]["bias"] = parameter(
                fold(key, "hidden"), "bias", bias_init, (features,), x)
        return params, state

    return _cell(features, 3, ["hidden"], init, step)


def _initializer(
    features: int, gates: Sequence[str], bias: bool, kernel_init: Initializer,
    hidden_init: Initializer, bias_init: Initializer,
) -> Callable[[jax.Array, Any], tuple[Params, State]]:
    """The `init` of W, b and U; the columns of each gate stand side by side, in this order."""
    check_count("features", features)
    width = features * len(gates)

    def init(key: jax.Array, x: Any) -> tuple[Params, State]:
        check_array(x, rank=1, axes="(..., features)")
        input_key, hidden_key = fold(key, "input"), fold(key, "hidden")
        shape = (x.shape[-1], width)
        of_input = affine_params(input_key, shape, x, bias, kernel_init, bias_init)
        squares = [
            parameter(fold(hidden_key, gate), "hidden", hidden_init, (features, features), x)
            for gate in gates]
        return {"input": of_input, "hidden": {"kernel": jnp.concatenate(squares, -1)}}, {}

    return init


def _cell(
    features: int, gates: int, names: list[str], init: Callable[..., Any],
    step: Callable[[Params, Carry, jax.Array, jax.Array], Carry],
) -> Layer:
    """The layer of ``carry = step(params, carry, x @ W + b, h @ U)``; h and y are its "hidden"."""
    width = features * gates

    def zeros(x: jax.Array) -> Carry:
        check_array(x, rank=1, axes="(..., features)")
        return {name: jnp.zeros((*x.shape[:-1], features), x.dtype) for name in names}

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=1, axes="(..., features)")
        check_leaves({"kernel": params["hidden"]["kernel"]}, width)
        _check_carry(state, names, (*x.shape[:-1], features), x)
        carry = {name: beside(leaf, x).astype(x.dtype)
                 for name, leaf in (state or zeros(x)).items()}
        wx = affine(params["input"], x, width)  # (..., gates * features)
        uh = carry["hidden"] @ params["hidden"]["kernel"].astype(x.dtype)
        new = step(params, carry, wx, uh)
        return new["hidden"], {name: new[name].astype(leaf.dtype) for name, leaf in state.items()}

    def start(params: Params, state: State, x: jax.Array, *, length: int) -> State:
        return zeros(x)

    return Layer(init, apply, start, casts=True)


def _check_carry(state: State, names: list[str], shape: tuple[int, ...], x: Any) -> None:
    """Raise unless the state is empty or a carry that fits x: another one would be broadcast."""
    if state and (state.keys() != set(names) or any(a.shape != shape for a in state.values())):
        raise LayerError(f"a carry of {' and '.join(names)} of shape {shape}", show(state),
                         "start a new stream on input of this shape")
    for leaf in state.values():
        check_chunk(leaf, x)
