"""`weight_norm`: the formula, and kernels that begin at zero."""

import jax
import jax.numpy as jnp
import numpy as np
from comparing import X, close, drawn, gradient, params_of

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


def test_the_layer_begins_as_it_was():
    plain, net = dp.linear(3), dp.weight_norm(dp.linear(3))
    close(net(params_of(net), X), plain(params_of(plain), X))


def test_a_kernel_that_begins_at_zero_learns():
    net = dp.weight_norm(dp.linear(3, kernel_init="zeros"))
    params = params_of(net)
    assert not net(params, X).any()
    grads = gradient(lambda p, x: net(p, x) + 1, params)["kernel"]
    assert jnp.isfinite(grads["direction"]).all() and (grads["scale"] != 0).all()
