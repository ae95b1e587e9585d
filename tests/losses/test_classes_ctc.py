"""CTC against the sum over all paths."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import refused

import diffprog as dp

FRAMES, CLASSES = 5, 3
LABELS = np.array([[1, 2], [1, 1], [2, 0], [0, 0]])  # before padding
LENGTHS = np.array([2, 2, 1, 0])
TIMES = np.array([5, 4, 3, 5])


def logits(seed=0):
    return np.random.default_rng(seed).normal(0, 2, (4, FRAMES, CLASSES))


def spelled(path, blank):
    """The labels of a path: repetitions merged, blanks left out."""
    return [c for c, _ in itertools.groupby(path) if c != blank]


def by_paths(logits, labels, blank):
    """Minus the logarithm of the probability of all paths that spell the labels."""
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log(sum(
        np.prod([probabilities[t, c] for t, c in enumerate(path)])
        for path in itertools.product(range(CLASSES), repeat=len(logits))
        if spelled(path, blank) == list(labels)))


def losses(logits, labels, frames, kept, **options):
    return jax.jit(lambda x: dp.losses.ctc(
        x, jnp.asarray(labels), mask=frames, label_mask=kept, reduction="none", **options))(logits)


def masks():
    return np.arange(FRAMES) < TIMES[:, None], np.arange(2) < LENGTHS[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("blank", [0, 2])
def test_ctc_is_the_sum_over_all_paths(blank):
    x, (frames, kept) = logits(), masks()
    labels = (LABELS + blank + 3 * (LABELS == 0)) % 3 if blank else LABELS
    wanted = [by_paths(x[i, :TIMES[i]], labels[i, :LENGTHS[i]], blank) for i in range(4)]
    np.testing.assert_allclose(losses(x, labels, frames, kept, blank=blank), wanted, rtol=1e-5)
    loss = functools.partial(
        dp.losses.ctc, labels=jnp.asarray(labels), mask=frames, label_mask=kept, blank=blank)
    reduced = jax.jit(lambda x: [loss(x, reduction=name) for name in ("mean", "sum")])(x)
    np.testing.assert_allclose(reduced, [np.mean(wanted), sum(wanted)], rtol=1e-5)
    dp.gradients.check_gradients(loss, jnp.asarray(x))


@pytest.mark.slow
def test_bfloat16_logits_are_summed_in_float32():
    half = jnp.asarray(logits(), jnp.bfloat16)
    found, wanted = (dp.losses.ctc(x, LABELS[[0]].repeat(4, 0))
        for x in (half, half.astype(jnp.float32)))
    assert found.dtype == jnp.float32 and float(found) == float(wanted)


def test_without_masks_all_frames_are_valid():
    wanted = by_paths(logits()[0], LABELS[0], 0)
    np.testing.assert_allclose(jax.jit(dp.losses.ctc)(logits()[:1], LABELS[:1]), wanted, rtol=1e-5)


@pytest.mark.slow
def test_padding_may_be_anywhere_and_hold_anything():
    x = logits()[:1, :4]
    spread_out = np.full((1, 6, CLASSES), np.nan)
    spread_out[:, [0, 2, 3, 5]] = x
    frames = np.array([[True, False, True, True, False, True]])
    kept = np.array([[False, True, False, True, False]])
    wanted = by_paths(x[0], [2, 1], 0)
    loss = jax.jit(
        jax.value_and_grad(lambda x, y: dp.losses.ctc(x, y, mask=frames, label_mask=kept)))
    for junk in (1, 2, 0, -100, 7):
        value, grads = loss(spread_out, np.array([[junk, 2, junk, 1, junk]]))
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        assert not np.asarray(grads)[~frames].any() and np.asarray(grads)[frames].all()


@pytest.mark.slow
def test_an_example_without_frames_is_invalid():
    x, (frames, kept) = logits(), masks()
    wanted = losses(x[:2], LABELS[:2], frames[:2], kept[:2])
    valid = np.array([True, True, False, False])
    mask = frames & valid[:, None]
    each = losses(x, LABELS, mask, kept)
    np.testing.assert_allclose(each[:2], wanted, rtol=1e-5)
    assert each[2:].tolist() == [0.0, 0.0]
    mean = dp.losses.ctc(x, LABELS, mask=mask, label_mask=kept)
    np.testing.assert_allclose(mean, wanted.mean(), rtol=1e-5)
    assert losses(x, LABELS, valid, kept)[2:].tolist() == [0.0, 0.0]  # a mask of examples
    assert float(dp.losses.ctc(x, LABELS, mask=mask & False)) == 0.0


def test_labels_out_of_range_give_nan():
    labels = np.array([[1, 2], [1, 0], [3, 1], [2, -1]])
    each = dp.losses.ctc(logits(), labels, reduction="none")
    assert np.isnan(each).tolist() == [False, True, True, True]


@pytest.mark.slow
def test_labels_that_need_more_frames_give_a_large_number():
    assert 1e5 < float(dp.losses.ctc(jnp.zeros((1, 2, 3)), np.array([[1, 1]]))) < 1.1e5


SCORES, ONES = np.zeros((2, 4, 3), np.float32), np.ones((2, 2), np.int32)


@pytest.mark.parametrize(("x", "labels"), [
    (SCORES[0], ONES), (SCORES, ONES[0]), (SCORES, ONES[:1]), (SCORES, np.ones((2, 2))),
], ids=["two axes of logits", "one axis of labels", "fewer labels", "floats"])
def test_ctc_refuses_other_shapes_and_labels(x, labels):
    error = refused(dp.losses.ctc, x, labels)
    assert error.wants == "logits (batch, time, classes) and integer labels (batch, n)"
    assert error.remedy


@pytest.mark.parametrize(("options", "wants"), [
    ({"blank": -1}, "blank in [0, 3)"), ({"blank": 3}, "blank in [0, 3)"),
    ({"mask": np.ones((2, 2), bool)}, "a mask of "), ({"mask": np.ones((2, 4))}, "a mask of "),
    ({"label_mask": np.ones((2, 4), bool)}, "a mask of "),
], ids=["negative blank", "large blank", "short mask", "mask of floats", "long mask of labels"])
def test_ctc_refuses_invalid_options(options, wants):
    assert refused(dp.losses.ctc, SCORES, ONES, **options).wants.startswith(wants)


def test_ctc_refuses_logits_of_integers():
    assert refused(dp.losses.ctc, SCORES.astype(int), ONES).wants == "floating-point input"
