"""`spectral_norm`: the largest singular value, at init and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, X, close, drawn

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
    merged, rest = dp.tree.merge(net, params, state)
    np.testing.assert_allclose(merged["kernel"], kernel / largest, rtol=1e-4)
    assert rest == {}
    close(net(params, x, state=state), layer(merged, x))


def test_power_iteration_follows_the_kernel_in_training():
    net = dp.spectral_norm(dp.linear(3))
    params, state = net.init(KEY, X)
    params["kernel"] = jnp.asarray(drawn(4, 3), jnp.float32)
    largest = np.linalg.svd(np.asarray(params["kernel"]), compute_uv=False)[0]
    vector = lambda state: state["#spectral_norm"]["kernel"]  # noqa: E731
    value = lambda state: float(jnp.linalg.norm(params["kernel"] @ vector(state)))  # noqa: E731
    before = value(state)
    step = jax.jit(lambda state: net.apply(params, state, X, train=True)[1])
    for _ in range(40):
        state = step(state)
    assert abs(before - largest) > 0.05 * largest
    np.testing.assert_allclose(value(state), largest, rtol=1e-5)
    same_state = net.apply(params, state, X)[1]
    np.testing.assert_array_equal(vector(same_state), vector(state))


@pytest.mark.slow
def test_the_lipschitz_constant_of_a_net_is_at_most_one():
    """It is at most the product of the constants of the layers."""
    net = dp.repeat(3, dp.spectral_norm(dp.linear(4, bias=False)) >> jnp.tanh)
    params, state = net.init(KEY, X)
    jacobian = jax.jacobian(lambda x: net(params, x, state=state))(X[0])
    assert np.linalg.norm(jacobian, 2) <= 1 + 1e-4


# Sizes of weights whose squares overflow or underflow in the dtype.
SIZES = [(jnp.float16, 1e-4), (jnp.float16, 300.0), *(
    (dtype, size) for dtype in (jnp.bfloat16, jnp.float32) for size in (1e-25, 1.0, 1e25))]


@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_kernels_of_any_size(dtype, size):
    net = dp.spectral_norm(dp.linear(3, bias=False))
    kernel = jnp.asarray(size * drawn(4, 3).astype(np.float32), dtype)
    net.plan(X)
    params, state = dp.tree.unmerge(net, {"kernel": kernel}, key=KEY)
    merged, _ = dp.tree.merge(net, params, state)
    wide = np.asarray(kernel, np.float64)
    wanted = wide / np.linalg.svd(wide, compute_uv=False)[0]
    assert merged["kernel"].dtype == dtype
    np.testing.assert_allclose(np.asarray(merged["kernel"], np.float64), wanted, rtol=0,
                               atol=3 * max(float(jnp.finfo(dtype).eps), 1e-5))


@pytest.mark.slow
def test_a_kernel_of_zeros_is_not_divided_and_learns():
    net = dp.spectral_norm(dp.linear(3, bias=False, kernel_init="zeros"))
    params, state = net.init(KEY, X)
    run = lambda p, x: net.apply(p, state, x, train=True)[0].sum()  # noqa: E731
    assert not net(params, X, state=state).any()
    slope = jax.grad(run)(params, X)["kernel"]
    close(slope, jnp.broadcast_to(X.sum(0)[:, None], (4, 3)))  # as without a division
    # The vector stays a unit vector, so that later kernels are divided by their norm.
    params = {"kernel": jnp.asarray(drawn(4, 3), jnp.float32)}
    step = jax.jit(lambda state: net.apply(params, state, X, train=True)[1])
    for _ in range(40):
        state = step(state)
    merged, _ = dp.tree.merge(net, params, state)
    np.testing.assert_allclose(np.linalg.norm(merged["kernel"], 2), 1, rtol=1e-4)


@pytest.mark.slow
def test_a_complex_kernel_in_numpy():
    kernel = jnp.asarray(drawn(3, 2) + 1j * drawn(3, 2, seed=1), jnp.complex64)
    layer = dp.Layer(lambda key, x: ({"kernel": kernel}, {}),
                     lambda params, state, x, **_: ((x @ params["kernel"]).real, state))
    net = dp.spectral_norm(layer)
    params, state = net.init(KEY, jnp.ones((1, 3)))
    merged, _ = dp.tree.merge(net, params, state)
    largest = np.linalg.svd(np.asarray(kernel), compute_uv=False)[0]
    np.testing.assert_allclose(merged["kernel"], np.asarray(kernel) / largest, rtol=1e-3)
