"""Entries of a batch: which are valid, and how values are reduced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog.losses.entries import (
    class_numbers,
    clear,
    is_soft,
    known,
    reduce,
    spread,
    total,
)

VALUES = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], np.float32)
VALID = np.array([[True, False, True], [False, False, True]])


@pytest.mark.parametrize("mask", [None, VALID], ids=["all", "some"])
def test_reductions_are_over_valid_entries(mask):
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


def test_the_mean_of_no_entries_is_zero_with_zero_gradient():
    none = jnp.zeros(3, bool)
    value, slope = jax.value_and_grad(lambda x: reduce(x, none, "mean"))(jnp.full(3, jnp.nan))
    assert value == 0 and not slope.any()
    np.testing.assert_array_equal(clear(jnp.full(3, jnp.inf), none), np.zeros(3))


def test_valid_labels_are_marked_and_not_ignored():
    labels = jnp.array([[0, -100, 2], [1, 1, -100]])
    assert known(labels, None, None) is None and spread(None, (2, 3)) is None
    np.testing.assert_array_equal(known(labels, None, -100), labels != -100)
    np.testing.assert_array_equal(known(labels, jnp.asarray(VALID), -100),
                                  VALID & (np.asarray(labels) != -100))
    np.testing.assert_array_equal(spread(jnp.array([True, False]), (2, 3)),
                                  [[True] * 3, [False] * 3])


def test_labels_must_be_ints_of_the_leading_shape():
    logits = jnp.zeros((2, 300))
    assert class_numbers(logits, jnp.array([0, 200], jnp.uint8)).dtype == jnp.int32
    assert is_soft(logits) and not is_soft(jnp.arange(2))
    for wrong in (logits, jnp.zeros(3, int)):
        with pytest.raises(dp.LayerError, match="labels"):
            class_numbers(logits, wrong)


# 64-bit ints, as of NumPy: k + 2**32 is not k.

TALL = np.array([1, 2**32 + 1, -(2**32) + 1, 1], np.int64)
LOGITS = np.log(np.array([[0.2, 0.7, 0.1]] * 4, np.float32))


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("labels", [TALL, TALL[:2].repeat(2).astype(np.uint64)], ids=str)
def test_a_label_beyond_32_bits_is_out_of_range(labels, wide):
    with jax.enable_x64(wide):
        none = labels != 1
        losses = dp.losses.cross_entropy(LOGITS, labels, reduction="none")
        assert np.isnan(losses).tolist() == none.tolist()
        losses, _ = dp.losses.linear_cross_entropy(
            jnp.ones((4, 2)), jnp.ones((2, 3)), labels, reduction="none")
        assert np.isnan(losses).tolist() == none.tolist()
        hits = dp.metrics.accuracy(LOGITS, labels, reduction="none")
        assert hits.tolist() == (~none).tolist()
        hits = dp.metrics.top_k_accuracy(LOGITS, labels, k=2, reduction="none")
        assert hits.tolist() == (~none).tolist()
        assert np.isnan(dp.metrics.confusion_matrix(LOGITS, labels)).all()
        losses = dp.losses.ctc(jnp.zeros((4, 3, 3)), labels[:, None], reduction="none")
        assert np.isnan(losses).tolist() == none.tolist()


@pytest.mark.parametrize("labels", [
    np.array([1, 2**32 - 100]), np.array([1, 2**32 - 100], np.uint32),
    jnp.array([1, 2**32 - 100], jnp.uint32),
], ids=["int64", "uint32", "uint32 of jax"])
def test_the_ignored_label_is_not_matched_modulo_two_to_the_32(labels):
    assert np.isnan(dp.losses.cross_entropy(LOGITS[:2], labels, ignore_index=-100))


@pytest.mark.parametrize("net", [
    dp.embedding(3, 2), dp.one_hot(3), dp.serial(dp.embedding(3, 2), dp.linear(2)),
    dp.ensemble(2, dp.embedding(3, 2))], ids=repr)
def test_an_id_beyond_32_bits_has_no_row(net):
    params, _ = net.init(jax.random.key(0), TALL)
    y = np.asarray(net(params, TALL)).reshape(-1, 4, net.plan(TALL).y.shape[-1])[0]
    assert np.isnan(y).any(-1).tolist() == (TALL != 1).tolist()


@pytest.mark.slow
def test_positions_and_tokens_beyond_32_bits_are_out_of_range():
    net = dp.learned_positions(4)
    params, _ = net.init(jax.random.key(0), jnp.ones((1, 2, 3)))
    y = net(params, jnp.ones((1, 2, 3)), positions=np.array([[1, 2**32 + 1]]))
    assert np.isnan(y).any(-1).tolist() == [[False, True]]
    ids = np.array([[1, 2**32 + 1]])
    x, labels = dp.text.mask_tokens(jax.random.key(0), ids, vocabulary=3, mask_token=2)
    assert int(jnp.where(labels == -100, x, labels)[0, 1]) == 2**31 - 1
