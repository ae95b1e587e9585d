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


def windows(
    rng: np.random.Generator, pages: list[str], length: int, vocabulary: int,
    counts: tuple[int, int],
) -> Split:
    """Windows (N, length) of the pages, as ids of characters; the class is the page.

    Those held out are from every fifth block of 320 characters, so that no window of the training
    part overlaps them. `counts` of each page are drawn for both parts.
    """
    from pydoc_data.topics import topics

    block = 320
    parts: tuple[Any, ...] = ([], [], [], [])
    for label, name in enumerate(pages):
        ids = np.array([min(ord(c), vocabulary - 1) for c in topics[name]], np.int32)
        blocks = ids[: len(ids) // block * block].reshape(-1, block)
        held_out = np.arange(len(blocks)) % 5 == 4
        for part, chosen in ((0, blocks[~held_out]), (1, blocks[held_out])):
            rows = rng.integers(0, len(chosen), counts[part])
            starts = rng.integers(0, block - length + 1, counts[part])
            parts[2 * part].append(chosen[rows[:, None], starts[:, None] + np.arange(length)])
            parts[2 * part + 1].append(np.full(counts[part], label, np.int32))
    return Split(*map(np.concatenate, parts))
