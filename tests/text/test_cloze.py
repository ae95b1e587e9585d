"""Training data of BERT: masked tokens and pairs of sentences."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import refused

import diffprog as dp

KEY = jax.random.key(0)
VOCABULARY, MASK_TOKEN, SPECIAL = 50, 3, (1, 2)
mask_tokens = jax.jit(lambda key, ids, mask=None: dp.text.mask_tokens(
    key, ids, vocabulary=VOCABULARY, mask_token=MASK_TOKEN, special_tokens=SPECIAL, mask=mask))


@pytest.mark.slow
def test_fractions_of_masked_tokens():
    """Exactly 15 % in each row; 80 % of them masked, 10 % random, 10 % kept, within 4 sigma."""
    ids = jax.random.randint(KEY, (400, 100), 10, VOCABULARY)
    x, labels = map(np.asarray, mask_tokens(KEY, ids))
    chosen = labels != -100
    assert (chosen.sum(1) == 15).all()
    assert (x[~chosen] == np.asarray(ids)[~chosen]).all()
    assert (labels[chosen] == np.asarray(ids)[chosen]).all()
    found = {"masked": (x == MASK_TOKEN)[chosen].mean(),
             "kept": (x == np.asarray(ids))[chosen].mean()}
    by_chance = 0.1 / VOCABULARY  # a random id may be the original one, or the mask token
    for name, fraction in (("masked", 0.8 + by_chance), ("kept", 0.1 + by_chance)):
        sigma = np.sqrt(fraction * (1 - fraction) / chosen.sum())
        assert abs(found[name] - fraction) < 4 * sigma, name
    random = x[chosen & (x != MASK_TOKEN) & (x != np.asarray(ids))]
    counts = np.bincount(random, minlength=VOCABULARY)
    assert counts[MASK_TOKEN] == 0 and (np.delete(counts, MASK_TOKEN) > 0).all()  # any id
    places = chosen.mean(0)
    assert abs(places - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 400)  # at any position


@pytest.mark.slow
def test_special_tokens_and_padding_are_never_masked():
    ids = jnp.tile(jnp.array([1, 10, 11, 2, 12, 13, 2, 0, 0]), (200, 1))
    mask = jnp.arange(9) < 7
    _, labels = map(np.asarray, mask_tokens(KEY, ids, jnp.broadcast_to(mask, ids.shape)))
    chosen = labels != -100
    assert (chosen.sum(1) == 1).all()  # at least one, though 15 % of four is less
    assert set(np.flatnonzero(chosen.any(0))) == {1, 2, 4, 5}
    _, labels = mask_tokens(KEY, jnp.full((2, 4), SPECIAL[0]))
    assert (np.asarray(labels) == -100).all()  # no candidates


@pytest.mark.slow
def test_labels_of_unsigned_ids():
    """-100 must not wrap around to 156."""
    ids = jnp.arange(10, 30, dtype=jnp.uint8)[None]
    x, labels = mask_tokens(KEY, ids)
    assert x.dtype == labels.dtype == jnp.int32
    assert int((labels == -100).sum()) == 17 and int(labels.max()) < 30


@pytest.mark.slow
def test_another_key_masks_other_tokens():
    ids = jax.random.randint(KEY, (4, 40), 10, VOCABULARY)
    one, same, other = (mask_tokens(jax.random.key(seed), ids)[1] for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any()


# Pairs of sentences. Token 100 * d + n is the n-th token of document d.


def corpus(documents=30, sentences=8, seed=0):
    draw = np.random.default_rng(seed)
    found = []
    for d in range(documents):
        tokens = iter(range(100 * (d + 1), 100 * (d + 2)))
        found.append([[next(tokens) for _ in range(draw.integers(2, 7))] for _ in range(sentences)])
    return found


def parts(pairs, i):
    """The two parts of a pair, without special tokens."""
    x, types, mask = (pairs[name][i] for name in ("x", "token_types", "mask"))
    valid = x[mask]
    assert valid[0] == 1 and valid[-1] == 2 and (valid == 2).sum() == 2
    first = valid[1 : list(valid).index(2)]
    second = valid[len(first) + 2 : -1]
    assert types[mask].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert not types[~mask].any() and not x[~mask].any()
    return first, second


@pytest.mark.parametrize("length", [5, 16, 64])
def test_pairs_follow_in_about_half_of_the_cases(length):
    pairs = dp.text.sentence_pairs(corpus(), length, start_token=1, separator_token=2, seed=0)
    assert {name: a.shape[1:] for name, a in pairs.items()} == {
        "x": (length,), "token_types": (length,), "mask": (length,), "follows": ()}
    count = collections.Counter(pairs["follows"].tolist())
    for i, other in enumerate(pairs["follows"]):
        first, second = parts(pairs, i)
        assert len(first) and len(second)
        assert len(set(first // 100)) == len(set(second // 100)) == 1
        assert (np.diff(first) == 1).all() and (np.diff(second) == 1).all()
        assert (first[0] // 100 != second[0] // 100) == other
        if not other:
            assert second[0] > first[-1]
    if length > 5:
        assert 0.3 < count[0] / sum(count.values()) < 0.6
    if length == 64:  # nothing was truncated: B begins right after A
        follows = [parts(pairs, i) for i in np.flatnonzero(pairs["follows"] == 0)]
        assert all(second[0] == first[-1] + 1 for first, second in follows)


def test_every_sentence_is_in_a_pair():
    documents = corpus(10)
    pairs = dp.text.sentence_pairs(documents, 64, start_token=1, separator_token=2, seed=1)
    seen = {int(token) for row in pairs["x"] for token in row}
    assert {token for text in documents for sentence in text for token in sentence} <= seen


def test_seeds_and_short_pairs():
    make = lambda seed, short_rate=0.1: dp.text.sentence_pairs(  # noqa: E731
        corpus(), 40, start_token=1, separator_token=2, seed=seed, short_rate=short_rate)
    one, same, other = make(0), make(0), make(1)
    assert all((one[name] == same[name]).all() for name in one)
    assert one["x"].shape != other["x"].shape or (one["x"] != other["x"]).any()
    assert make(0, 0.9)["mask"].sum(1).mean() < make(0, 0.0)["mask"].sum(1).mean()


def test_sentence_pairs_refuse_too_few_documents_and_empty_sentences():
    ask = lambda documents, length=8: dp.text.sentence_pairs(  # noqa: E731
        documents, length, start_token=1, separator_token=2, seed=0)
    two = "at least two documents without empty sentences"
    assert refused(ask, [[[1], [2]]]).wants == two
    assert refused(ask, [[[1], [2]], []]).wants == two
    assert refused(ask, [[[1], []], [[2]]]).wants == two
    assert refused(ask, [[[1]], [[2]]], 4).wants == "length as an int of at least 5"
