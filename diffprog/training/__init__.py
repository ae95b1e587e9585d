"""Training: objectives, steps, the loop, evaluation."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.training.finite import LossScale
from diffprog.training.games import Player, make_game
from diffprog.training.loop import Fit, Validation
from diffprog.training.objectives import binary_classification
from diffprog.training.optimizers import adamw, layerwise_decay, muon, warmup_stable_decay
from diffprog.training.partition import Partition, muon_partition
from diffprog.training.penalized import penalized
from diffprog.training.restarting import restart
from diffprog.training.seeds import Spread, over_seeds
from diffprog.training.step import Step, TrainState
from diffprog.training.variational import elbo

__all__ = [
    "Fit", "LossScale", "Partition", "Player", "Spread", "Step", "TrainState", "Validation",
    "adamw", "binary_classification", "elbo", "layerwise_decay", "make_game", "muon",
    "muon_partition", "over_seeds", "penalized", "restart", "warmup_stable_decay",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
