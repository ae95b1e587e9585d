"""Activations against formulas and derivatives in NumPy; `prelu` and gated linear units."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

KEY = jax.random.key(0)
POINTS = [-30.0, -6.0, -3.0, -1.0, -0.5, -1e-8, 0.0, 1e-8, 0.3, 1.0, 2.0, 5.0, 40.0]


def normal(x):
    """Phi(x): the probability that a standard normal number is below x."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def logistic(x):
    return 1 / (1 + math.exp(-x))


# function -> its formula and its derivative; at a kink, the one-sided derivative that JAX uses
TABLE = {
    jax.nn.identity: (lambda x: x, lambda x: 1),
    dp.binary_step: (lambda x: float(x >= 0), lambda x: 1),
    jax.nn.sigmoid: (logistic, lambda x: logistic(x) * logistic(-x)),
    jnp.tanh: (math.tanh, lambda x: 1 / math.cosh(x) ** 2),
    jax.nn.relu: (lambda x: max(x, 0), lambda x: float(x > 0)),
    dp.gelu: (lambda x: x * normal(x), lambda x: normal(x) + x * density(x)),
    jax.nn.leaky_relu: (lambda x: x if x >= 0 else 0.01 * x, lambda x: 1 if x >= 0 else 0.01),
}


@pytest.mark.parametrize("f", TABLE, ids=lambda f: f.__name__)
def test_activations_equal_their_formulas_and_derivatives(f):
    formula, derivative = TABLE[f]
    with jax.enable_x64(True):
        x = jnp.array(POINTS, jnp.float64)
        # The tanh approximation of gelu has an error of 4e-4.
        y = f(x)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, [formula(v) for v in POINTS], rtol=0, atol=1e-14)
        for mode in (jax.grad, jax.jacfwd):
            got = jax.jit(jax.vmap(mode(f)))(x)
            np.testing.assert_allclose(got, [derivative(v) for v in POINTS], rtol=0, atol=1e-13)


@pytest.mark.parametrize("f", TABLE, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_activations_hold_in_float32_and_bfloat16(f, dtype, tolerance):
    x = jnp.array(POINTS, dtype)
    y = dp.serial(f)({}, x)
    assert y.dtype == dtype
    wanted = [TABLE[f][0](v) for v in np.asarray(x, np.float64)]
    np.testing.assert_allclose(
        np.asarray(y, np.float64), wanted, rtol=tolerance, atol=tolerance)


def test_binary_step_has_the_straight_through_gradient():
    net = dp.serial(dp.linear(3), dp.binary_step)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
    params, _ = net.init(KEY, x)
    y, back = jax.vjp(jax.jit(net), params, x)
    assert set(np.unique(y)) <= {0.0, 1.0}
    _, straight = jax.vjp(dp.serial(dp.linear(3)), params, x)
    cot = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, back(cot), straight(cot))
    assert repr(net) == "serial(linear(3), binary_step)"


# Learned slopes.

def test_prelu_has_a_slope_for_each_channel():
    x, scale = np.random.default_rng(0).normal(size=(3, 2, 4)), np.array([0.1, -0.5, 0.0, 2.0])
    wanted = np.maximum(x, 0) + scale * np.minimum(x, 0)
    with jax.enable_x64(True):
        params, x = {"scale": jnp.asarray(scale)}, jnp.asarray(x)
        np.testing.assert_allclose(dp.prelu()(params, x), wanted, rtol=0, atol=1e-15)
        grads, dx = jax.grad(lambda p, x: dp.prelu()(p, x).sum(), (0, 1))(params, x)
        np.testing.assert_allclose(grads["scale"], np.minimum(x, 0).sum((0, 1)), atol=1e-14)
        np.testing.assert_array_equal(dx, np.where(x > 0, 1, scale))


def test_prelu_with_a_shared_slope():
    x = jnp.array([[-2.0, 3.0], [4.0, -8.0]])
    net = dp.prelu(shared=True)
    params, _ = net.init(KEY, x)
    assert params["scale"].tolist() == [0.25]
    assert net(params, x).tolist() == [[-0.5, 3.0], [4.0, -2.0]]
    assert dp.prelu().init(KEY, x)[0]["scale"].tolist() == [0.25, 0.25]
    assert dp.prelu(scale_init="zeros").init(KEY, x)[0]["scale"].tolist() == [0.0, 0.0]


def test_prelu_keeps_bfloat16():
    x = jnp.array([-2.0, 3.0], jnp.bfloat16)
    params, _ = dp.prelu().init(KEY, x)
    y = dp.prelu()(params, x)
    assert (params["scale"].dtype, y.dtype, y.tolist()) == (jnp.float32, jnp.bfloat16, [-0.5, 3.0])


def test_prelu_with_another_number_of_channels_raises():
    narrow, wide = jnp.ones((2, 1)), jnp.ones((2, 4))
    for seen, given in ((narrow, wide), (wide, narrow)):
        with pytest.raises(dp.LayerError, match="params of"):
            dp.prelu()(dp.prelu().init(KEY, seen)[0], given)
    with pytest.raises(dp.LayerError, match="params of 1 feature,"):
        dp.prelu(shared=True)(dp.prelu().init(KEY, wide)[0], wide)


@pytest.mark.parametrize("x", [
    np.ones((), np.float32), np.ones((2, 3), np.int32),
], ids=["scalar", "integers"])
def test_prelu_of_scalars_and_integers_raises(x):
    with pytest.raises(dp.LayerError):
        dp.prelu().init(KEY, x)


# Gates.

def silu(z):
    return z / (1 + np.exp(-z))


GATES = {"glu": (dp.glu, lambda z: 1 / (1 + np.exp(-z)), True), "swiglu": (dp.swiglu, silu, False)}


@pytest.mark.parametrize(("make", "gate", "has_bias"), GATES.values(), ids=GATES)
def test_gated_units_equal_their_formula(make, gate, has_bias):
    draw = np.random.default_rng(0).normal
    with jax.enable_x64(True):
        x = draw(size=(2, 3, 4))
        for bias in (True, False):
            net = make(5, bias=bias)
            params, state = net.init(KEY, jnp.asarray(x))
            assert sorted(params) == ["gate", "up"] and state == {}
            params = jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape)), params)
            shapes = {"kernel": (4, 5)} | ({"bias": (5,)} if bias else {})
            assert {n: leaf.shape for n, leaf in params["gate"].items()} == shapes
            w, v = (x @ np.asarray(own["kernel"]) + np.asarray(own.get("bias", 0))
                    for own in (params["gate"], params["up"]))
            np.testing.assert_allclose(net(params, jnp.asarray(x)), gate(w) * v, rtol=0, atol=1e-13)
        assert ("bias" in make(5).init(KEY, jnp.asarray(x))[0]["up"]) == has_bias


def test_glu_equals_jax_nn_glu_of_both_halves():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    params, _ = dp.glu(5).init(KEY, x)
    both = jnp.concatenate([x @ params[name]["kernel"] for name in ("up", "gate")], -1)
    np.testing.assert_allclose(dp.glu(5)(params, x), jax.nn.glu(both), rtol=1e-6, atol=1e-6)


def test_repr_is_the_call_until_a_child_is_replaced():
    net = dp.serial(dp.glu(8, bias=False), dp.swiglu(4, kernel_init="he_normal"))
    assert repr(net) == "serial(glu(8, bias=False), swiglu(4, kernel_init='he_normal'))"
    assert list(net.children) == ["glu_0", "swiglu_0"]
    assert list(net.children["glu_0"].children) == ["gate", "up"]
    other = dp.replace(net, "swiglu_0/up", dp.linear(4))
    assert repr(other).endswith("swiglu(gate=linear(4, bias=False, kernel_init='he_normal'), "
                                "up=linear(4)))")
    params, _ = other.init(KEY, jnp.ones((2, 3)))
    assert sorted(params["swiglu_0"]["up"]) == ["bias", "kernel"]


@pytest.mark.parametrize("make", [dp.glu, dp.swiglu])
@pytest.mark.parametrize("features", [0, 2.0, True])
def test_gated_units_require_a_positive_number_of_features(make, features):
    with pytest.raises(dp.LayerError, match="features as an int of at least 1"):
        make(features)


@pytest.mark.parametrize("make", [dp.glu, dp.swiglu])
def test_gated_units_require_floats_and_keep_their_dtype(make):
    with pytest.raises(dp.LayerError, match="floating-point") as caught:
        make(3).init(KEY, jnp.ones((2, 4), jnp.int32))
    assert caught.value.path == "gate"
    x = jnp.ones((2, 4), jnp.bfloat16)
    assert make(3)(make(3).init(KEY, x)[0], x).dtype == jnp.bfloat16
