"""The multilayer perceptron: it learns; hidden must be a sequence."""

from support.learning import drawn, learns
from support.refusing import expect

import diffprog as dp


def test_it_learns_eight_examples():
    learns(dp.models.mlp((16,), 4), dp.classification(), drawn(6), 120)


def test_a_single_size_raises():
    expect("", "wants hidden as a sequence of sizes, got 64; pass (64, 32), for example",
           dp.models.mlp, 64, 10)
