"""Masks: what is cleared, what a mask may speak of, how many real steps stand before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog.core.masks import cleared, counted, over_steps, valid_before, widened

MASK = np.array([[True, False, True], [False, False, True]])


@pytest.mark.parametrize("leading", [1, 2])
def test_invalid_entries_are_cleared_even_nan(leading):
    x = np.arange(1.0, 13).reshape(2, 3, 2).astype(np.float32)
    mask = MASK if leading == 2 else MASK[:, 0]
    broken = x.copy()
    broken[~mask] = np.nan
    x[~mask] = 0
    np.testing.assert_array_equal(cleared(jnp.asarray(broken), jnp.asarray(mask)), x)
    array = jnp.asarray(broken)
    assert cleared(array, None) is array
    assert isinstance(cleared(broken, None), jax.Array)  # NumPy's has not all its methods


def test_a_mask_of_rows_is_one_of_all_their_steps():
    x = jnp.ones((2, 3, 4))
    np.testing.assert_array_equal(over_steps(jnp.asarray(MASK), x), MASK)
    np.testing.assert_array_equal(over_steps(jnp.array([True, False]), x),
                                  [[True] * 3, [False] * 3])
    assert over_steps(None, x) is None


def test_valid_steps_before_each_step_are_counted():
    assert valid_before(jnp.asarray(MASK)).tolist() == [[0, 1, 1], [0, 0, 0]]


def test_more_entries_than_int32_holds_are_counted_in_floats():
    """Shapes alone: no array of this size is made."""
    many, some = (jax.ShapeDtypeStruct((rows, 2**16), jnp.bool_) for rows in (2**15, 2**15 - 1))
    assert jax.eval_shape(counted, many).dtype == jnp.float32
    assert jax.eval_shape(counted, some).dtype == jnp.int32
    mask = jnp.asarray(MASK)
    assert counted(mask).tolist() == 3 and counted(mask, 5).tolist() == 15
    assert float(counted(mask, 2**31)) == 3 * 2**31


def test_a_mask_has_leading_axes_alone():
    assert widened(jnp.asarray(MASK), (2, 3, 4, 5)).shape == (2, 3, 1, 1)
    assert widened(jnp.asarray(MASK), (2, 3), reach=2).shape == (2, 3)
    with pytest.raises(dp.LayerError, match="booleans"):
        widened(jnp.ones(2), (2, 3))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 4), (2,)], ids=str)
def test_a_mask_of_other_axes_raises(shape):
    with pytest.raises(dp.LayerError, match="leading axes"):
        widened(jnp.asarray(MASK), shape)
