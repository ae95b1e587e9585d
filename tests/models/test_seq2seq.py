"""Recurrent sequence to sequence: its parameters, counted by hand; it learns to translate."""

import pytest
from support.counting import attention, count, linear
from support.learning import TRANSLATED, learns

import diffprog as dp


@pytest.mark.slow
def test_the_parameters_of_seq2seq():
    def lstm(inputs, width):
        return linear(inputs, 4 * width) + width * 4 * width

    encoder = 50 * 16 + 2 * lstm(16, 8)
    decoder = 60 * 16 + lstm(16, 16) + attention(16) + linear(32, 16)
    assert count("seq2seq") == encoder + decoder


@pytest.mark.slow
def test_it_learns_eight_examples():
    learns(dp.models.seq2seq(11, 11, width=16), dp.text.next_token(), TRANSLATED, 80)
