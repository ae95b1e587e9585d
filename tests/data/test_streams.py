"""The batches that a run takes, and their position."""

import numpy as np
import pytest
from support.refusing import refused

import diffprog as dp
from diffprog.data.streams import Stream

X = np.arange(10)


class Numbers:
    """An iterator of numbers whose position is bytes, as some loaders have it."""

    def __init__(self, end=99):
        self.at, self.end = 0, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.end:
            raise StopIteration
        self.at += 1
        return np.array([self.at])

    def get_state(self):
        return bytes([self.at])

    def set_state(self, state):
        self.at = state[0]


@pytest.mark.parametrize("make", [lambda: dp.batches(X, 3, seed=1), lambda: dp.batches(X, 4),
                                  Numbers], ids=["shuffled", "in order", "another library"])
def test_a_stream_moves_to_the_position_of_another(make):
    first = Stream(make(), 0)
    for _ in range(5):
        next(first)
    number, position = first.number, first.position
    rest = [next(first) for _ in range(3)]
    second = Stream(make(), 0)
    second.peek()
    second.move(number, position)
    for batch in rest:
        np.testing.assert_array_equal(next(second), batch)
    assert second.number == first.number == 8


def test_a_batch_that_was_looked_at_stays_the_next():
    stream = Stream([X, X + 1], 0)
    assert stream.peek() is stream.peek() and stream.number == 0
    assert [next(stream)[0] for _ in range(5)] == [0, 1, 0, 1, 0] and stream.number == 5


def test_data_begins_again_where_it_ends_unless_it_cannot():
    assert "every step" in refused(lambda: [next(stream) for stream in [Stream(iter([]), 0)]]).wants
    stream = Stream(Numbers(2), 0)
    assert [next(stream)[0] for _ in range(2)] == [1, 2]
    refused(next, stream)


def test_a_list_has_no_position():
    assert not Stream([X], 0).resumable and Stream([X], 0).position is None
