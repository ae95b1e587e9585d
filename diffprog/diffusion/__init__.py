"""Diffusion: the process, the objective, samplers."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.diffusion.denoising import denoising
from diffprog.diffusion.process import add_noise, cosine_noise, linear_noise
from diffprog.diffusion.samplers import ddim, ddpm

__all__ = [
    "add_noise", "cosine_noise", "ddim", "ddpm", "denoising", "linear_noise",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
