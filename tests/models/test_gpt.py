"""GPT-2: its parameters, counted by hand; it learns."""

import pytest
from support.counting import block, count, norm
from support.learning import IDS, NET, learns

import diffprog as dp


def test_the_parameters_of_gpt_2():
    derived = (50257 + 1024) * 768 + 12 * block(768) + norm(768)
    assert count("gpt") == derived == 124_439_808


@pytest.mark.slow
def test_it_learns_eight_examples():
    net = dp.models.gpt(11, length=5, **NET)  # next_token uses five of six ids as input
    learns(net, dp.text.next_token(), IDS, 60)
