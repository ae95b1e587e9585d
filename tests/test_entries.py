"""Entries of a batch: which are real, and how what was found of them is reduced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog.entries import class_numbers, clear, is_soft, known, reduce, spread, total, wide

VALUES = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], np.float32)
REAL = np.array([[True, False, True], [False, False, True]])


@pytest.mark.parametrize("mask", [None, REAL], ids=["all", "some"])
def test_reductions_are_over_what_is_real(mask):
    chosen = VALUES if mask is None else VALUES[mask]
    broken = VALUES if mask is None else np.where(mask, VALUES, np.nan)
    given = jnp.asarray(broken), None if mask is None else jnp.asarray(mask)
    each = np.asarray(reduce(*given, "none"))
    np.testing.assert_array_equal(each, VALUES if mask is None else np.where(mask, VALUES, 0))
    assert float(reduce(*given, "sum")) == chosen.sum()
    np.testing.assert_allclose(reduce(*given, "mean"), chosen.mean(), rtol=1e-6)
    assert total(VALUES.shape, given[1]) == chosen.size
    weights = jnp.asarray(1 / VALUES)
    np.testing.assert_allclose(reduce(*given, "mean", weights), chosen.sum() / (1 / chosen).sum(),
                               rtol=1e-6)
    with pytest.raises(dp.LayerError, match="reduction"):
        reduce(*given, "average")


def test_the_mean_of_nothing_is_zero_and_so_is_its_slope():
    none = jnp.zeros(3, bool)
    value, slope = jax.value_and_grad(lambda x: reduce(x, none, "mean"))(jnp.full(3, jnp.nan))
    assert value == 0 and not slope.any()
    np.testing.assert_array_equal(clear(jnp.full(3, jnp.inf), none), np.zeros(3))


def test_what_is_known_is_real_and_not_ignored():
    labels = jnp.array([[0, -100, 2], [1, 1, -100]])
    assert known(labels, None, None) is None and spread(None, (2, 3)) is None
    np.testing.assert_array_equal(known(labels, None, -100), labels != -100)
    np.testing.assert_array_equal(known(labels, jnp.asarray(REAL), -100),
                                  REAL & (np.asarray(labels) != -100))
    np.testing.assert_array_equal(spread(jnp.array([True, False]), (2, 3)),
                                  [[True] * 3, [False] * 3])


def test_labels_are_numbers_of_classes_of_the_leading_shape():
    logits = jnp.zeros((2, 300))
    assert class_numbers(logits, jnp.array([0, 200], jnp.uint8)).dtype == jnp.int32
    assert is_soft(logits) and not is_soft(jnp.arange(2))
    for wrong in (logits, jnp.zeros(3, int)):
        with pytest.raises(dp.LayerError, match="labels"):
            class_numbers(logits, wrong)


def test_narrow_numbers_are_widened_and_wide_ones_kept():
    assert wide(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert wide(jnp.ones(2, jnp.float64)).dtype == jnp.float64
