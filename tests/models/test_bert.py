"""BERT: its parameters, counted by hand; it learns; the shape of token types."""

import jax
import numpy as np
import pytest
from support.counting import block, count, linear, norm
from support.learning import NET, PAIRS, learns

import diffprog as dp

KEY = jax.random.key(0)


@pytest.mark.slow
def test_the_parameters_of_bert():
    embedded = (30522 + 512 + 2) * 768 + norm(768)
    derived = embedded + 12 * block(768) + linear(768, 768)
    assert count("bert") == derived == 109_482_240
    derived += linear(768, 768) + norm(768) + 30522  # the head of masked tokens
    derived += linear(768, 2)  # the head of the next sentence
    assert count("bert_pretraining") == derived == 110_106_428


@pytest.mark.slow
def test_it_learns_eight_examples():
    learns(dp.models.bert_pretraining(11, length=6, **NET), dp.text.masked_language(), PAIRS, 120)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 1)])
def test_token_types_are_not_broadcast(shape):
    net = dp.models.bert(11, length=5, **NET)
    with pytest.raises(dp.LayerError, match="token_types of the shape of x"):
        net.init(KEY, np.ones((2, 5), int), token_types=np.ones(shape, int))
