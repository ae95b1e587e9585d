"""Disk, devices and the terminal: logs and interrupts."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.runtime.checkpoints import Checkpoints
from diffprog.runtime.weights import Weights, load_weights, save_weights

__all__ = [
    "Checkpoints", "Weights", "load_weights", "save_weights",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
