"""LLaMA: its parameters, counted by hand; it learns."""

import pytest
from support.counting import count
from support.learning import IDS, NET, learns

import diffprog as dp


def test_the_parameters_of_llama():
    width, hidden = 4096, 11008
    layer = 4 * width * width + 3 * width * hidden + 2 * width
    derived = 2 * 32000 * width + 32 * layer + width
    assert count("llama") == derived == 6_738_415_616


@pytest.mark.slow
def test_it_learns_eight_examples():
    learns(dp.models.llama(11, kv_heads=1, **NET), dp.text.next_token(), {"x": IDS}, 60)
