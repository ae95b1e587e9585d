"""diffprog: networks as programs with parameters; every layer is a pure (init, apply) pair.

The core is loaded at once, all else on first use, so that the import stays light.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from diffprog import tree
from diffprog.combinators import branch, parallel, residual, serial
from diffprog.errors import LayerError
from diffprog.layer import Layer, stateless
from diffprog.merging import add, concatenate
from diffprog.program import program

if TYPE_CHECKING:
    from diffprog import interop
    from diffprog.beams import beam_search
    from diffprog.checks import check
    from diffprog.cloze import mask_tokens, sentence_pairs
    from diffprog.computed import merge, trainable, unmerge
    from diffprog.curvature import fisher_product, gauss_newton_product, hessian_product
    from diffprog.data import batches
    from diffprog.derivatives import check_gradients
    from diffprog.diagrams import diagram
    from diffprog.diffusion import add_noise, cosine_schedule, denoising, linear_schedule
    from diffprog.drawing import sample
    from diffprog.evaluation import evaluate, predict
    from diffprog.fitting import Fit, fit
    from diffprog.flows import gradient_flow
    from diffprog.games import Player, make_game
    from diffprog.generation import Generation, generate
    from diffprog.language import chunked_next_token, masked_language, next_token
    from diffprog.layers.activation import binary_step, gelu, glu, prelu, swiglu
    from diffprog.layers.adaptive import adaptive_avg_pool, adaptive_max_pool
    from diffprog.layers.attention import attention_head, cross_attention, self_attention
    from diffprog.layers.batch_norm import batch_norm
    from diffprog.layers.cells import gru, lstm, simple_rnn
    from diffprog.layers.collapse import collapse
    from diffprog.layers.conv import conv, conv_transpose, depthwise_conv
    from diffprog.layers.dropout import dropout, spatial_dropout, stochastic_depth
    from diffprog.layers.embedding import attend, embedding
    from diffprog.layers.linear import bilinear, linear
    from diffprog.layers.masking import hide
    from diffprog.layers.norm import group_norm, instance_norm, layer_norm, rms_norm
    from diffprog.layers.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
    from diffprog.layers.position import learned_positions, sinusoidal_positions
    from diffprog.layers.recurrent import recurrent
    from diffprog.layers.reshape import flatten, one_hot, reshape
    from diffprog.layers.resize import patches, pixel_shuffle, upsample
    from diffprog.layers.rotary import rotary
    from diffprog.layers.sampling import (
        gaussian_sample,
        gumbel_softmax,
        score_function,
        straight_through,
    )
    from diffprog.layers.scaling import (
        linear_scaling,
        llama3_scaling,
        longrope_scaling,
        ntk_scaling,
        yarn_scaling,
    )
    from diffprog.layers.sublayer import add_norm, ffn, pre_norm
    from diffprog.losses import (
        absolute_error,
        binary_cross_entropy,
        cross_entropy,
        ctc,
        huber,
        kl_divergence,
        linear_cross_entropy,
        squared_error,
    )
    from diffprog.metrics import (
        accuracy,
        bits_per_character,
        confusion_matrix,
        perplexity,
        top_k_accuracy,
    )
    from diffprog.models.alexnet import alexnet
    from diffprog.models.bert import bert, bert_pretraining
    from diffprog.models.dit import dit
    from diffprog.models.gan import dcgan_discriminator, dcgan_generator
    from diffprog.models.gpt import gpt
    from diffprog.models.llama import llama
    from diffprog.models.mlp import mlp
    from diffprog.models.resnet import resnet
    from diffprog.models.seq2seq import seq2seq
    from diffprog.models.sequence_classifier import sequence_classifier
    from diffprog.models.transformer import (
        encoder_decoder,
        transformer,
        transformer_decoder,
        transformer_encoder,
    )
    from diffprog.models.unet import unet
    from diffprog.models.vae import vae
    from diffprog.models.vit import vit
    from diffprog.objectives import binary_classification, classification, regression
    from diffprog.penalties import l1, l2, penalized
    from diffprog.per_example import (
        per_example_gradient_norms,
        per_example_gradients,
        tangent_kernel,
    )
    from diffprog.restarting import restart
    from diffprog.samplers import ddim, ddpm
    from diffprog.scoring import log_probabilities
    from diffprog.summaries import summary
    from diffprog.training import Step, TrainState, make_step
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
    from diffprog.variational import elbo, gaussian_kl

__version__ = "0.1.0"

# Modules that are loaded on first use, as they are.
_MODULES = {"interop"}

# The module of each other name that is loaded on first use.
_HOMES = {
    # transformations
    "ensemble": "transforms.ensemble", "fixed_point": "transforms.fixed_point",
    "heads": "transforms.heads", "hyper": "transforms.hyper",
    "linearize": "transforms.linearize", "mixed": "transforms.mixed", "pin": "transforms.pinned",
    "remat": "transforms.remat", "repeat": "transforms.repeat", "replace": "transforms.replace",
    "tap": "transforms.tap",
    # computed parameters
    "ema": "transforms.ema", "freeze": "transforms.freeze", "lora": "transforms.lora",
    "quantize": "transforms.quantize", "reparam": "transforms.reparam",
    "spectral_norm": "transforms.spectral_norm", "weight_norm": "transforms.weight_norm",
    "merge": "computed", "trainable": "computed", "unmerge": "computed",
    # layers
    "bilinear": "layers.linear", "linear": "layers.linear", "conv": "layers.conv",
    "conv_transpose": "layers.conv", "depthwise_conv": "layers.conv",
    "adaptive_avg_pool": "layers.adaptive", "adaptive_max_pool": "layers.adaptive",
    "avg_pool": "layers.pool", "global_avg_pool": "layers.pool", "global_max_pool": "layers.pool",
    "max_pool": "layers.pool", "batch_norm": "layers.batch_norm", "group_norm": "layers.norm",
    "instance_norm": "layers.norm", "layer_norm": "layers.norm", "rms_norm": "layers.norm",
    "attention_head": "layers.attention", "cross_attention": "layers.attention",
    "self_attention": "layers.attention", "add_norm": "layers.sublayer", "ffn": "layers.sublayer",
    "pre_norm": "layers.sublayer",
    "dropout": "layers.dropout", "spatial_dropout": "layers.dropout",
    "stochastic_depth": "layers.dropout", "hide": "layers.masking", "flatten": "layers.reshape",
    "one_hot": "layers.reshape", "reshape": "layers.reshape", "patches": "layers.resize",
    "pixel_shuffle": "layers.resize", "upsample": "layers.resize",
    "attend": "layers.embedding", "embedding": "layers.embedding",
    "learned_positions": "layers.position", "sinusoidal_positions": "layers.position",
    "rotary": "layers.rotary", "linear_scaling": "layers.scaling",
    "llama3_scaling": "layers.scaling", "longrope_scaling": "layers.scaling",
    "ntk_scaling": "layers.scaling", "yarn_scaling": "layers.scaling",
    "binary_step": "layers.activation", "gelu": "layers.activation", "glu": "layers.activation",
    "prelu": "layers.activation", "swiglu": "layers.activation",
    "collapse": "layers.collapse", "gru": "layers.cells", "lstm": "layers.cells",
    "recurrent": "layers.recurrent", "simple_rnn": "layers.cells",
    "gaussian_sample": "layers.sampling", "gumbel_softmax": "layers.sampling",
    "score_function": "layers.sampling", "straight_through": "layers.sampling",
    # models
    "alexnet": "models.alexnet", "bert": "models.bert", "bert_pretraining": "models.bert",
    "dcgan_discriminator": "models.gan", "dcgan_generator": "models.gan", "dit": "models.dit",
    "encoder_decoder": "models.transformer", "gpt": "models.gpt", "llama": "models.llama",
    "mlp": "models.mlp", "resnet": "models.resnet", "seq2seq": "models.seq2seq",
    "sequence_classifier": "models.sequence_classifier", "transformer": "models.transformer",
    "transformer_decoder": "models.transformer", "transformer_encoder": "models.transformer",
    "unet": "models.unet", "vae": "models.vae", "vit": "models.vit",
    # losses and metrics
    "absolute_error": "losses", "binary_cross_entropy": "losses", "cross_entropy": "losses",
    "ctc": "losses", "gaussian_kl": "variational", "huber": "losses", "kl_divergence": "losses",
    "linear_cross_entropy": "losses", "squared_error": "losses", "accuracy": "metrics",
    "bits_per_character": "metrics", "confusion_matrix": "metrics", "perplexity": "metrics",
    "top_k_accuracy": "metrics",
    # objectives and training
    "binary_classification": "objectives", "classification": "objectives",
    "regression": "objectives", "chunked_next_token": "language", "masked_language": "language",
    "next_token": "language", "mask_tokens": "cloze", "sentence_pairs": "cloze",
    "elbo": "variational", "penalized": "penalties", "l1": "penalties", "l2": "penalties",
    "batches": "data", "Fit": "fitting", "Step": "training", "TrainState": "training",
    "evaluate": "evaluation", "fit": "fitting", "make_step": "training", "predict": "evaluation",
    "Player": "games", "make_game": "games",
    # diffusion
    "add_noise": "diffusion", "cosine_schedule": "diffusion", "ddim": "samplers",
    "ddpm": "samplers", "denoising": "diffusion", "linear_schedule": "diffusion",
    # writing
    "Generation": "generation", "beam_search": "beams", "generate": "generation",
    "log_probabilities": "scoring", "sample": "drawing",
    "restart": "restarting",
    # second order, and example by example
    "fisher_product": "curvature", "gauss_newton_product": "curvature",
    "hessian_product": "curvature", "per_example_gradient_norms": "per_example",
    "per_example_gradients": "per_example", "tangent_kernel": "per_example",
    # seeing and checking
    "check": "checks", "check_gradients": "derivatives", "diagram": "diagrams",
    "gradient_flow": "flows", "summary": "summaries",
}

__all__ = [
    # the layer, and what makes one
    "Layer", "LayerError", "program", "stateless", "tree",
    # wiring
    "add", "branch", "concatenate", "parallel", "residual", "serial",
    # transformations
    "ensemble", "fixed_point", "heads", "hyper", "linearize", "mixed", "pin", "remat", "repeat",
    "replace", "tap",
    # computed parameters
    "ema", "freeze", "lora", "quantize", "reparam", "spectral_norm", "weight_norm", "merge",
    "trainable", "unmerge",
    # layers
    "bilinear", "linear", "conv", "conv_transpose", "depthwise_conv", "adaptive_avg_pool",
    "adaptive_max_pool", "avg_pool", "global_avg_pool", "global_max_pool", "max_pool", "batch_norm",
    "group_norm", "instance_norm", "layer_norm", "rms_norm", "attention_head", "cross_attention",
    "self_attention", "add_norm", "ffn", "pre_norm", "dropout", "spatial_dropout",
    "stochastic_depth", "hide", "flatten", "one_hot", "reshape", "patches", "pixel_shuffle",
    "upsample", "attend", "embedding", "learned_positions", "sinusoidal_positions", "rotary",
    "linear_scaling", "llama3_scaling", "longrope_scaling", "ntk_scaling", "yarn_scaling",
    "binary_step", "gelu", "glu", "prelu", "swiglu",
    "collapse", "gru", "lstm", "recurrent", "simple_rnn", "gaussian_sample", "gumbel_softmax",
    "score_function", "straight_through",
    # models
    "alexnet", "bert", "bert_pretraining", "dcgan_discriminator", "dcgan_generator", "dit",
    "encoder_decoder", "gpt", "llama", "mlp", "resnet", "seq2seq", "sequence_classifier",
    "transformer", "transformer_decoder", "transformer_encoder", "unet", "vae", "vit",
    # losses and metrics
    "absolute_error", "binary_cross_entropy", "cross_entropy", "ctc", "gaussian_kl", "huber",
    "kl_divergence", "linear_cross_entropy", "squared_error", "accuracy",
    "bits_per_character", "confusion_matrix", "perplexity", "top_k_accuracy",
    # objectives and training
    "binary_classification", "classification", "regression", "chunked_next_token",
    "masked_language", "next_token", "mask_tokens", "sentence_pairs", "elbo", "penalized", "l1",
    "l2", "batches", "Fit", "Step", "TrainState", "evaluate", "fit", "make_step", "predict",
    "Player", "make_game",
    # diffusion
    "add_noise", "cosine_schedule", "ddim", "ddpm", "denoising", "linear_schedule",
    # writing
    "Generation", "beam_search", "generate", "log_probabilities", "sample", "restart",
    # second order, and example by example
    "fisher_product", "gauss_newton_product", "hessian_product", "per_example_gradient_norms",
    "per_example_gradients", "tangent_kernel",
    # seeing and checking
    "check", "check_gradients", "diagram", "gradient_flow", "summary",
    # networks of other libraries
    "interop",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"diffprog.{name}")
    if name not in _HOMES:
        from diffprog.synonyms import meant

        known = meant(name, __all__)
        raise AttributeError(f"module 'diffprog' has no attribute {name!r}"
                             + (f"; use {known}" if known else ""),
                             name=name, obj=sys.modules[__name__])
    value = getattr(importlib.import_module(f"diffprog.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
