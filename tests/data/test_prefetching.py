"""Batches ahead: in order, no more than asked, and with errors at their place."""

import jax
import numpy as np
import pytest
from support.training_nets import assert_same, examples, sgd, train

import diffprog as dp

X, Y = examples()


class Counter:
    """A source that counts what is taken from it."""

    def __init__(self, count, error=None):
        self.count, self.error, self.taken = count, error, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self.count:
            raise self.error or StopIteration
        self.taken += 1
        return np.full(2, self.taken)


class Resumable(Counter):
    """A source with a position."""

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


@pytest.mark.parametrize("size", [1, 2, 5, 20])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_order_is_kept(size, count):
    ahead = dp.data.prefetch(Counter(count), size)
    assert iter(ahead) is ahead
    assert [batch.tolist() for batch in ahead] == [[i, i] for i in range(1, count + 1)]
    with pytest.raises(StopIteration):
        next(ahead)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_does_not_run_further_ahead(size):
    source = Counter(10)
    ahead = dp.data.prefetch(source, size)
    assert source.taken == 0
    for number, _ in enumerate(ahead, 1):
        assert source.taken == min(number + size, 10)


def test_an_error_comes_after_the_batches_before_it():
    ahead = dp.data.prefetch(Counter(3, OSError("disk")))
    for number in range(1, 4):
        assert next(ahead)[0] == number
    for _ in range(2):
        with pytest.raises(OSError, match="disk"):
            next(ahead)


def test_a_batch_without_numbers_is_refused_at_its_place():
    ahead = dp.data.prefetch([X, np.array(["a"])])
    next(ahead)
    with pytest.raises(dp.LayerError, match="arrays of numbers"):
        next(ahead)


def test_batches_are_on_the_device():
    batch = {"x": X.astype(np.float64), "labels": Y.tolist(), "key": jax.random.key(0)}
    (got,) = dp.data.prefetch([batch])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
    assert got["x"].devices() == {jax.devices()[0]} and not got["x"].committed
    np.testing.assert_array_equal(got["x"], X)
    np.testing.assert_array_equal(got["labels"], Y)
    assert got["key"] == batch["key"]


def test_training_on_transferred_batches_is_the_same():
    data = dp.batches((X, Y), 5, seed=0)
    assert_same(train(sgd(), dp.data.prefetch(data), 7).state, train(sgd(), data, 7).state)


@pytest.mark.parametrize("taken", [0, 1, 4, 9, 10])
def test_the_position_is_that_of_the_last_batch(taken):
    ahead = dp.data.prefetch(Resumable(10))
    for _ in range(taken):
        next(ahead)
    assert ahead.get_state() == {"taken": taken}
    again = dp.data.prefetch(Resumable(10))
    again.set_state(ahead.get_state())
    assert again.get_state() == {"taken": taken}
    assert [b.tolist() for b in again] == [b.tolist() for b in ahead]


def test_going_back_forgets_what_is_ahead():
    ahead = dp.data.prefetch(Resumable(4))
    assert len(list(ahead)) == 4
    ahead.set_state({"taken": 2})
    assert [batch.tolist() for batch in ahead] == [[3, 3], [4, 4]]


def test_a_source_without_a_position_gives_none():
    assert not hasattr(dp.data.prefetch(Counter(3)), "get_state")
    assert hasattr(dp.data.prefetch(dp.data.pipeline(X, 2)), "get_state")
