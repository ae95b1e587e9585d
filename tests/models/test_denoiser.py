"""What denoisers are told: waves of the time, and a vector of the class or of none."""

import jax
import jax.numpy as jnp
import numpy as np
from comparing import close, computes, drawn, params_of

import diffprog as dp
from diffprog.models.denoiser import time_and_class, waves

IMAGES = jnp.ones((2, 3, 3, 1))
TIME = jnp.array([3, 70])


def test_waves_of_numbers():
    with jax.enable_x64(True):
        found = waves(jnp.array([[0, 5, 900]]), 4, jnp.float64)
    for row, t in zip(found[0], (0, 5, 900), strict=True):
        wanted = [np.sin(t), np.cos(t), np.sin(t / 100), np.cos(t / 100)]
        np.testing.assert_allclose(row, wanted, rtol=0, atol=1e-12)


def test_the_formula():
    first, second, table = drawn(4, 6), drawn(6, 6, seed=1), np.float32(drawn(11, 6, seed=2))
    params = {"classes": {"embedding": table}, "time": {
        "body": {"linear_0": {"kernel": first, "bias": np.ones(6)}},
        "head": {"kernel": second, "bias": np.zeros(6)}}}
    t = np.array([[3.0], [70.0]])
    told = np.concatenate([np.sin(t), np.cos(t), np.sin(t / 100), np.cos(t / 100)], 1) @ first + 1
    told = told / (1 + np.exp(-told)) @ second

    def net(condition):
        @dp.program(told=time_and_class(4, 6, 10))
        def net(layers, x):
            return layers.told(x, time=TIME, condition=condition)

        return net

    for condition, rows in ((jnp.array([9, 4]), [9, 4]), (None, [10, 10])):
        computes(net(condition), {"told": params}, np.ones((2, 3, 3, 1)), told + table[rows])


def test_leading_axes_are_free():
    net = time_and_class(4, 6, 10)
    time, condition = jnp.array([[3, 70, 5]] * 2), jnp.array([[1, 2, 10]] * 2)
    params = params_of(net, IMAGES, time=TIME)
    whole = net(params, jnp.ones((2, 3, 4, 4, 1)), time=time, condition=condition)
    one = net(params, jnp.ones((4, 4, 1)), time=time[0, 1], condition=condition[0, 1])
    assert whole.shape == (2, 3, 6)
    close(whole[0, 1], one)


def test_a_number_that_is_no_class_gives_nan():
    net = time_and_class(4, 6, 10)
    params = params_of(net, IMAGES, time=TIME)
    found = net(params, IMAGES, time=TIME, condition=jnp.array([11, 10]))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()
