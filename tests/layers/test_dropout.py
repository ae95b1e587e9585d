"""Dropout of values, channels and examples: rate, expectation, gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import expect

import diffprog as dp


def run(net, x, seed=0):
    """y in training."""
    return net.apply({}, {}, x, key=jax.random.key(seed), train=True)[0]


def dropped(rate, x, seed=0):
    return run(dp.dropout(rate), x, seed)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_the_rate_is_the_fraction_dropped(rate):
    y = np.asarray(dropped(rate, jnp.ones(100_000)))
    fraction = (y == 0).mean()
    assert abs(fraction - rate) < 5 * np.sqrt(rate * (1 - rate) / y.size)
    assert abs(y.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / y.size)


def test_kept_values_are_scaled_up():
    x = np.random.default_rng(0).normal(size=(40, 50))
    y = np.asarray(dropped(0.3, jnp.asarray(x)))
    kept = y != 0
    assert 0 < kept.sum() < y.size
    np.testing.assert_allclose(y[kept], x[kept] / 0.7, rtol=1e-6)


def test_values_are_dropped_independently():
    y = np.asarray(dropped(0.5, jnp.ones((300, 300)))) / 2
    for mean in (y.mean(0), y.mean(1)):  # a mask shared along an axis gives means of 0 and 1
        assert np.abs(mean - 0.5).max() < 5 * np.sqrt(0.25 / 300)
    assert abs(np.corrcoef(y[:-1].ravel(), y[1:].ravel())[0, 1]) < 5 / 300


def test_inference_returns_x():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    net = dp.dropout(0.9)
    np.testing.assert_array_equal(net({}, x), x)
    np.testing.assert_array_equal(net({}, x, key=jax.random.key(0)), x)


def test_equal_keys_drop_equally():
    x = jnp.ones(1000)
    np.testing.assert_array_equal(dropped(0.5, x, seed=3), dropped(0.5, x, seed=3))
    assert (dropped(0.5, x, seed=3) != dropped(0.5, x, seed=4)).any()


def test_two_dropouts_in_a_net_differ():
    net = dp.serial(dp.branch(dp.dropout(0.5), dp.dropout(0.5)))
    first, second = net.apply({}, {}, jnp.ones(1000), key=jax.random.key(0), train=True)[0]
    assert 0.4 < float((first == second).mean()) < 0.6


def test_the_gradient_is_the_mask():
    x = jnp.asarray(np.random.default_rng(0).normal(size=200))
    grads = np.asarray(jax.jit(jax.grad(lambda x: dropped(0.2, x).sum()))(x))
    wanted = np.where(np.asarray(dropped(0.2, x)) != 0, 1 / 0.8, 0.0)
    assert 0 < (wanted == 0).sum() < 200
    np.testing.assert_allclose(grads, wanted, rtol=1e-6)


def test_dropped_nan_is_zero():
    y = np.asarray(dropped(0.5, jnp.full(1000, jnp.nan)))
    assert 400 < (y == 0).sum() < 600


def test_rate_zero_needs_no_key():
    x = jnp.arange(4.0)
    y, _ = dp.dropout(0).apply({}, {}, x, train=True)
    np.testing.assert_array_equal(y, x)
    assert not dp.dropout(0.0).random and dp.dropout(0.1).random


def test_bfloat16_is_kept():
    y = dropped(0.5, jnp.ones(100, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert sorted(set(y.astype(jnp.float32).tolist())) == [0.0, 2.0]


@pytest.mark.parametrize("rate", [1.0, 1, -0.1, True, "0.5"])
def test_rates_out_of_range_raise(rate):
    with pytest.raises(dp.LayerError, match="rate"):
        dp.dropout(rate)


def test_integers_and_missing_keys_raise():
    with pytest.raises(dp.LayerError, match="key"):
        dp.dropout(0.5).apply({}, {}, jnp.ones(3), train=True)
    with pytest.raises(dp.LayerError, match="floating-point"):
        dp.dropout(0.5)({}, jnp.ones(3, jnp.int32))


# Whole channels, whole examples.

@pytest.mark.parametrize(("dims", "shape"), [
    (1, (30, 4, 20)), (2, (6, 5, 3, 4, 20)), (3, (30, 2, 1, 3, 20))])
def test_a_channel_of_an_example_is_kept_or_dropped_as_a_whole(dims, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = np.asarray(run(dp.spatial_dropout(0.3, dims=dims), jnp.asarray(x)))
    kept = y != 0
    space = tuple(range(len(shape) - dims - 1, len(shape) - 1))
    np.testing.assert_array_equal(kept.all(space), kept.any(space))
    np.testing.assert_allclose(y[kept], x[kept] / 0.7, rtol=1e-6)
    decisions = kept.all(space)
    assert decisions.size == 600
    assert abs(decisions.mean() - 0.7) < 5 * np.sqrt(0.21 / 600)
    for axis in range(decisions.ndim):  # decisions differ along each other axis
        assert not (decisions == decisions.take([0], axis)).all()


@pytest.mark.parametrize("shape", [(600,), (600, 3), (600, 2, 3)])
def test_an_example_is_kept_or_dropped_as_a_whole(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = np.asarray(run(dp.stochastic_depth(0.3), jnp.asarray(x)))
    kept = (y != 0).reshape(600, -1)
    np.testing.assert_array_equal(kept.all(1), kept.any(1))
    np.testing.assert_allclose(y[y != 0], x[y != 0] / 0.7, rtol=1e-6)
    assert abs(kept.all(1).mean() - 0.7) < 5 * np.sqrt(0.21 / 600)


def test_a_dropped_example_skips_the_residual_block():
    body = dp.linear(4, kernel_init="zeros", bias_init="ones")
    net = dp.residual(dp.serial(body, dp.stochastic_depth(0.5)))
    x = jnp.zeros((200, 4))
    params, _ = net.init(jax.random.key(0), x)
    np.testing.assert_array_equal(net(params, x), 1.0)
    y = net.apply(params, {}, x, key=jax.random.key(1), train=True)[0]
    assert {tuple(row) for row in np.asarray(y).tolist()} == {(0.0,) * 4, (2.0,) * 4}


KINDS = {"dropout": dp.dropout, "spatial_dropout": dp.spatial_dropout,
         "stochastic_depth": dp.stochastic_depth}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_all_kinds_return_x_in_inference_and_mask_the_gradient_in_training(make):
    net, x = make(0.5), jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 2, 16)))
    np.testing.assert_array_equal(net({}, x), x)
    assert net.start is None and net.bare and net.random
    assert not make(0.0).random
    np.testing.assert_array_equal(make(0.0).apply({}, {}, x, train=True)[0], x)
    y = run(net, x)
    grads = jax.grad(lambda x: run(net, x).sum())(x)
    np.testing.assert_array_equal(grads, np.where(y != 0, 2.0, 0.0))
    hidden = run(net, jnp.full_like(x, jnp.nan))
    np.testing.assert_array_equal(np.isnan(hidden), y != 0)
    assert run(net, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rate", [1.0, -0.1, True])
def test_all_kinds_raise_for_a_rate_out_of_range(make, rate):
    with pytest.raises(dp.LayerError, match="rate"):
        make(rate)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_all_kinds_require_a_key_in_training(make):
    with pytest.raises(dp.LayerError, match="a key when train=True"):
        make(0.5).apply({}, {}, jnp.ones((2, 2, 2, 2)), train=True)


def test_too_few_axes_raise_at_init_and_in_inference():
    net, x = dp.spatial_dropout(0.5), jnp.ones((2, 3))
    message = ("spatial_dropout(0.5): wants at least 3 axes (..., height, width, channels), got "
               "float32[2,3]; add the missing axes")
    expect("", message, net.init, jax.random.key(0), x)
    expect("", message, net, {}, x)
    expect("drop", "drop (stochastic_depth(0.5)): wants at least 1 axis (examples, ...), got "
           "float32[]", dp.serial(drop=dp.stochastic_depth(0.5)).init, jax.random.key(0),
           jnp.ones(()))
    with pytest.raises(dp.LayerError, match="dims as an int of at least 1"):
        dp.spatial_dropout(0.5, dims=0)
