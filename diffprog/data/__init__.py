"""Batches of data for training."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.data.images import mixup, normalize, random_crop, random_flip, random_rotation
from diffprog.data.pipelines import pipeline
from diffprog.data.prefetching import prefetch
from diffprog.data.tokens import token_windows, write_tokens

__all__ = [
    "mixup", "normalize", "pipeline", "prefetch", "random_crop", "random_flip", "random_rotation",
    "token_windows", "write_tokens",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
