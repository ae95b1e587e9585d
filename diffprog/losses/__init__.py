"""Functions of arrays that return numbers: losses, metrics, penalties."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.losses.classes import (
    binary_cross_entropy,
    cross_entropy,
    ctc,
    kl_divergence,
    linear_cross_entropy,
)
from diffprog.losses.penalties import l1, l2
from diffprog.losses.values import absolute_error, gaussian_kl, huber, squared_error

__all__ = [
    "absolute_error", "binary_cross_entropy", "cross_entropy", "ctc", "gaussian_kl", "huber",
    "kl_divergence", "l1", "l2", "linear_cross_entropy", "squared_error",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
