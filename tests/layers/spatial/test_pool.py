"""Pools against loops over the positions of each window that lie inside x."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import drawn
from support.refusing import expect

import diffprog as dp


def naive(reduce, x, size, stride, pads):
    """`reduce` of the positions of each window that lie inside x, which is (batch, *space, C)."""
    space = x.shape[1:-1]
    positions = [range(-before, length + after - k + 1, s) for length, k, s, (before, after)
              in zip(space, size, stride, pads, strict=True)]
    y = np.zeros((x.shape[0], *map(len, positions), x.shape[-1]), x.dtype)
    for p in np.ndindex(*y.shape[1:-1]):
        window = tuple(slice(max(r[i], 0), max(r[i] + k, 0))
                       for r, i, k in zip(positions, p, size, strict=True))
        inside = x[(slice(None), *window)]
        y[(slice(None), *p)] = reduce(inside, axis=tuple(range(1, x.ndim - 1)))
    return y


KINDS = {"max": (dp.max_pool, np.max), "avg": (dp.avg_pool, np.mean)}
# spatial shape, size, options, stride and pairs of these options
CASES = {
    "stride is the size": ((6, 4), (3, 2), dict(), (3, 2), ((0, 0), (0, 0))),
    "a remainder is left over": ((5, 7), (2, 3), dict(), (2, 3), ((0, 0), (0, 0))),
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
def test_pools_equal_loops(kind, name):
    pool, reduce = KINDS[kind]
    space, size, options, stride, pads = CASES[name]
    x = drawn(2, *space, 3) - 5  # all below zero: a padded zero would win, or raise the mean
    wanted = naive(reduce, x, size, stride, pads)
    with jax.enable_x64(True):
        y = pool(size, **options)({}, jnp.asarray(x))
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", [(6,), (4, 4, 2)], ids=str)
def test_an_int_sets_all_axes(kind, space):
    (pool, reduce), dims, x = KINDS[kind], len(space), drawn(1, *space, 2)
    wanted = naive(reduce, x, (2,) * dims, (2,) * dims, ((0, 0),) * dims)
    y = pool(2, dims=dims)({}, jnp.asarray(x))
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_the_maximum_of_integers_is_exact(dtype):
    x = np.random.default_rng(0).integers(0, 100, (2, 5, 4, 1)).astype(np.dtype(dtype))
    if np.dtype(dtype).kind == "i":
        x = x - 200  # below zero, so that a padded zero would win
    y = dp.max_pool((3, 2), stride=2, padding=1)({}, jnp.asarray(x))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, naive(np.max, x, (3, 2), (2, 2), ((1, 1), (1, 1))))


def test_minus_infinity_is_the_maximum_only_of_itself():
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


@pytest.mark.parametrize(("pool", "reduce"), [
    (dp.global_avg_pool, np.mean), (dp.global_max_pool, np.max)], ids=["avg", "max"])
@pytest.mark.parametrize("batch", [(2, 3), (3,), ()], ids=str)
def test_global_pools_reduce_all_spatial_axes(pool, reduce, batch):
    x = drawn(*batch, 5, 4, 2)
    wanted = reduce(reduce(x, -2), -2)
    y = pool()({}, jnp.asarray(x))
    assert y.shape == wanted.shape
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


def test_a_global_pool_of_a_sequence():
    x = drawn(5, 4, 2)
    y = dp.global_avg_pool(dims=1)({}, jnp.asarray(x))
    np.testing.assert_allclose(y, x.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", [
    dp.avg_pool(2), dp.global_avg_pool(),
], ids=["avg_pool", "global_avg_pool"])
def test_integers_have_no_mean(pool):
    x = jnp.array([[-3, -1], [-2, -7]])[..., None]
    with pytest.raises(dp.LayerError, match="floating-point"):
        pool({}, x)


def test_integers_have_a_global_maximum():
    x = jnp.array([[-3, -1], [-2, -7]])[..., None]
    assert dp.global_max_pool()({}, x).tolist() == [-1]


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_bfloat16_is_averaged_in_float32(padding):
    # In bfloat16 a sum of ones stops growing at 256.
    x = jnp.ones((32, 32, 1), jnp.bfloat16)
    y = dp.avg_pool(32, padding=padding)({}, x)
    assert y.dtype == jnp.bfloat16
    assert y.astype(jnp.float32).tolist() == [[[1.0]]]
    whole = dp.global_avg_pool()({}, x)
    assert whole.dtype == jnp.bfloat16 and float(whole[0]) == 1.0


def test_the_maximum_in_bfloat16_is_exact():
    x = jnp.asarray(drawn(1, 4, 4, 2), jnp.bfloat16)
    wanted = naive(np.max, np.asarray(x, np.float32), (2, 2), (2, 2), ((0, 0), (0, 0)))
    y = dp.max_pool(2)({}, x)
    assert y.dtype == dp.global_max_pool()({}, x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), wanted)


@pytest.mark.parametrize("pool", [dp.max_pool, dp.avg_pool], ids=["max", "avg"])
@pytest.mark.parametrize("wrong", [
    dict(size=0), dict(size=2, stride=(1,)), dict(size=2, padding="FULL")], ids=str)
def test_wrong_options_raise(pool, wrong):
    with pytest.raises(dp.LayerError):
        pool(**wrong)


@pytest.mark.parametrize("pool", [dp.max_pool, dp.avg_pool], ids=["max", "avg"])
def test_wrong_shapes_raise(pool):
    with pytest.raises(dp.LayerError, match="at least as large"):
        pool(5)({}, jnp.ones((4, 4, 1)))
    with pytest.raises(dp.LayerError, match="at least 3 axes"):
        pool(2)({}, jnp.ones((4, 4)))


@pytest.mark.parametrize("pool", [dp.max_pool, dp.avg_pool], ids=["max", "avg"])
def test_a_window_of_padding_alone_raises(pool):
    with pytest.raises(dp.LayerError, match="padding below the size"):
        pool(2, stride=1, padding=2)
    with pytest.raises(dp.LayerError, match="padding below the size"):
        pool((3, 2), padding=((0, 0), (0, 2)))


def test_global_pools_over_four_axes_raise():
    with pytest.raises(dp.LayerError, match="1, 2 or 3 axes"):
        dp.global_avg_pool(dims=4)


def dilated(x, size, stride, pads, dilation):
    """The maximum of each window, by loops over x padded by -infinity."""
    x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=-np.inf)
    positions = [range(0, length - d * (k - 1), s)
              for length, k, s, d in zip(x.shape[1:-1], size, stride, dilation, strict=True)]
    y = np.zeros((x.shape[0], *map(len, positions), x.shape[-1]))
    for p in np.ndindex(*y.shape[1:-1]):
        window = tuple(slice(r[i], r[i] + d * (k - 1) + 1, d)
                       for r, i, k, d in zip(positions, p, size, dilation, strict=True))
        y[(slice(None), *p)] = x[(slice(None), *window)].max(tuple(range(1, x.ndim - 1)))
    return y


@pytest.mark.parametrize(("space", "size", "options", "stride", "pads"), [
    ((7,), (3,), dict(dilation=2, stride=1), (1,), ((0, 0),)),
    ((7,), (2,), dict(dilation=3, padding=((2, 3),)), (2,), ((2, 3),)),
    ((6, 5), (2, 3), dict(dilation=(3, 2), stride=1, padding="SAME"), (1, 1), ((1, 2), (2, 2))),
    ((6, 5), (2, 3), dict(dilation=(3, 1), stride=(2, 1)), (2, 1), ((0, 0), (0, 0))),
    ((4, 3, 3), (2, 2, 2), dict(dilation=(1, 2, 1), padding=1), (2, 2, 2), ((1, 1),) * 3),
], ids=str)
def test_dilated_windows_equal_loops(space, size, options, stride, pads):
    x = drawn(2, *space, 3) - 5
    given = options["dilation"]
    dilation = given if isinstance(given, tuple) else (given,) * len(space)
    wanted = dilated(x, size, stride, pads, dilation)
    with jax.enable_x64(True):
        y = dp.max_pool(size, **options)({}, jnp.asarray(x))
        assert y.shape == wanted.shape
        np.testing.assert_array_equal(y, wanted)
        # the cotangent of each maximum goes to its one position
        cotangent = jnp.asarray(drawn(*y.shape, seed=1))
        total = lambda x: jnp.vdot(dp.max_pool(size, **options)({}, x), cotangent)  # noqa: E731
        grad = np.zeros(x.shape)
        for at in np.ndindex(*y.shape):
            where = np.argwhere(x[at[0], ..., at[-1]] == wanted[at])
            assert len(where) == 1
            grad[(at[0], *where[0], at[-1])] += cotangent[at]
        slope = jax.jit(jax.grad(total))(jnp.asarray(x))
        np.testing.assert_allclose(slope, grad, rtol=0, atol=1e-12)


def test_dilated_integers_and_nan():
    net = dp.max_pool(2, dims=1, stride=1, padding=1, dilation=2)
    x = np.array([3, -9, -5, 7], np.int32)[:, None]
    assert net({}, jnp.asarray(x))[:, 0].tolist() == [-9, 3, 7, -5]
    y = net({}, jnp.array([1.0, jnp.nan, 3.0, 2.0])[:, None])[:, 0]
    np.testing.assert_array_equal(y, [np.nan, 3, np.nan, 3])


@pytest.mark.parametrize(("padding", "pads"), [
    (1, ((1, 1), (1, 1))), ("SAME", ((1, 1), (0, 1))), ("VALID", ((0, 0), (0, 0))),
], ids=["int", "same", "valid"])
def test_count_padding_counts_padding_as_zeros(padding, pads):
    x = drawn(2, 5, 4, 3)
    wanted = naive(np.mean, np.pad(x, [(0, 0), *pads, (0, 0)]), (3, 2), (1, 1), ((0, 0),) * 2)
    y = dp.avg_pool((3, 2), stride=1, padding=padding, count_padding=True)({}, jnp.asarray(x))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


# Masks: the first row ends early, the second has a masked window, the third no valid step.
MASK = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
# windows of each pool over 5 steps, as (begin, end)
MASKED = {
    "max": (dp.max_pool(2, dims=1, stride=1), np.max, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "max, same": (dp.max_pool(2, dims=1, padding="SAME"), np.max, [(0, 2), (2, 4), (4, 5)]),
    "avg": (dp.avg_pool(2, dims=1, stride=1), np.mean, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "avg, padded": (dp.avg_pool(3, dims=1, padding=1), np.mean, [(0, 2), (2, 5)]),
    "global max": (dp.global_max_pool(dims=1), np.max, [(0, 5)]),
    "global avg": (dp.global_avg_pool(dims=1), np.mean, [(0, 5)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_masked_steps_do_not_count(name):
    net, reduce, windows = MASKED[name]
    x = drawn(3, 5, 2) - 5
    wanted = np.zeros((3, len(windows), 2))
    for i, (begin, end) in enumerate(windows):
        for row in range(3):
            if (valid := x[row, begin:end][MASK[row, begin:end]]).size:
                wanted[row, i] = reduce(valid, axis=0)
    broken = jnp.asarray(np.where(MASK[..., None], x, np.nan))

    def pulled(x):
        y, back = jax.vjp(lambda x: net({}, x, mask=jnp.asarray(MASK)), x)
        return y, *back(jnp.ones_like(y))

    y, grad = jax.jit(pulled)(broken)
    np.testing.assert_allclose(y.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)
    assert (np.asarray(y).reshape(wanted.shape)[wanted == 0] == 0).all()  # exactly
    assert np.isfinite(grad).all() and not np.asarray(grad)[~MASK].any()
    np.testing.assert_allclose(grad.sum(1)[:, 0], (wanted[..., 0] != 0).sum(1), rtol=1e-5)
    # with batch axes, in bfloat16, and with a mask of examples
    y = net({}, broken[:, None].astype(jnp.bfloat16), mask=jnp.asarray(MASK[:, None]))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float32).reshape(wanted.shape), wanted, rtol=0.02, atol=0.02)
    some = net({}, jnp.asarray(x), mask=jnp.array([True, False, True]))
    np.testing.assert_array_equal(some[jnp.array([0, 2])], net({}, jnp.asarray(x[[0, 2]])))
    assert not some[1].any()


def test_count_padding_counts_masked_steps_as_zeros():
    net = dp.avg_pool(2, dims=1, stride=1, count_padding=True)
    y = net({}, jnp.array([2.0, 4.0, jnp.nan])[:, None], mask=jnp.array([True, True, False]))
    assert y[:, 0].tolist() == [3.0, 2.0]


def test_masked_integers():
    x = jnp.array([[-3], [-1], [5]])
    mask = jnp.array([True, False, False])
    assert dp.global_max_pool(dims=1)({}, x, mask=mask).tolist() == [-3]
    assert dp.max_pool(2, dims=1, stride=1)({}, x, mask=mask)[:, 0].tolist() == [-3, 0]


@pytest.mark.parametrize("net", [dp.max_pool(2), dp.avg_pool(2), dp.global_avg_pool(),
                                 dp.global_max_pool(), dp.adaptive_avg_pool(2)], ids=repr)
def test_images_take_no_mask(net):
    with pytest.raises(dp.LayerError, match="only side inputs that it takes"):
        net.plan(jnp.ones((2, 4, 4, 1)), mask=jnp.ones(2, bool))


def test_a_dilated_window_of_padding_alone_raises():
    expect("", "max_pool(2, padding=3, dilation=2): wants padding below the size (3, 3), "
           "got ((3, 3), (3, 3))", lambda: dp.max_pool(2, padding=3, dilation=2))
    expect("", "max_pool(2, padding=1, dilation=3): wants padded axes at least as long as the "
           "dilation (3, 3), got (3, 2)",
           dp.max_pool(2, padding=1, dilation=3).plan, jnp.ones((1, 3, 2, 1)))
    with pytest.raises(dp.LayerError, match="at least as large as the window"):
        dp.max_pool(2, dims=1, dilation=4).plan(jnp.ones((4, 1)))
    with pytest.raises(dp.LayerError, match="dilation as a positive int"):
        dp.max_pool(2, dilation=0)
