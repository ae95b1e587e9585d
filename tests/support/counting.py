"""Parameter counts of the parts of models, by formula."""

from golden import MODELS

import diffprog as dp


def count(name):
    """The number of parameters of a model of `golden.py`."""
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
    """Attention, a feed-forward net of hidden size 4 * width, and their norms."""
    feed = linear(width, 4 * width) + linear(4 * width, width)
    return attention(width) + feed + 2 * norm(width)
