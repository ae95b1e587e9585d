"""`weight_norm`: the formula, and kernels that are zero at first."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import X, close, drawn, gradient, params_of

import diffprog as dp


def test_the_formula_in_numpy():
    net = dp.weight_norm(dp.conv(3, 2))
    x = jnp.asarray(drawn(2, 3, 3, 2), jnp.float32)
    params = params_of(net, x)
    assert jax.tree.map(jnp.shape, params["kernel"]) == {"direction": (2, 2, 2, 3), "scale": (3,)}
    params["kernel"]["scale"] = jnp.array([1.0, 2.0, -3.0])
    v = np.asarray(params["kernel"]["direction"], np.float64)
    lengths = [np.sqrt(sum(w * w for w in v[..., j].ravel())) for j in range(3)]
    kernel = v / np.array(lengths) * [1.0, 2.0, -3.0]
    plain = {"kernel": kernel.astype(np.float32), "bias": params["bias"]}
    close(net(params, x), dp.conv(3, 2)(plain, x))


def test_the_initial_output_is_unchanged():
    plain, net = dp.linear(3), dp.weight_norm(dp.linear(3))
    close(net(params_of(net), X), plain(params_of(plain), X))


def test_a_kernel_of_zeros_learns():
    net = dp.weight_norm(dp.linear(3, kernel_init="zeros"))
    params = params_of(net)
    assert not net(params, X).any()
    grads = gradient(lambda p, x: net(p, x) + 1, params)["kernel"]
    chex.assert_tree_all_finite(grads)
    assert (grads["scale"] != 0).all()


# Sizes of weights whose squares overflow or underflow in the dtype.
SIZES = [(jnp.float16, 1e-4), (jnp.float16, 300.0), *(
    (dtype, size) for dtype in (jnp.bfloat16, jnp.float32) for size in (1e-25, 1.0, 1e25))]


@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_norms_of_weights_of_any_size(dtype, size):
    direction = jnp.asarray(size * drawn(4, 3).astype(np.float32), dtype)
    net = dp.weight_norm(dp.linear(3, bias=False))
    net.plan(X)
    wide = np.asarray(direction, np.float64)
    merged, _ = dp.tree.merge(net, {"kernel": {
        "direction": direction, "scale": jnp.array([1.0, 2.0, -3.0], dtype)}})
    wanted = wide / np.sqrt((wide ** 2).sum(0)) * [1.0, 2.0, -3.0]
    assert merged["kernel"].dtype == dtype
    np.testing.assert_allclose(np.asarray(merged["kernel"], np.float64), wanted,
                               rtol=2 * float(jnp.finfo(dtype).eps))


@pytest.mark.slow
def test_the_norm_of_complex_weights():
    """The norm of (1, i) is sqrt(2), while the sum of squares is 0."""
    def begun(key, shape, dtype):
        return jnp.array([[1.0, 2.0], [1.0j, 0.0]])

    layer = dp.Layer(lambda key, x: ({"kernel": begun(key, None, None)}, {}),
                     lambda params, state, x, **_: ((x @ params["kernel"]).real, state))
    net, x = dp.weight_norm(layer), jnp.ones((1, 2))
    params, _ = net.init(jax.random.key(0), x)
    np.testing.assert_allclose(params["kernel"]["scale"], [np.sqrt(2), 2.0], rtol=1e-6)
    merged, _ = dp.tree.merge(net, params)
    np.testing.assert_allclose(merged["kernel"], begun(None, None, None), rtol=1e-6)
    grads = jax.grad(lambda p: net(p, x).sum())(params)
    chex.assert_tree_all_finite(grads)
