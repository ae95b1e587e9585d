"""The data of the experiments: everything comes with a package, or is generated."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits


class Split(NamedTuple):
    """Examples and their classes, for training and held out."""

    x: np.ndarray
    y: np.ndarray
    x_held_out: np.ndarray
    y_held_out: np.ndarray


def digits(held_out: int = 360, seed: int = 0) -> Split:
    """scikit-learn's 1,797 digits, images (N, 8, 8, 1) from 0 to 1, in an order of the seed."""
    loaded: Any = load_digits()
    order = np.random.default_rng(seed).permutation(len(loaded.target))
    x = (loaded.images[order, ..., None] / 16).astype(np.float32)
    y = loaded.target[order].astype(np.int32)
    return Split(x[held_out:], y[held_out:], x[:held_out], y[:held_out])


def text() -> str:
    """The text of the standard library's `pydoc_data.topics`, about 465,000 characters."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
