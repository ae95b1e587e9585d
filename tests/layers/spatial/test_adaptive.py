"""Adaptive pools against loops over the windows that PyTorch defines."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import drawn
from support.refusing import expect

import diffprog as dp

KINDS = {"avg": (dp.adaptive_avg_pool, np.mean), "max": (dp.adaptive_max_pool, np.max)}


def naive(reduce, x, size):
    """Window i of an axis covers ``floor(i * H / n)`` to ``ceil((i + 1) * H / n)``."""
    y = np.zeros((x.shape[0], *size, x.shape[-1]))
    for p in np.ndindex(*size):
        window = tuple(slice(math.floor(i * length / n), math.ceil((i + 1) * length / n))
                       for i, length, n in zip(p, x.shape[1:-1], size, strict=True))
        y[(slice(None), *p)] = reduce(
            x[(slice(None), *window)], axis=tuple(range(1, x.ndim - 1)))
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("space", "size"), [
    ((7,), (3,)), ((3,), (7,)), ((6,), (3,)), ((1,), (4,)), ((5,), (1,)), ((6, 5), (4, 2)),
    ((2, 9), (3, 9)), ((3, 4, 5), (2, 4, 3))], ids=str)
def test_adaptive_pools_equal_loops(kind, space, size):
    pool, reduce = KINDS[kind]
    x = drawn(2, *space, 3)
    wanted = naive(reduce, x, size)
    with jax.enable_x64(True):
        y = pool(size)({}, jnp.asarray(x))
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_axes_are_free_and_an_int_stands_for_all_axes(kind):
    pool, reduce = KINDS[kind]
    x = drawn(2, 3, 5, 4, 2)
    wanted = np.stack([naive(reduce, part, (3, 3)) for part in x])
    np.testing.assert_allclose(pool(3)({}, jnp.asarray(x)), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pool(3)({}, jnp.asarray(x[1, 2])), wanted[1, 2], rtol=1e-5,
                               atol=1e-6)


@pytest.mark.parametrize(("pool", "whole"), [
    (dp.adaptive_avg_pool, dp.global_avg_pool), (dp.adaptive_max_pool, dp.global_max_pool),
], ids=["avg", "max"])
def test_one_window_is_the_global_pool(pool, whole):
    x = jnp.asarray(drawn(2, 5, 4, 3))
    np.testing.assert_allclose(pool(1)({}, x)[:, 0, 0], whole()({}, x), rtol=1e-5, atol=1e-6)


def test_infinity_does_not_reach_other_windows():
    x = jnp.array([jnp.inf, 1.0, 2.0, 3.0])[:, None]
    assert dp.adaptive_avg_pool(2, dims=1)({}, x)[:, 0].tolist() == [np.inf, 2.5]


def test_bfloat16_is_averaged_in_float32_over_all_axes():
    # 2050 is no bfloat16, nor is a mean of rows: rounding between the axes would show.
    x = jnp.asarray(drawn(1, 32, 33, 1) + 100, jnp.bfloat16)
    y = dp.adaptive_avg_pool(1)({}, x)
    assert y.dtype == jnp.bfloat16
    assert y[0, 0, 0, 0] == jnp.mean(x.astype(jnp.float32)).astype(jnp.bfloat16)


def test_integers_have_maxima_and_no_mean():
    x = jnp.array([-3, -1, -2])[:, None]
    assert dp.adaptive_max_pool(2, dims=1)({}, x)[:, 0].tolist() == [-1, -1]
    expect("", "adaptive_avg_pool(2, dims=1): wants floating-point input, got int32[3,1]",
           dp.adaptive_avg_pool(2, dims=1).plan, x)


@pytest.mark.parametrize("pool", [dp.adaptive_avg_pool, dp.adaptive_max_pool])
def test_wrong_sizes_and_streams_raise(pool):
    expect("", f"{pool.__name__}(0): wants size as a positive int or a tuple of 2, got 0",
           pool, 0)
    expect("", f"{pool.__name__}(2): wants at least 3 axes (..., height, width, channels), "
           "got float32[4,4]", pool(2).plan, jnp.ones((4, 4)))
    with pytest.raises(dp.LayerError, match="the whole input at once"):
        pool(2, dims=1).start({}, {}, jnp.ones((2, 4, 1)), length=4)
