"""`bilinear` against loops in NumPy, and its pair of inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import drawn

import diffprog as dp

KEY = jax.random.key(0)


def looped(a, b, kernel, bias):
    y = np.zeros((*a.shape[:-1], kernel.shape[-1]))
    for i in np.ndindex(*y.shape):
        y[i] = bias[i[-1]] + sum(a[i[:-1]][m] * kernel[m, n, i[-1]] * b[i[:-1]][n]
                                 for m in range(a.shape[-1]) for n in range(b.shape[-1]))
    return y


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3)])
def test_bilinear_equals_loops_in_numpy(leading):
    a, b = drawn(*leading, 4), drawn(*leading, 2, seed=1)
    kernel, bias = drawn(4, 2, 3, seed=2), drawn(3, seed=3)
    with jax.enable_x64(True):
        x = jnp.asarray(a), jnp.asarray(b)
        params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        y = dp.bilinear(3)(params, x)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, looped(a, b, kernel, bias), rtol=0, atol=1e-12)
        del params["bias"]
        y = dp.bilinear(3, bias=False)(params, list(x))
        np.testing.assert_allclose(y, looped(a, b, kernel, np.zeros(3)), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_bilinear_after_branch():
    net = dp.branch(dp.linear(4), dp.linear(5)) >> dp.bilinear(3)
    params, _ = net.init(KEY, jnp.ones((2, 6)))
    assert {name: leaf.shape for name, leaf in params["bilinear_0"].items()} == {
        "kernel": (4, 5, 3), "bias": (3,)}


@pytest.mark.slow
def test_the_default_kernel_gives_the_product_of_the_variances():
    x = jnp.asarray(drawn(500, 20)), 3 * jnp.asarray(drawn(500, 30, seed=1))
    params, _ = dp.bilinear(40).init(KEY, x)
    assert abs(float(params["kernel"].std()) * 600**0.5 - 1) < 0.02
    assert abs(float(dp.bilinear(40)(params, x).std()) / 3 - 1) < 0.05
    np.testing.assert_array_equal(params["bias"], 0)


def test_bfloat16_output_of_float32_parameters():
    a, b = (jnp.asarray(drawn(5, n), jnp.bfloat16) for n in (4, 2))
    params, _ = dp.bilinear(3).init(KEY, (a, b))
    assert {leaf.dtype.name for leaf in params.values()} == {"float32"}
    y = dp.bilinear(3)(params, (a, b))
    assert y.dtype == jnp.bfloat16
    wanted = looped(*(np.asarray(p, np.float64) for p in (a, b, params["kernel"])), np.zeros(3))
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=0.05, atol=0.05)


def test_parameters_of_other_inputs_raise():
    a, b = jnp.ones((2, 4)), jnp.ones((2, 5))
    net = dp.bilinear(3)
    params, _ = net.init(KEY, (a, b))
    with pytest.raises(dp.LayerError, match="4 features"):
        net(params, (b, a))
    narrow, _ = net.init(KEY, (a[:, :1], b[:, :1]))
    with pytest.raises(dp.LayerError, match="1 feature "):
        net(narrow, (a, b))
    with pytest.raises(dp.LayerError, match="params of 2 features"):
        dp.bilinear(2)(params, (a, b))


@pytest.mark.parametrize("features", [0, 2.0, True])
def test_features_are_a_positive_int(features):
    with pytest.raises(dp.LayerError, match="features"):
        dp.bilinear(features)
