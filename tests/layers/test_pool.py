"""Pools against loops over the real places of each window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def naive(reduce, x, size, stride, pads):
    """`reduce` of the places of each window that lie inside x, which is (batch, *space, C)."""
    space = x.shape[1:-1]
    places = [range(-before, side + after - k + 1, s) for side, k, s, (before, after)
              in zip(space, size, stride, pads, strict=True)]
    y = np.zeros((x.shape[0], *map(len, places), x.shape[-1]), x.dtype)
    for p in np.ndindex(*y.shape[1:-1]):
        window = tuple(slice(max(r[i], 0), max(r[i] + k, 0))
                       for r, i, k in zip(places, p, size, strict=True))
        inside = x[(slice(None), *window)]
        y[(slice(None), *p)] = reduce(inside, axis=tuple(range(1, x.ndim - 1)))
    return y


KINDS = {"max": (dp.max_pool, np.max), "avg": (dp.avg_pool, np.mean)}
# space, size, options, and what they mean: stride and pairs
CASES = {
    "stride is the size": ((6, 4), (3, 2), dict(), (3, 2), ((0, 0), (0, 0))),
    "a rest is left over": ((5, 7), (2, 3), dict(), (2, 3), ((0, 0), (0, 0))),
    "stride": ((6, 5), (3, 2), dict(stride=(1, 2)), (1, 2), ((0, 0), (0, 0))),
    "one stride": ((6, 5), (3, 2), dict(stride=2), (2, 2), ((0, 0), (0, 0))),
    "int": ((5, 4), (3, 2), dict(stride=1, padding=1), (1, 1), ((1, 1), (1, 1))),
    "pairs": ((5, 4), (3, 2), dict(stride=2, padding=((2, 0), (0, 1))), (2, 2), ((2, 0), (0, 1))),
    "same": ((5, 4), (3, 2), dict(stride=1, padding="SAME"), (1, 1), ((1, 1), (0, 1))),
    "same, stride": ((5, 4), (2, 3), dict(padding="SAME"), (2, 3), ((0, 1), (1, 1))),
    "1-D": ((7,), (3,), dict(stride=2, padding=((0, 2),)), (2,), ((0, 2),)),
    "3-D": ((3, 4, 2), (2, 2, 2), dict(stride=1), (1, 1, 1), ((0, 0),) * 3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_they_equal_loops(kind, name):
    pool, reduce = KINDS[kind]
    space, size, options, stride, pads = CASES[name]
    x = drawn(2, *space, 3) - 5  # all below zero: a padded zero would win, or raise the mean
    wanted = naive(reduce, x, size, stride, pads)
    with jax.enable_x64(True):
        y = pool(size, **options)({}, jnp.asarray(x))
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_one_size_stands_for_every_axis(kind):
    pool, reduce = KINDS[kind]
    flat, cube = drawn(1, 6, 2), drawn(1, 4, 4, 2, 1)
    for dims, x in ((1, flat), (3, cube)):
        wanted = naive(reduce, x, (2,) * dims, (2,) * dims, ((0, 0),) * dims)
        y = pool(2, dims=dims)({}, jnp.asarray(x))
        np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_the_largest_integer_wins(dtype):
    x = np.random.default_rng(0).integers(0, 100, (2, 5, 4, 1)).astype(np.dtype(dtype))
    if np.dtype(dtype).kind == "i":
        x = x - 200  # below zero, so that a padded zero would win
    y = dp.max_pool((3, 2), stride=2, padding=1)({}, jnp.asarray(x))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, naive(np.max, x, (3, 2), (2, 2), ((1, 1), (1, 1))))


def test_minus_infinity_loses_to_everything_but_itself():
    x = jnp.array([-jnp.inf, -jnp.inf, -3.0, -jnp.inf])[:, None]
    y = dp.max_pool(2, dims=1)({}, x)[:, 0]
    assert y.tolist() == [-np.inf, -3.0]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_axes_are_free(kind):
    pool, reduce = KINDS[kind]
    x = drawn(2, 3, 5, 4, 2)
    net = pool(2, padding=1)
    y = net({}, jnp.asarray(x))
    wanted = np.stack([naive(reduce, part, (2, 2), (2, 2), ((1, 1), (1, 1))) for part in x])
    assert y.shape == wanted.shape
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(net({}, jnp.asarray(x[1])), wanted[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(net({}, jnp.asarray(x[1, 2])), wanted[1, 2], rtol=1e-6, atol=1e-6)


def test_global_pools_reduce_all_places():
    x = drawn(2, 3, 5, 4, 2)
    for leading in ((), (0,), (0, 1)):
        part = x[leading]
        for pool, reduce in ((dp.global_avg_pool, np.mean), (dp.global_max_pool, np.max)):
            wanted = reduce(reduce(part, -2), -2)
            y = pool()({}, jnp.asarray(part))
            assert y.shape == wanted.shape
            np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    sequence = dp.global_avg_pool(dims=1)({}, jnp.asarray(x[0, 0]))
    np.testing.assert_allclose(sequence, x[0, 0].mean(1), rtol=1e-5, atol=1e-6)


def test_integers_have_a_global_maximum_and_no_mean():
    x = jnp.array([[-3, -1], [-2, -7]])[..., None]
    assert dp.global_max_pool()({}, x).tolist() == [-1]
    for pool in (dp.avg_pool(2), dp.global_avg_pool()):
        with pytest.raises(dp.LayerError, match="floating-point"):
            pool({}, x)


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_bfloat16_is_averaged_in_float32(padding):
    # In bfloat16 a sum of ones stops growing at 256.
    x = jnp.ones((32, 32, 1), jnp.bfloat16)
    y = dp.avg_pool(32, padding=padding)({}, x)
    assert y.dtype == jnp.bfloat16
    assert y.astype(jnp.float32).tolist() == [[[1.0]]]
    whole = dp.global_avg_pool()({}, x)
    assert whole.dtype == jnp.bfloat16 and float(whole[0]) == 1.0


def test_the_largest_bfloat16_is_exact():
    x = jnp.asarray(drawn(1, 4, 4, 2), jnp.bfloat16)
    for pool in (dp.max_pool(2), dp.global_max_pool()):
        assert pool({}, x).dtype == jnp.bfloat16
    wanted = naive(np.max, np.asarray(x, np.float32), (2, 2), (2, 2), ((0, 0), (0, 0)))
    y = dp.max_pool(2)({}, x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), wanted)


def test_what_cannot_be_is_refused():
    for pool in (dp.max_pool, dp.avg_pool):
        with pytest.raises(dp.LayerError, match="at least as large"):
            pool(5)({}, jnp.ones((4, 4, 1)))
        with pytest.raises(dp.LayerError, match="at least 3 axes"):
            pool(2)({}, jnp.ones((4, 4)))
        for wrong in (dict(size=0), dict(size=2, stride=(1,)), dict(size=2, padding="FULL")):
            with pytest.raises(dp.LayerError):
                pool(**wrong)


@pytest.mark.parametrize("pool", [dp.max_pool, dp.avg_pool], ids=["max", "avg"])
def test_a_window_of_padding_alone_is_refused(pool):
    with pytest.raises(dp.LayerError, match="padding below the size"):
        pool(2, stride=1, padding=2)
    with pytest.raises(dp.LayerError, match="padding below the size"):
        pool((3, 2), padding=((0, 0), (0, 2)))


def test_global_pools_refuse_a_number_of_axes_that_no_image_has():
    with pytest.raises(dp.LayerError, match="1, 2 or 3 axes"):
        dp.global_avg_pool(dims=4)
