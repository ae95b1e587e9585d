"""diffprog: networks as programs with parameters; every layer is a pure (init, apply) pair.

The core is loaded at once, all else on first use, so that the import stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffprog import tree
from diffprog.combinators import add, branch, concatenate, parallel, residual, serial
from diffprog.errors import LayerError
from diffprog.layer import Layer, stateless
from diffprog.program import program

if TYPE_CHECKING:
    from diffprog.checks import check
    from diffprog.data import batches
    from diffprog.derivatives import check_gradients
    from diffprog.layers.activation import gelu
    from diffprog.layers.conv import conv
    from diffprog.layers.dropout import dropout
    from diffprog.layers.linear import linear
    from diffprog.layers.norm import batch_norm, layer_norm
    from diffprog.layers.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
    from diffprog.layers.reshape import flatten
    from diffprog.objectives import accuracy, classification, cross_entropy
    from diffprog.summaries import summary
    from diffprog.training import Fit, Step, TrainState, evaluate, fit, make_step, predict
    from diffprog.transforms.heads import heads
    from diffprog.transforms.remat import remat
    from diffprog.transforms.repeat import repeat

__version__ = "0.1.0"

# The module of each name that is loaded on first use.
_HOMES = {
    # transformations
    "heads": "transforms.heads", "remat": "transforms.remat", "repeat": "transforms.repeat",
    # layers
    "linear": "layers.linear", "conv": "layers.conv",
    "max_pool": "layers.pool", "avg_pool": "layers.pool",
    "global_avg_pool": "layers.pool", "global_max_pool": "layers.pool",
    "batch_norm": "layers.norm", "layer_norm": "layers.norm",
    "dropout": "layers.dropout", "flatten": "layers.reshape", "gelu": "layers.activation",
    # objectives and training
    "accuracy": "objectives", "classification": "objectives", "cross_entropy": "objectives",
    "batches": "data",
    "Fit": "training", "Step": "training", "TrainState": "training",
    "evaluate": "training", "fit": "training", "make_step": "training", "predict": "training",
    # seeing and checking
    "check": "checks", "check_gradients": "derivatives", "summary": "summaries",
}

__all__ = [
    # the layer, and what makes one
    "Layer", "LayerError", "program", "stateless", "tree",
    # wiring
    "add", "branch", "concatenate", "parallel", "residual", "serial",
    # transformations
    "heads", "remat", "repeat",
    # layers
    "avg_pool", "batch_norm", "conv", "dropout", "flatten", "gelu", "global_avg_pool",
    "global_max_pool", "layer_norm", "linear", "max_pool",
    # objectives and training
    "Fit", "Step", "TrainState", "accuracy", "batches", "classification", "cross_entropy",
    "evaluate", "fit", "make_step", "predict",
    # seeing and checking
    "check", "check_gradients", "summary",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffprog' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffprog.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
