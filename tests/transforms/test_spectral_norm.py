"""`spectral_norm`: the largest singular value, found and followed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import KEY, X, close, drawn

import diffprog as dp


@pytest.mark.parametrize("layer, x, matrix", [
    (dp.linear(3), X, (4, 3)),
    (dp.conv(3, 2), jnp.ones((1, 3, 3, 2)), (8, 3)),
])
def test_kernels_are_divided_by_their_largest_singular_value(layer, x, matrix):
    net = dp.spectral_norm(layer)
    params, state = net.init(KEY, x)
    kernel = np.asarray(params["kernel"])
    largest = np.linalg.svd(kernel.reshape(matrix), compute_uv=False)[0]
    merged, rest = dp.merge(net, params, state)
    np.testing.assert_allclose(merged["kernel"], kernel / largest, rtol=1e-4)
    assert rest == {}
    close(net(params, x, state=state), layer(merged, x))


def test_training_follows_a_kernel_that_changes():
    net = dp.spectral_norm(dp.linear(3))
    params, state = net.init(KEY, X)
    params["kernel"] = jnp.asarray(drawn(4, 3), jnp.float32)
    largest = np.linalg.svd(np.asarray(params["kernel"]), compute_uv=False)[0]
    value = lambda state: float(jnp.linalg.norm(params["kernel"] @ state["kernel"]))  # noqa: E731
    before = value(state)
    step = jax.jit(lambda state: net.apply(params, state, X, train=True)[1])
    for _ in range(40):
        state = step(state)
    assert abs(before - largest) > 0.05 * largest
    np.testing.assert_allclose(value(state), largest, rtol=1e-5)
    same_state = net.apply(params, state, X)[1]
    np.testing.assert_array_equal(same_state["kernel"], state["kernel"])


def test_a_net_of_such_layers_stretches_nothing():
    """Its Lipschitz constant is at most one: the product of those of its layers."""
    net = dp.repeat(3, dp.spectral_norm(dp.linear(4, bias=False)) >> jnp.tanh)
    params, state = net.init(KEY, X)
    jacobian = jax.jacobian(lambda x: net(params, x, state=state))(X[0])
    assert np.linalg.norm(jacobian, 2) <= 1 + 1e-4
