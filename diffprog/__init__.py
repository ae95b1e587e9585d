"""diffprog: networks as programs with parameters; every layer is a pure (init, apply) pair.

The record and its wiring are loaded at once, all else on first use: the import stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Written by tests/names.py --write.
from diffprog import tree
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer, stateless
from diffprog.wiring.combinators import branch, parallel, residual, serial
from diffprog.wiring.merging import add, concatenate
from diffprog.wiring.program import program

if TYPE_CHECKING:
    from diffprog import (
        data,
        diffusion,
        gradients,
        inspection,
        interop,
        losses,
        models,
        runtime,
        text,
        training,
    )
    from diffprog.data.batches import batches
    from diffprog.inspection.summaries import summary
    from diffprog.laws.checks import check
    from diffprog.layers import estimators
    from diffprog.layers.activation import binary_step, gelu, glu, prelu, swiglu
    from diffprog.layers.attention.attention import (
        attention,
        attention_head,
        cross_attention,
        self_attention,
    )
    from diffprog.layers.collapse import collapse
    from diffprog.layers.dropout import dropout, spatial_dropout, stochastic_depth
    from diffprog.layers.embedding import embedding, unembed
    from diffprog.layers.linear import bilinear, linear
    from diffprog.layers.masking import hide
    from diffprog.layers.norms.batch_norm import batch_norm
    from diffprog.layers.norms.norm import group_norm, instance_norm, layer_norm, rms_norm
    from diffprog.layers.positions import rope
    from diffprog.layers.positions.absolute import learned_positions, sinusoidal_positions
    from diffprog.layers.positions.rotary import rotary
    from diffprog.layers.recurrence.cells import gru, lstm, simple_rnn
    from diffprog.layers.recurrence.recurrent import recurrent
    from diffprog.layers.reshape import flatten, one_hot, reshape
    from diffprog.layers.spatial.adaptive import adaptive_avg_pool, adaptive_max_pool
    from diffprog.layers.spatial.conv import conv, conv_transpose, depthwise_conv
    from diffprog.layers.spatial.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
    from diffprog.layers.spatial.resize import patches, pixel_shuffle, upsample
    from diffprog.layers.sublayer import add_norm, ffn, pre_norm
    from diffprog.losses import metrics
    from diffprog.training.evaluation import evaluate, predict
    from diffprog.training.loop import fit
    from diffprog.training.objectives import classification, regression
    from diffprog.training.step import make_step
    from diffprog.transforms.ema import ema
    from diffprog.transforms.ensemble import ensemble
    from diffprog.transforms.fixed_point import fixed_point
    from diffprog.transforms.freeze import freeze
    from diffprog.transforms.heads import heads
    from diffprog.transforms.hyper import hyper
    from diffprog.transforms.linearize import linearize
    from diffprog.transforms.lora import lora
    from diffprog.transforms.mixed import mixed
    from diffprog.transforms.pinned import pin
    from diffprog.transforms.quantize import quantize
    from diffprog.transforms.remat import remat
    from diffprog.transforms.reparam import reparam
    from diffprog.transforms.repeat import repeat
    from diffprog.transforms.replace import replace
    from diffprog.transforms.spectral_norm import spectral_norm
    from diffprog.transforms.tap import tap
    from diffprog.transforms.weight_norm import weight_norm

# The module of each namespace, and of each name, that is loaded on first use.
_SPACES = {
    "data": "data", "diffusion": "diffusion", "estimators": "layers.estimators",
    "gradients": "gradients", "inspection": "inspection", "interop": "interop", "losses": "losses",
    "metrics": "losses.metrics", "models": "models", "rope": "layers.positions.rope",
    "runtime": "runtime", "text": "text", "training": "training",
}

_HOMES = {
    "batches": "data.batches", "summary": "inspection.summaries", "check": "laws.checks",
    "binary_step": "layers.activation", "gelu": "layers.activation", "glu": "layers.activation",
    "prelu": "layers.activation", "swiglu": "layers.activation",
    "attention": "layers.attention.attention", "attention_head": "layers.attention.attention",
    "cross_attention": "layers.attention.attention", "self_attention": "layers.attention.attention",
    "collapse": "layers.collapse", "dropout": "layers.dropout", "spatial_dropout": "layers.dropout",
    "stochastic_depth": "layers.dropout", "embedding": "layers.embedding",
    "unembed": "layers.embedding", "bilinear": "layers.linear", "linear": "layers.linear",
    "hide": "layers.masking", "batch_norm": "layers.norms.batch_norm",
    "group_norm": "layers.norms.norm", "instance_norm": "layers.norms.norm",
    "layer_norm": "layers.norms.norm", "rms_norm": "layers.norms.norm",
    "learned_positions": "layers.positions.absolute",
    "sinusoidal_positions": "layers.positions.absolute", "rotary": "layers.positions.rotary",
    "gru": "layers.recurrence.cells", "lstm": "layers.recurrence.cells",
    "simple_rnn": "layers.recurrence.cells", "recurrent": "layers.recurrence.recurrent",
    "flatten": "layers.reshape", "one_hot": "layers.reshape", "reshape": "layers.reshape",
    "adaptive_avg_pool": "layers.spatial.adaptive", "adaptive_max_pool": "layers.spatial.adaptive",
    "conv": "layers.spatial.conv", "conv_transpose": "layers.spatial.conv",
    "depthwise_conv": "layers.spatial.conv", "avg_pool": "layers.spatial.pool",
    "global_avg_pool": "layers.spatial.pool", "global_max_pool": "layers.spatial.pool",
    "max_pool": "layers.spatial.pool", "patches": "layers.spatial.resize",
    "pixel_shuffle": "layers.spatial.resize", "upsample": "layers.spatial.resize",
    "add_norm": "layers.sublayer", "ffn": "layers.sublayer", "pre_norm": "layers.sublayer",
    "evaluate": "training.evaluation", "predict": "training.evaluation", "fit": "training.loop",
    "classification": "training.objectives", "regression": "training.objectives",
    "make_step": "training.step", "ema": "transforms.ema", "ensemble": "transforms.ensemble",
    "fixed_point": "transforms.fixed_point", "freeze": "transforms.freeze",
    "heads": "transforms.heads", "hyper": "transforms.hyper", "linearize": "transforms.linearize",
    "lora": "transforms.lora", "mixed": "transforms.mixed", "pin": "transforms.pinned",
    "quantize": "transforms.quantize", "remat": "transforms.remat", "reparam": "transforms.reparam",
    "repeat": "transforms.repeat", "replace": "transforms.replace",
    "spectral_norm": "transforms.spectral_norm", "tap": "transforms.tap",
    "weight_norm": "transforms.weight_norm",
}

__all__ = [
    "Layer", "LayerError", "adaptive_avg_pool", "adaptive_max_pool", "add", "add_norm", "attention",
    "attention_head", "avg_pool", "batch_norm", "batches", "bilinear", "binary_step", "branch",
    "check", "classification", "collapse", "concatenate", "conv", "conv_transpose",
    "cross_attention", "data", "depthwise_conv", "diffusion", "dropout", "ema", "embedding",
    "ensemble", "estimators", "evaluate", "ffn", "fit", "fixed_point", "flatten", "freeze", "gelu",
    "global_avg_pool", "global_max_pool", "glu", "gradients", "group_norm", "gru", "heads", "hide",
    "hyper", "inspection", "instance_norm", "interop", "layer_norm", "learned_positions", "linear",
    "linearize", "lora", "losses", "lstm", "make_step", "max_pool", "metrics", "mixed", "models",
    "one_hot", "parallel", "patches", "pin", "pixel_shuffle", "pre_norm", "predict", "prelu",
    "program", "quantize", "recurrent", "regression", "remat", "reparam", "repeat", "replace",
    "reshape", "residual", "rms_norm", "rope", "rotary", "runtime", "self_attention", "serial",
    "simple_rnn", "sinusoidal_positions", "spatial_dropout", "spectral_norm", "stateless",
    "stochastic_depth", "summary", "swiglu", "tap", "text", "training", "tree", "unembed",
    "upsample", "weight_norm",
]
# To here.

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _SPACES:
        value = importlib.import_module(f"diffprog.{_SPACES[name]}")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"diffprog.{_HOMES[name]}"), name)
    else:
        from diffprog.core.synonyms import unknown

        raise unknown(__name__, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
