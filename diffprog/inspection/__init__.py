"""Inspection of a net: summaries, diagrams, costs, gradient flow."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.inspection.diagrams import diagram
from diffprog.inspection.flows import gradient_flow
from diffprog.inspection.watching import watch_activations, watch_gradients

__all__ = [
    "diagram", "gradient_flow", "watch_activations", "watch_gradients",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
