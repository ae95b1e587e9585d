"""diffprog: networks as programs with parameters; every layer is a pure (init, apply) pair.

The core is loaded at once, all else on first use, so that the import stays light.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from diffprog import tree
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer, stateless
from diffprog.wiring.combinators import branch, parallel, residual, serial
from diffprog.wiring.merging import add, concatenate
from diffprog.wiring.program import program

if TYPE_CHECKING:
    from diffprog import interop
    from diffprog.core.nets import merge, trainable, unmerge
    from diffprog.data.batches import batches
    from diffprog.diffusion.denoising import denoising
    from diffprog.diffusion.process import add_noise, cosine_schedule, linear_schedule
    from diffprog.diffusion.samplers import ddim, ddpm
    from diffprog.gradients.agreement import check_gradients
    from diffprog.gradients.curvature import fisher_product, gauss_newton_product, hessian_product
    from diffprog.gradients.per_example import (
        per_example_gradient_norms,
        per_example_gradients,
        tangent_kernel,
    )
    from diffprog.inspection.diagrams import diagram
    from diffprog.inspection.flows import gradient_flow
    from diffprog.inspection.summaries import summary
    from diffprog.laws.checks import check
    from diffprog.layers.activation import binary_step, gelu, glu, prelu, swiglu
    from diffprog.layers.attention.attention import attention_head, cross_attention, self_attention
    from diffprog.layers.collapse import collapse
    from diffprog.layers.dropout import dropout, spatial_dropout, stochastic_depth
    from diffprog.layers.embedding import attend, embedding
    from diffprog.layers.linear import bilinear, linear
    from diffprog.layers.masking import hide
    from diffprog.layers.norms.batch_norm import batch_norm
    from diffprog.layers.norms.norm import group_norm, instance_norm, layer_norm, rms_norm
    from diffprog.layers.positions.absolute import learned_positions, sinusoidal_positions
    from diffprog.layers.positions.rotary import rotary
    from diffprog.layers.positions.scaling import (
        linear_scaling,
        llama3_scaling,
        longrope_scaling,
        ntk_scaling,
        yarn_scaling,
    )
    from diffprog.layers.recurrence.cells import gru, lstm, simple_rnn
    from diffprog.layers.recurrence.recurrent import recurrent
    from diffprog.layers.reshape import flatten, one_hot, reshape
    from diffprog.layers.sampling import (
        gaussian_sample,
        gumbel_softmax,
        score_function,
        straight_through,
    )
    from diffprog.layers.spatial.adaptive import adaptive_avg_pool, adaptive_max_pool
    from diffprog.layers.spatial.conv import conv, conv_transpose, depthwise_conv
    from diffprog.layers.spatial.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
    from diffprog.layers.spatial.resize import patches, pixel_shuffle, upsample
    from diffprog.layers.sublayer import add_norm, ffn, pre_norm
    from diffprog.losses.classes import (
        binary_cross_entropy,
        cross_entropy,
        ctc,
        kl_divergence,
        linear_cross_entropy,
    )
    from diffprog.losses.metrics import (
        accuracy,
        bits_per_character,
        confusion_matrix,
        perplexity,
        top_k_accuracy,
    )
    from diffprog.losses.penalties import l1, l2
    from diffprog.losses.values import absolute_error, gaussian_kl, huber, squared_error
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
    from diffprog.text.beams import beam_search
    from diffprog.text.cloze import mask_tokens, sentence_pairs
    from diffprog.text.generation import Generation, generate
    from diffprog.text.objectives import chunked_next_token, masked_language, next_token
    from diffprog.text.sampling import sample
    from diffprog.text.scoring import log_probabilities
    from diffprog.training.evaluation import evaluate, predict
    from diffprog.training.games import Player, make_game
    from diffprog.training.loop import Fit, fit
    from diffprog.training.objectives import binary_classification, classification, regression
    from diffprog.training.penalized import penalized
    from diffprog.training.restarting import restart
    from diffprog.training.step import Step, TrainState, make_step
    from diffprog.training.variational import elbo
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

__version__ = "0.1.0"

# Modules that are loaded on first use, as they are.
_MODULES = {"interop"}

# The module of each other name that is loaded on first use.
_HOMES = {
    # transformations
    "ensemble": "transforms.ensemble", "fixed_point": "transforms.fixed_point",
    "heads": "transforms.heads", "hyper": "transforms.hyper",
    "linearize": "transforms.linearize", "mixed": "transforms.mixed",
    "pin": "transforms.pinned", "remat": "transforms.remat", "repeat": "transforms.repeat",
    "replace": "transforms.replace", "tap": "transforms.tap",
    # computed parameters
    "ema": "transforms.ema", "freeze": "transforms.freeze", "lora": "transforms.lora",
    "quantize": "transforms.quantize", "reparam": "transforms.reparam",
    "spectral_norm": "transforms.spectral_norm", "weight_norm": "transforms.weight_norm",
    "merge": "core.nets", "trainable": "core.nets", "unmerge": "core.nets",
    # layers
    "bilinear": "layers.linear", "linear": "layers.linear", "conv": "layers.spatial.conv",
    "conv_transpose": "layers.spatial.conv", "depthwise_conv": "layers.spatial.conv",
    "adaptive_avg_pool": "layers.spatial.adaptive",
    "adaptive_max_pool": "layers.spatial.adaptive", "avg_pool": "layers.spatial.pool",
    "global_avg_pool": "layers.spatial.pool", "global_max_pool": "layers.spatial.pool",
    "max_pool": "layers.spatial.pool", "batch_norm": "layers.norms.batch_norm",
    "group_norm": "layers.norms.norm", "instance_norm": "layers.norms.norm",
    "layer_norm": "layers.norms.norm", "rms_norm": "layers.norms.norm",
    "attention_head": "layers.attention.attention",
    "cross_attention": "layers.attention.attention",
    "self_attention": "layers.attention.attention", "add_norm": "layers.sublayer",
    "ffn": "layers.sublayer", "pre_norm": "layers.sublayer", "dropout": "layers.dropout",
    "spatial_dropout": "layers.dropout", "stochastic_depth": "layers.dropout",
    "hide": "layers.masking", "flatten": "layers.reshape", "one_hot": "layers.reshape",
    "reshape": "layers.reshape", "patches": "layers.spatial.resize",
    "pixel_shuffle": "layers.spatial.resize", "upsample": "layers.spatial.resize",
    "attend": "layers.embedding", "embedding": "layers.embedding",
    "learned_positions": "layers.positions.absolute",
    "sinusoidal_positions": "layers.positions.absolute", "rotary": "layers.positions.rotary",
    "linear_scaling": "layers.positions.scaling", "llama3_scaling": "layers.positions.scaling",
    "longrope_scaling": "layers.positions.scaling", "ntk_scaling": "layers.positions.scaling",
    "yarn_scaling": "layers.positions.scaling", "binary_step": "layers.activation",
    "gelu": "layers.activation", "glu": "layers.activation", "prelu": "layers.activation",
    "swiglu": "layers.activation", "collapse": "layers.collapse",
    "gru": "layers.recurrence.cells", "lstm": "layers.recurrence.cells",
    "recurrent": "layers.recurrence.recurrent", "simple_rnn": "layers.recurrence.cells",
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
    "absolute_error": "losses.values", "binary_cross_entropy": "losses.classes",
    "cross_entropy": "losses.classes", "ctc": "losses.classes", "gaussian_kl": "losses.values",
    "huber": "losses.values", "kl_divergence": "losses.classes",
    "linear_cross_entropy": "losses.classes", "squared_error": "losses.values",
    "accuracy": "losses.metrics", "bits_per_character": "losses.metrics",
    "confusion_matrix": "losses.metrics", "perplexity": "losses.metrics",
    "top_k_accuracy": "losses.metrics",
    # objectives and training
    "binary_classification": "training.objectives", "classification": "training.objectives",
    "regression": "training.objectives", "chunked_next_token": "text.objectives",
    "masked_language": "text.objectives", "next_token": "text.objectives",
    "mask_tokens": "text.cloze", "sentence_pairs": "text.cloze", "elbo": "training.variational",
    "penalized": "training.penalized", "l1": "losses.penalties", "l2": "losses.penalties",
    "batches": "data.batches", "Fit": "training.loop", "Step": "training.step",
    "TrainState": "training.step", "evaluate": "training.evaluation", "fit": "training.loop",
    "make_step": "training.step", "predict": "training.evaluation", "Player": "training.games",
    "make_game": "training.games",
    # diffusion
    "add_noise": "diffusion.process", "cosine_schedule": "diffusion.process",
    "ddim": "diffusion.samplers", "ddpm": "diffusion.samplers",
    "denoising": "diffusion.denoising", "linear_schedule": "diffusion.process",
    # writing
    "Generation": "text.generation", "beam_search": "text.beams", "generate": "text.generation",
    "log_probabilities": "text.scoring", "sample": "text.sampling",
    "restart": "training.restarting",
    # second order, and example by example
    "fisher_product": "gradients.curvature", "gauss_newton_product": "gradients.curvature",
    "hessian_product": "gradients.curvature",
    "per_example_gradient_norms": "gradients.per_example",
    "per_example_gradients": "gradients.per_example", "tangent_kernel": "gradients.per_example",
    # seeing and checking
    "check": "laws.checks", "check_gradients": "gradients.agreement",
    "diagram": "inspection.diagrams", "gradient_flow": "inspection.flows",
    "summary": "inspection.summaries",
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
        from diffprog.core.synonyms import meant

        known = meant(name, __all__)
        raise AttributeError(f"module 'diffprog' has no attribute {name!r}"
                             + (f"; use {known}" if known else ""),
                             name=name, obj=sys.modules[__name__])
    value = getattr(importlib.import_module(f"diffprog.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
