"""Disk, devices and the terminal: logs and interrupts."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.runtime.caches import compilation_cache
from diffprog.runtime.checkpoints import Checkpoints
from diffprog.runtime.logs import jsonl, progress, tensorboard
from diffprog.runtime.pictures import plot_history
from diffprog.runtime.profiles import trace
from diffprog.runtime.rates import rates
from diffprog.runtime.runs import Run
from diffprog.runtime.watching import Histogram, watch
from diffprog.runtime.weights import Weights, load_weights, save_weights

__all__ = [
    "Checkpoints", "Histogram", "Run", "Weights", "compilation_cache", "jsonl", "load_weights",
    "plot_history", "progress", "rates", "save_weights", "tensorboard", "trace", "watch",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
