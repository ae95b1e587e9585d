"""`linear` against NumPy: the formula, leading axes, dtypes and initializers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import drawn

import diffprog as dp


def params_of(kernel, bias=None):
    given = {"kernel": jnp.asarray(kernel)}
    return given if bias is None else given | {"bias": jnp.asarray(bias)}


def test_linear_equals_its_formula():
    x, kernel, bias = drawn(5, 4), drawn(4, 3, seed=1), drawn(3, seed=2)
    wanted = np.zeros((5, 3))
    for i in range(5):
        for j in range(3):
            wanted[i, j] = sum(x[i, k] * kernel[k, j] for k in range(4)) + bias[j]
    y = dp.linear(3)(params_of(kernel, bias), jnp.asarray(x))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("leading", [(), (5,), (2, 1, 3)])
def test_any_number_of_leading_axes(leading):
    x, kernel, bias = drawn(*leading, 4), drawn(4, 3, seed=1), drawn(3, seed=2)
    net = dp.linear(3)
    params, _ = net.init(jax.random.key(0), jax.ShapeDtypeStruct(x.shape, jnp.float32))
    assert {name: leaf.shape for name, leaf in params.items()} == {"kernel": (4, 3), "bias": (3,)}
    y = net(params_of(kernel, bias), jnp.asarray(x))
    assert y.shape == (*leading, 3)
    np.testing.assert_allclose(y, np.tensordot(x, kernel, 1) + bias, rtol=1e-5, atol=1e-6)


def test_without_bias_the_map_is_linear():
    net = dp.linear(3, bias=False)
    params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
    assert set(params) == {"kernel"} and state == {}
    x = drawn(2, 4)
    y = net(params, jnp.asarray(x))
    np.testing.assert_allclose(y, x @ np.asarray(params["kernel"]), rtol=1e-5, atol=1e-6)
    assert not np.any(np.asarray(net(params, jnp.zeros((2, 4)))))


def test_float64_is_kept():
    with jax.enable_x64(True):
        x = jnp.asarray(drawn(5, 4))
        params, _ = dp.linear(3).init(jax.random.key(0), x)
        assert {leaf.dtype.name for leaf in params.values()} == {"float64"}
        params["bias"] = jnp.asarray(drawn(3, seed=2))
        y = dp.linear(3)(params, x)
        assert y.dtype == jnp.float64
        wanted = np.asarray(x) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-14)


def test_bfloat16_output_of_float32_parameters():
    x = jnp.asarray(drawn(5, 4), jnp.bfloat16)
    net = dp.linear(3)
    params, _ = net.init(jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in params.values()} == {"float32"}
    y = net(params, x)
    assert y.dtype == jnp.bfloat16
    wanted = np.asarray(x, np.float32) @ np.asarray(params["kernel"])
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, rtol=0.05, atol=0.05)


def test_initializers_are_used():
    net = dp.linear(3, kernel_init=jax.nn.initializers.ones,
                    bias_init=jax.nn.initializers.constant(2.0))
    params, _ = net.init(jax.random.key(0), jnp.ones((2, 4)))
    np.testing.assert_array_equal(params["kernel"], np.ones((4, 3)))
    np.testing.assert_array_equal(params["bias"], np.full(3, 2.0))
    np.testing.assert_array_equal(net(params, jnp.ones((2, 4))), np.full((2, 3), 6.0))


def test_the_default_kernel_keeps_the_variance_and_the_bias_is_zero():
    params, _ = dp.linear(400).init(jax.random.key(0), jnp.ones((1, 100)))
    assert abs(float(jnp.var(params["kernel"])) * 100 - 1) < 0.05
    assert abs(float(jnp.mean(params["kernel"]))) < 0.005
    np.testing.assert_array_equal(params["bias"], np.zeros(400))


@pytest.mark.parametrize(("x", "wants"), [
    (jnp.ones((2, 4), jnp.int32), "floating-point"), (jnp.ones(()), "at least 1 axis")])
def test_init_raises_for_integers_and_scalars(x, wants):
    with pytest.raises(dp.LayerError, match=wants):
        dp.linear(3).init(jax.random.key(0), x)


def test_apply_raises_for_integers():
    net = dp.linear(3)
    params, _ = net.init(jax.random.key(0), jnp.ones((2, 4)))
    with pytest.raises(dp.LayerError, match="floating-point"):
        net(params, jnp.ones((2, 4), jnp.int32))


@pytest.mark.parametrize("features", [0, -1, 2.0, True])
def test_features_out_of_range_raise(features):
    with pytest.raises(dp.LayerError, match="features"):
        dp.linear(features)
