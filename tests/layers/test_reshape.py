"""`flatten` joins axes in row-major order."""

import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp


def joined(x, keep):
    """The entries of x below each index of the first axes, in the order of nested loops."""
    y = [[x[i + j] for j in np.ndindex(*x.shape[keep:])] for i in np.ndindex(*x.shape[:keep])]
    return np.array(y).reshape(*x.shape[:keep], len(y[0]))


@pytest.mark.parametrize(("keep", "shape"), [(0, (24,)), (1, (2, 12)), (2, (2, 3, 4))])
def test_the_first_axes_stay(keep, shape):
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 2)).astype(np.float32)
    y = dp.flatten(keep=keep)({}, jnp.asarray(x))
    assert y.shape == shape
    np.testing.assert_array_equal(y, joined(x, keep))


def test_one_axis_stays_by_default():
    x = jnp.arange(12).reshape(2, 3, 2)
    assert dp.flatten()({}, x).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_nothing_to_join_gives_an_axis_of_one():
    assert dp.flatten()({}, jnp.arange(3)).tolist() == [[0], [1], [2]]
    assert dp.flatten(keep=0)({}, jnp.float32(5)).tolist() == [5.0]


def test_empty_batches_pass():
    assert dp.flatten()({}, jnp.ones((0, 3, 4))).shape == (0, 12)


def test_what_cannot_be_is_refused():
    with pytest.raises(dp.LayerError, match="at least 3 axes"):
        dp.flatten(keep=3)({}, jnp.ones((2, 3)))
    for keep in (-1, 1.0, True):
        with pytest.raises(dp.LayerError, match="keep"):
            dp.flatten(keep=keep)
