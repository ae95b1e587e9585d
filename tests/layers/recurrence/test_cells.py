"""Cells against NumPy, gate by gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, drawn, equal, params_of

import diffprog as dp

X = drawn(2, 4)
CELLS = {"simple_rnn": (dp.simple_rnn, 1), "lstm": (dp.lstm, 4), "gru": (dp.gru, 3)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def trees(gates, features=3, *, bias=True, own=False):
    """Random parameters and carry of a cell on x."""
    params = {"input": {"kernel": drawn(4, gates * features, seed=1)},
              "hidden": {"kernel": drawn(features, gates * features, seed=2)}}
    if bias:
        params["input"]["bias"] = drawn(gates * features, seed=3)
    if bias and own:
        params["hidden"]["bias"] = drawn(features, seed=4)
    return params, {"hidden": drawn(2, features, seed=5), "cell": drawn(2, features, seed=6)}


def rnn_step(params, carry, x):
    h = np.tanh(x @ params["input"]["kernel"] + params["input"].get("bias", 0)
                + carry["hidden"] @ params["hidden"]["kernel"])
    return {"hidden": h}


def lstm_step(params, carry, x):
    gate = {}
    for k, name in enumerate("ifgo"):
        part = slice(3 * k, 3 * k + 3)
        bias = params["input"]["bias"][part] if "bias" in params["input"] else 0
        gate[name] = (x @ params["input"]["kernel"][:, part] + bias
                      + carry["hidden"] @ params["hidden"]["kernel"][:, part])
    c = sigmoid(gate["f"]) * carry["cell"] + sigmoid(gate["i"]) * np.tanh(gate["g"])
    return {"hidden": sigmoid(gate["o"]) * np.tanh(c), "cell": c}


def gru_step(params, carry, x):
    wx = np.split(x @ params["input"]["kernel"] + params["input"].get("bias", 0), 3, -1)
    uh = np.split(carry["hidden"] @ params["hidden"]["kernel"], 3, -1)
    r, z = sigmoid(wx[0] + uh[0]), sigmoid(wx[1] + uh[1])
    n = np.tanh(wx[2] + r * (uh[2] + params["hidden"].get("bias", 0)))
    return {"hidden": (1 - z) * n + z * carry["hidden"]}


STEPS = {"simple_rnn": rnn_step, "lstm": lstm_step, "gru": gru_step}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_a_step_equals_the_formula(name, bias):
    make, gates = CELLS[name]
    net = make(3, bias=bias)
    params, carry = trees(gates, bias=bias, own=name == "gru")
    with jax.enable_x64(True):
        params, x = jax.tree.map(jnp.asarray, (params, X))
        dp.tree.verify(net, params, x)
        state = net.start(params, {}, x, length=1)
        assert not any(leaf.any() for leaf in state.values())
        given = {part: jnp.asarray(carry[part]) for part in state}
        for before, start in ((given, given), (state, state), ({}, state)):
            wanted = STEPS[name](*jax.tree.map(np.asarray, (params, start)), X)
            y, new = net.apply(params, before, x)
            np.testing.assert_allclose(y, wanted["hidden"], rtol=0, atol=1e-14)
            assert set(new) == set(before)
            for part, leaf in new.items():
                np.testing.assert_allclose(leaf, wanted[part], rtol=0, atol=1e-14)


@pytest.mark.slow
def test_the_activation_of_simple_rnn_is_used():
    net = dp.simple_rnn(64, activation=jax.nn.relu)
    params, _ = net.init(KEY, jnp.asarray(X))
    y = net(params, jnp.asarray(X))
    assert float(y.min()) == 0 and float(y.max()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_leading_axes_are_batch_axes_and_dtypes_are_kept(name):
    net = CELLS[name][0](3)
    x = jnp.asarray(drawn(2, 3, 4), jnp.bfloat16)
    params = params_of(net, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    state = net.start(params, {}, x, length=1)
    y, new = net.apply(params, state, x)
    assert y.shape == (2, 3, 3)
    assert {leaf.dtype.name for leaf in (y, *state.values(), *new.values())} == {"bfloat16"}
    np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (
        y[:, 1], net(params, x[:, 1]))))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state)  # a carry keeps its dtype
    assert {leaf.dtype.name for leaf in net.apply(params, wide, x)[1].values()} == {"float32"}


@pytest.mark.parametrize("name", CELLS)
def test_the_initial_parameters(name):
    make, gates = CELLS[name]
    params = params_of(make(5), jnp.ones((2, 4)))
    squares = jnp.split(params["hidden"]["kernel"], gates, -1)
    for i, square in enumerate(squares):
        np.testing.assert_allclose(square @ square.T, np.eye(5), atol=1e-5)
        assert not any(equal(square, other) for other in squares[:i])
    wanted = np.zeros(gates * 5)
    wanted[5:10] = name == "lstm"
    np.testing.assert_array_equal(params["input"]["bias"], wanted)
    leaves = {"input/kernel", "input/bias", "hidden/kernel"} | {
        "hidden/bias" for _ in range(name == "gru")}
    assert set(dp.tree.paths(params)) == leaves
    bare = params_of(make(5, bias=False), jnp.ones((2, 4)))
    assert set(dp.tree.paths(bare)) == {"input/kernel", "hidden/kernel"}
    assert equal(bare["hidden"]["kernel"], params["hidden"]["kernel"])
    eye = lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype)  # noqa: E731
    same = params_of(make(5, hidden_init=eye, bias_init="ones"), jnp.ones((2, 4)))
    np.testing.assert_array_equal(same["hidden"]["kernel"], np.tile(np.eye(5), gates))
    np.testing.assert_array_equal(same["input"]["bias"], 1)
    if name == "gru":
        np.testing.assert_array_equal(same["hidden"]["bias"], 1)


@pytest.mark.parametrize("name", CELLS)
def test_a_step_has_two_matrix_products(name):
    cell, _ = CELLS[name]
    params = params_of(cell(3), jnp.ones((2, 4)))
    text = str(jax.make_jaxpr(cell(3).apply)(params, {}, jnp.ones((2, 4))))
    assert text.count("dot_general[") == 2
