"""`flatten` and `reshape` keep the row-major order; `one_hot` returns unit vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import KEY

import diffprog as dp


def joined(x, keep):
    """The entries of x for each index of the first axes, in the order of nested loops."""
    y = [[x[i + j] for j in np.ndindex(*x.shape[keep:])] for i in np.ndindex(*x.shape[:keep])]
    return np.array(y).reshape(*x.shape[:keep], len(y[0]))


@pytest.mark.parametrize(("keep", "shape"), [(0, (24,)), (1, (2, 12)), (2, (2, 3, 4))])
def test_flatten_keeps_the_first_axes(keep, shape):
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 2)).astype(np.float32)
    y = dp.flatten(keep=keep)({}, jnp.asarray(x))
    assert y.shape == shape
    np.testing.assert_array_equal(y, joined(x, keep))


def test_flatten_keeps_one_axis_by_default():
    x = jnp.arange(12).reshape(2, 3, 2)
    assert dp.flatten()({}, x).tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_flatten_of_the_kept_axes_alone_adds_an_axis_of_1():
    assert dp.flatten()({}, jnp.arange(3)).tolist() == [[0], [1], [2]]
    assert dp.flatten(keep=0)({}, jnp.float32(5)).tolist() == [5.0]


@pytest.mark.parametrize(("shape", "keep", "wanted"), [
    ((3, 4), 1, (2, 3, 4)),
    (12, 1, (2, 12)),
    (-1, 1, (2, 12)),
    ((4, -1), 1, (2, 4, 3)),
    ((-1, 2, 2), 1, (2, 3, 2, 2)),
    ((2, -1), 2, (2, 6, 2, 1)),
    ((4, 6), 0, (4, 6)),
    ((6, 2, 1), 1, (2, 6, 2, 1)),
])
def test_reshape_changes_the_axes_that_are_not_kept(shape, keep, wanted):
    x = jnp.arange(24).reshape(2, 6, 2)
    y = dp.reshape(shape, keep=keep)({}, x)
    assert y.shape == wanted and y.dtype == x.dtype
    np.testing.assert_array_equal(y.ravel(), np.arange(24))


def test_reshape_undoes_flatten():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)))
    np.testing.assert_array_equal((dp.flatten() >> dp.reshape((3, 4)))({}, x), x)


def test_empty_batches():
    assert dp.flatten()({}, jnp.ones((0, 3, 4))).shape == (0, 12)
    assert dp.reshape((2, -1))({}, jnp.ones((0, 3, 4))).shape == (0, 2, 6)


def test_reshape_to_an_empty_shape():
    assert dp.reshape(())({}, jnp.ones((3, 1, 1))).shape == (3,)


@pytest.mark.parametrize(
    "shape", [(-1, -1), (0, 3), (-2,), (2.0,), [3, 4], True, "3", None, (True,)], ids=repr)
def test_invalid_shapes_raise(shape):
    with pytest.raises(dp.LayerError, match="a shape of positive ints, at most one of them -1"):
        dp.reshape(shape)


@pytest.mark.parametrize("make", [dp.flatten, lambda keep: dp.reshape(-1, keep=keep)],
                         ids=["flatten", "reshape"])
def test_too_few_axes_raise(make):
    with pytest.raises(dp.LayerError, match="at least 3 axes"):
        make(keep=3)({}, jnp.ones((2, 3)))


@pytest.mark.parametrize("make", [dp.flatten, lambda keep: dp.reshape(-1, keep=keep)],
                         ids=["flatten", "reshape"])
@pytest.mark.parametrize("keep", [-1, 1.0, True])
def test_an_invalid_keep_raises(make, keep):
    with pytest.raises(dp.LayerError, match="keep"):
        make(keep=keep)


@pytest.mark.parametrize("net", [dp.flatten(keep=2), dp.reshape((2, 2), keep=2)], ids=repr)
def test_layers_that_keep_batch_and_time_stream(net):
    assert net.start is None and net.bare


@pytest.mark.parametrize("net", [dp.flatten(), dp.reshape(12), dp.flatten(keep=0)], ids=repr)
def test_layers_that_join_time_with_other_axes_cannot_stream(net):
    with pytest.raises(dp.LayerError, match="the whole input at once"):
        net.start({}, {}, jnp.ones((2, 3, 4)), length=3)


# One-hot.

def test_each_class_is_a_unit_vector():
    x = np.array([[0, 2, 1], [3, 3, 0]])
    y = dp.one_hot(4)({}, jnp.asarray(x))
    assert y.dtype == jnp.float32 and dp.one_hot(4).bare and dp.one_hot(4).start is None
    np.testing.assert_array_equal(y, np.eye(4)[x])
    assert dp.one_hot(4)({}, jnp.int32(1)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint32])
def test_8_bit_classes_do_not_wrap(dtype):
    y = dp.one_hot(300)({}, jnp.array([3, 100], dtype))
    np.testing.assert_array_equal(y, np.eye(300)[[3, 100]])


def test_classes_out_of_range_return_nan():
    y = np.asarray(jax.jit(lambda x: dp.one_hot(2)({}, x))(jnp.array([-1, 0, 2, 1])))
    np.testing.assert_array_equal(np.isnan(y).all(1), [True, False, True, False])
    np.testing.assert_array_equal(y[[1, 3]], np.eye(2))


@pytest.mark.parametrize("x", [jnp.ones(3), jnp.ones(3, bool)], ids=["float", "bool"])
def test_classes_that_are_not_ints_raise(x):
    with pytest.raises(dp.LayerError, match=r"wants labels as ints, got .*\[3\]; convert them"):
        dp.one_hot(2).init(KEY, x)


@pytest.mark.parametrize("classes", [0, 2.0, True])
def test_numbers_of_classes_out_of_range_raise(classes):
    with pytest.raises(dp.LayerError, match="classes as an int of at least 1"):
        dp.one_hot(classes)
