"""The conditioning of denoisers: sinusoids of the time, and an embedding of the class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import close, computes, drawn, params_of

import diffprog as dp
from diffprog.models.denoiser import sinusoids, time_and_class

IMAGES = jnp.ones((2, 3, 3, 1))
TIME = jnp.array([3, 70])


def test_sinusoids_have_the_frequencies_of_the_formula():
    with jax.enable_x64(True):
        found = sinusoids(jnp.array([[0, 5, 900]]), 4, jnp.float64)
    for row, t in zip(found[0], (0, 5, 900), strict=True):
        wanted = [np.sin(t), np.cos(t), np.sin(t / 100), np.cos(t / 100)]
        np.testing.assert_allclose(row, wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_conditioning_vector_in_numpy():
    first, second, table = drawn(4, 6), drawn(6, 6, seed=1), np.float32(drawn(11, 6, seed=2))
    params = {"classes": {"embedding": table}, "time": {
        "body": {"linear_0": {"kernel": first, "bias": np.ones(6)}},
        "head": {"kernel": second, "bias": np.zeros(6)}}}
    t = np.array([[3.0], [70.0]])
    y = np.concatenate([np.sin(t), np.cos(t), np.sin(t / 100), np.cos(t / 100)], 1) @ first + 1
    y = y / (1 + np.exp(-y)) @ second

    def net(condition):
        @dp.program(told=time_and_class(4, 6, 10))
        def net(layers, x):
            return layers.told(x, time=TIME, condition=condition)

        return net

    for condition, rows in ((jnp.array([9, 4]), [9, 4]), (None, [10, 10])):
        computes(net(condition), {"told": params}, np.ones((2, 3, 3, 1)), y + table[rows])


@pytest.mark.slow
def test_any_number_of_batch_axes():
    net = time_and_class(4, 6, 10)
    time, condition = jnp.array([[3, 70, 5]] * 2), jnp.array([[1, 2, 10]] * 2)
    params = params_of(net, IMAGES, time=TIME)
    whole = net(params, jnp.ones((2, 3, 4, 4, 1)), time=time, condition=condition)
    one = net(params, jnp.ones((4, 4, 1)), time=time[0, 1], condition=condition[0, 1])
    assert whole.shape == (2, 3, 6)
    close(whole[0, 1], one)


@pytest.mark.slow
def test_an_invalid_class_returns_nan():
    net = time_and_class(4, 6, 10)
    params = params_of(net, IMAGES, time=TIME)
    found = net(params, IMAGES, time=TIME, condition=jnp.array([11, 10]))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()
