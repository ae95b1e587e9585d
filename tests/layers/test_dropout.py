"""`dropout`: the rate is the share that is dropped, and the expectation is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp


def dropped(rate, x, seed=0):
    return dp.dropout(rate).apply({}, {}, x, key=jax.random.key(seed), train=True)[0]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_the_rate_is_the_share_that_is_dropped(rate):
    y = np.asarray(dropped(rate, jnp.ones(100_000)))
    share = (y == 0).mean()
    assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / y.size)
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


def test_at_rest_nothing_happens():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    net = dp.dropout(0.9)
    np.testing.assert_array_equal(net({}, x), x)
    np.testing.assert_array_equal(net({}, x, key=jax.random.key(0)), x)


def test_the_key_decides():
    x = jnp.ones(1000)
    np.testing.assert_array_equal(dropped(0.5, x, seed=3), dropped(0.5, x, seed=3))
    assert (dropped(0.5, x, seed=3) != dropped(0.5, x, seed=4)).any()


def test_two_dropouts_of_a_net_differ():
    net = dp.serial(dp.branch(dp.dropout(0.5), dp.dropout(0.5)))
    first, second = net.apply({}, {}, jnp.ones(1000), key=jax.random.key(0), train=True)[0]
    assert 0.4 < float((first == second).mean()) < 0.6


def test_the_gradient_is_the_mask():
    x = jnp.asarray(np.random.default_rng(0).normal(size=200))
    grads = np.asarray(jax.jit(jax.grad(lambda x: dropped(0.2, x).sum()))(x))
    wanted = np.where(np.asarray(dropped(0.2, x)) != 0, 1 / 0.8, 0.0)
    assert 0 < (wanted == 0).sum() < 200
    np.testing.assert_allclose(grads, wanted, rtol=1e-6)


def test_what_is_dropped_is_zero_whatever_it_was():
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


def test_what_cannot_be_is_refused():
    for rate in (1.0, 1, -0.1, True, "0.5"):
        with pytest.raises(dp.LayerError, match="rate"):
            dp.dropout(rate)
    with pytest.raises(dp.LayerError, match="key"):
        dp.dropout(0.5).apply({}, {}, jnp.ones(3), train=True)
    with pytest.raises(dp.LayerError, match="floating-point"):
        dp.dropout(0.5)({}, jnp.ones(3, jnp.int32))
