"""GPT-2: its parameters, counted by hand; its first loss; it learns."""

import math

import jax
import numpy as np
import pytest
from support.counting import block, count, norm
from support.learning import IDS, NET, learns

import diffprog as dp


def test_the_parameters_of_gpt_2():
    derived = (50257 + 1024) * 768 + 12 * block(768) + norm(768)
    assert count("gpt") == derived == 124_439_808


def test_the_first_loss_of_random_tokens():
    """Logits begin with variance width * 0.02**2, of which the log-sum-exp adds half."""
    vocabulary, width = 1000, 512
    net = dp.models.gpt(vocabulary, length=16, width=width, depth=2, heads=8)
    x = np.random.default_rng(0).integers(0, vocabulary, (128, 17))
    params, state = net.init(jax.random.key(0), x[:, :-1])
    loss, _ = dp.text.next_token()(net, params, state, {"x": x}, key=None, train=False)
    assert abs(loss / (math.log(vocabulary) + width * 0.02**2 / 2) - 1) < 0.005


@pytest.mark.slow
def test_it_learns_eight_examples():
    net = dp.models.gpt(11, length=5, **NET)  # next_token uses five of six ids as input
    learns(net, dp.text.next_token(), IDS, 60)
