"""Metrics of classifiers against explicit counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import expect, refused

import diffprog as dp


def given(*leading, classes=6, seed=0):
    """Logits, labels (some -100), and a mask."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(*leading, classes))
    labels = draw.integers(0, classes, leading)
    labels[draw.random(leading) < 0.2] = -100
    return logits, labels, draw.random(leading) < 0.7


def rank(row, label):
    """The number of classes ranked above the label."""
    return sorted(range(len(row)), key=lambda c: (-row[c], c)).index(label)


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_hits_are_labels_among_the_first_guesses(k):
    logits, labels, mask = given(2, 20)
    logits[0, :10] = np.round(logits[0, :10])  # ties
    valid = mask & (labels != -100)
    hits = np.array([[rank(row, label) < k if label >= 0 else False
                      for row, label in zip(*part, strict=True)]
                     for part in zip(logits, labels, strict=True)])
    metrics = [lambda *x, **options: dp.metrics.top_k_accuracy(*x, k=k, **options)]
    if k == 1:
        metrics.append(dp.metrics.accuracy)
    for metric in metrics:
        each, total, mean, bare = jax.jit(lambda *x, f=metric: (
            *[f(*x, ignore_index=-100, mask=mask, reduction=r) for r in ("none", "sum", "mean")],
            f(*x)))(logits, labels)
        np.testing.assert_array_equal(each, hits & valid)
        assert float(total) == (hits & valid).sum()
        np.testing.assert_allclose(mean, hits[valid].mean(), rtol=1e-6)
        np.testing.assert_allclose(bare, hits.mean(), rtol=1e-6)
        assert each.dtype == jnp.float32


@pytest.mark.slow
def test_constant_logits_score_as_chance():
    logits, labels = jnp.zeros((6, 6)), jnp.arange(6)
    np.testing.assert_allclose(dp.metrics.accuracy(logits, labels), 1 / 6, rtol=1e-6)
    np.testing.assert_allclose(dp.metrics.top_k_accuracy(logits, labels, k=2), 2 / 6, rtol=1e-6)
    broken = jnp.full((6, 6), jnp.nan)
    np.testing.assert_allclose(dp.metrics.top_k_accuracy(broken, labels, k=2), 2 / 6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("label", range(3))
def test_the_signs_of_zero_and_nan_do_not_affect_the_order(label):
    nan = -np.float32("nan")
    logits = jnp.array([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0], [-1.0, -0.0, 0.0], [nan, 1.0, 2.0],
                        [1.0, nan, -nan]])
    labels = jnp.full(5, label)
    hits = dp.metrics.top_k_accuracy(logits, labels, k=1, reduction="none")
    assert hits.tolist() == dp.metrics.accuracy(logits, labels, reduction="none").tolist()
    assert float(dp.metrics.top_k_accuracy(jnp.array([[-0.0, 0.0]]), jnp.array([0]), k=1)) == 1


@pytest.mark.slow
def test_confusion_counts_pairs():
    logits, labels, mask = given(5, 30)
    table = np.zeros((6, 6))
    for at in np.ndindex(5, 30):
        if mask[at] and labels[at] != -100:
            table[labels[at], max(range(6), key=logits[at].__getitem__)] += 1
    found = jax.jit(lambda
        *x: dp.metrics.confusion_matrix(*x, ignore_index=-100, mask=mask))(logits,
        labels)
    np.testing.assert_array_equal(found, table)
    assert found.dtype == jnp.float32 and found.sum() == (mask & (labels != -100)).sum()
    fraction = found.trace() / found.sum()
    np.testing.assert_allclose(fraction,
        dp.metrics.accuracy(logits, labels, ignore_index=-100, mask=mask))


@pytest.mark.parametrize("wrong", [3, -1, -100])
def test_a_label_out_of_range_returns_nan(wrong):
    logits = jnp.eye(3)
    labels = jnp.array([0, wrong, 2])
    assert np.isnan(dp.metrics.confusion_matrix(logits, labels)).all()
    assert dp.metrics.confusion_matrix(logits, labels, ignore_index=wrong).sum() == 2
    assert dp.metrics.confusion_matrix(logits, labels, mask=labels != wrong).sum() == 2
    assert dp.metrics.accuracy(logits, labels, reduction="none").tolist() == [1.0, 0.0, 1.0]


@pytest.mark.slow
def test_metrics_without_valid_entries_are_zero():
    logits, labels = jnp.full((2, 3), jnp.nan), jnp.array([0, 7])
    none = dict(mask=jnp.zeros(2, bool))
    assert float(dp.metrics.accuracy(logits, labels, **none)) == 0.0
    assert float(dp.metrics.top_k_accuracy(logits, labels, k=1, **none)) == 0.0
    np.testing.assert_array_equal(dp.metrics.confusion_matrix(logits, labels, **none),
        np.zeros((3, 3)))


@pytest.mark.parametrize("metric", [dp.metrics.accuracy, dp.metrics.top_k_accuracy])
def test_accuracies_take_bfloat16_and_narrow_labels(metric):
    logits = jax.nn.one_hot(jnp.arange(200), 300, dtype=jnp.bfloat16)
    labels = jnp.arange(200, dtype=jnp.uint8)
    assert metric(logits, labels).dtype == jnp.float32
    assert float(metric(logits, labels)) == 1.0


def test_a_confusion_matrix_takes_bfloat16_and_narrow_labels():
    logits = jax.nn.one_hot(jnp.arange(200), 300, dtype=jnp.bfloat16)
    labels = jnp.arange(200, dtype=jnp.uint8)
    assert dp.metrics.confusion_matrix(logits, labels).trace() == 200


SCORES, CHOSEN = np.zeros((2, 6), np.float32), np.array([0, 1])
METRICS = [dp.metrics.accuracy, dp.metrics.top_k_accuracy, dp.metrics.confusion_matrix]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("labels", "wants"), [
    (np.zeros(2), "labels as ints"), (np.zeros((2, 6)), "labels as ints"),
    (np.zeros(3, int), "leading shape (2,)"), (np.zeros((2, 1), int), "leading shape (2,)"),
], ids=["floats", "soft", "too many", "two axes"])
def test_metrics_refuse_other_labels(metric, labels, wants):
    assert wants in refused(metric, SCORES, labels).wants


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mask", [np.ones(2), np.ones(3, bool), np.ones((2, 6), bool)],
                         ids=["floats", "too long", "two axes"])
def test_metrics_refuse_other_masks(metric, mask):
    assert refused(metric, SCORES, CHOSEN, mask=mask).wants.startswith("a mask of ")


@pytest.mark.parametrize("metric", METRICS[:2])
def test_metrics_refuse_other_reductions(metric):
    assert "reduction" in refused(metric, SCORES, CHOSEN, reduction="average").wants


def test_more_guesses_than_classes_are_refused():
    logits, labels = jnp.zeros((2, 3)), jnp.array([0, 1])
    expect("", "wants k of at most 3, the number of classes, got 5", dp.metrics.top_k_accuracy,
           logits, labels)


@pytest.mark.parametrize("k", [0, 1.0])
def test_the_number_of_guesses_is_a_positive_int(k):
    logits, labels = jnp.zeros((2, 3)), jnp.array([0, 1])
    assert "k as an int of at least 1" in refused(dp.metrics.top_k_accuracy, logits, labels,
        k=k).wants
