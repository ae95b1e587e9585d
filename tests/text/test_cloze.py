"""What BERT is trained on: which tokens are hidden, and which sentences make a pair."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusing import refused

import diffprog as dp

KEY = jax.random.key(0)
VOCABULARY, HIDDEN, ENDS = 50, 3, (1, 2)
hide = jax.jit(lambda key, ids, mask=None: dp.text.mask_tokens(
    key, ids, vocabulary=VOCABULARY, mask_token=HIDDEN, special_tokens=ENDS, mask=mask))


def test_shares_of_hidden_tokens():
    """15 % exactly in each row; of these 80 % hidden, 10 % drawn, 10 % left, within 4 sigma."""
    ids = jax.random.randint(KEY, (400, 100), 10, VOCABULARY)
    x, labels = map(np.asarray, hide(KEY, ids))
    chosen = labels != -100
    assert (chosen.sum(1) == 15).all()
    assert (x[~chosen] == np.asarray(ids)[~chosen]).all()
    assert (labels[chosen] == np.asarray(ids)[chosen]).all()
    sure = {"hidden": (x == HIDDEN)[chosen].mean(), "same": (x == np.asarray(ids))[chosen].mean()}
    drawn_same = 0.1 / VOCABULARY  # a drawn token may be the old one, or the hidden one
    for name, share in (("hidden", 0.8 + drawn_same), ("same", 0.1 + drawn_same)):
        sigma = np.sqrt(share * (1 - share) / chosen.sum())
        assert abs(sure[name] - share) < 4 * sigma, name
    drawn = x[chosen & (x != HIDDEN) & (x != np.asarray(ids))]
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert counts[HIDDEN] == 0 and (np.delete(counts, HIDDEN) > 0).all()  # any token
    places = chosen.mean(0)
    assert abs(places - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 400)  # anywhere in a row


def test_what_is_never_hidden():
    ids = jnp.tile(jnp.array([1, 10, 11, 2, 12, 13, 2, 0, 0]), (200, 1))
    mask = jnp.arange(9) < 7
    _, labels = map(np.asarray, hide(KEY, ids, jnp.broadcast_to(mask, ids.shape)))
    chosen = labels != -100
    assert (chosen.sum(1) == 1).all()  # at least one, where 15 % of four are less
    assert set(np.flatnonzero(chosen.any(0))) == {1, 2, 4, 5}
    _, labels = hide(KEY, jnp.full((2, 4), ENDS[0]))
    assert (np.asarray(labels) == -100).all()  # nothing can be chosen


def test_labels_of_bytes():
    """-100 is no number of an unsigned dtype, and must not become the label 156."""
    ids = jnp.arange(10, 30, dtype=jnp.uint8)[None]
    x, labels = hide(KEY, ids)
    assert x.dtype == labels.dtype == jnp.int32
    assert int((labels == -100).sum()) == 17 and int(labels.max()) < 30


def test_another_key_hides_others():
    ids = jax.random.randint(KEY, (4, 40), 10, VOCABULARY)
    one, same, other = (hide(jax.random.key(seed), ids)[1] for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any()


# Pairs of sentences. Token 100 * d + n is the n-th of document d, so that all can be traced back.


def corpus(documents=30, sentences=8, seed=0):
    draw = np.random.default_rng(seed)
    found = []
    for d in range(documents):
        tokens = iter(range(100 * (d + 1), 100 * (d + 2)))
        found.append([[next(tokens) for _ in range(draw.integers(2, 7))] for _ in range(sentences)])
    return found


def parts(pairs, i):
    """The two parts of a pair, without the ids around them."""
    x, types, mask = (pairs[name][i] for name in ("x", "token_types", "mask"))
    real = x[mask]
    assert real[0] == 1 and real[-1] == 2 and (real == 2).sum() == 2
    first = real[1 : list(real).index(2)]
    second = real[len(first) + 2 : -1]
    assert types[mask].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert not types[~mask].any() and not x[~mask].any()
    return first, second


@pytest.mark.parametrize("length", [5, 16, 64])
def test_pairs_follow_or_do_not(length):
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
    if length == 64:  # nothing was cut: what follows, follows at once
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


def test_what_pairs_refuse():
    ask = lambda documents, length=8: dp.text.sentence_pairs(  # noqa: E731
        documents, length, start_token=1, separator_token=2, seed=0)
    two = "at least two documents, of sentences that are not empty"
    assert refused(ask, [[[1], [2]]]).wants == two
    assert refused(ask, [[[1], [2]], []]).wants == two
    assert refused(ask, [[[1], []], [[2]]]).wants == two
    assert refused(ask, [[[1]], [[2]]], 4).wants == "length as an int of at least 5"
