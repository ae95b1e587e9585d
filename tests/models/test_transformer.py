"""The Transformer: its parameters, counted by hand; it learns to translate."""

import pytest
from support.counting import attention, block, count, norm
from support.learning import NET, TRANSLATED, learns

import diffprog as dp


def test_the_parameters_of_the_transformer():
    decoder = block(512) + attention(512) + norm(512)
    derived = 2 * 37000 * 512 + 6 * block(512) + 6 * decoder
    assert count("transformer") == derived == 82_026_496


@pytest.mark.slow
def test_it_learns_eight_examples():
    learns(dp.models.transformer(11, 11, **NET), dp.text.next_token(), TRANSLATED, 60)
