"""`quantize`: the grid, and the straight-through gradient."""

import jax.numpy as jnp
import numpy as np
from support.comparing import X, close, gradient, params_of, same

import diffprog as dp


def test_the_grid_in_numpy():
    net = dp.quantize(dp.linear(3), bits=3)
    params = params_of(net)
    kernel = np.asarray(params["kernel"], np.float64)
    columns = []
    for column in kernel.T:
        step = np.abs(column).max() / 3
        columns.append(step * np.round(column / step))
    wanted = np.array(columns).T.astype(np.float32)
    merged, _ = dp.tree.merge(net, params)
    close(merged["kernel"], wanted)
    assert np.abs(wanted - kernel).max() > 0.01
    close(net(params, X), X @ wanted)


def test_the_gradient_is_straight_through():
    net, plain = dp.quantize(dp.linear(3), bits=3), dp.linear(3)
    params = params_of(net)
    merged, _ = dp.tree.merge(net, params)
    close(gradient(net, params), gradient(plain, merged))


def test_a_column_of_zeros_stays_zero():
    net = dp.quantize(dp.linear(3, kernel_init="zeros"))
    same(net(params_of(net), X), jnp.zeros((3, 3)))


def test_small_weights_in_float16():
    """A step of 1e-4 / 127 is subnormal in float16, so the steps are float32."""
    net = dp.quantize(dp.linear(3, bias=False))
    net.plan(X)
    kernel = jnp.asarray(1e-4 * np.random.default_rng(0).normal(size=(4, 3)), jnp.float16)
    merged, _ = dp.tree.merge(net, {"kernel": kernel})
    wide = np.asarray(kernel, np.float64)
    step = np.abs(wide).max(0) / 127
    assert merged["kernel"].dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(merged["kernel"], np.float64),
                               np.round(wide / step) * step, rtol=1e-2, atol=6e-8)
