"""Training: objectives, steps, the loop, evaluation."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.training.games import Player, make_game
from diffprog.training.loop import Fit
from diffprog.training.objectives import binary_classification
from diffprog.training.penalized import penalized
from diffprog.training.restarting import restart
from diffprog.training.seeds import Spread, over_seeds
from diffprog.training.step import Step, TrainState
from diffprog.training.variational import elbo

__all__ = [
    "Fit", "Player", "Spread", "Step", "TrainState", "binary_classification", "elbo", "make_game",
    "over_seeds", "penalized", "restart",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
