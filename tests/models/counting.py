"""How many parameters the parts of models have, by their formulas."""

from golden import MODELS

import diffprog as dp


def count(name):
    """The parameters of a model of `golden.py`."""
    return dp.tree.count(MODELS[name].plan().params)


def conv(size, inputs, features, groups=1):
    """A kernel without a bias."""
    return size * size * (inputs // groups) * features


def linear(inputs, features):
    return inputs * features + features


def norm(width):
    return 2 * width


def attention(width):
    return 4 * linear(width, width)


def block(width):
    """Attention, a net with a hidden axis four times as wide, and their norms."""
    feed = linear(width, 4 * width) + linear(4 * width, width)
    return attention(width) + feed + 2 * norm(width)
