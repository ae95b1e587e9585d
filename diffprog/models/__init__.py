"""Published networks, one paper per file, built from the layers of the library."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
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

__all__ = [
    "alexnet", "bert", "bert_pretraining", "dcgan_discriminator", "dcgan_generator", "dit",
    "encoder_decoder", "gpt", "llama", "mlp", "resnet", "seq2seq", "sequence_classifier",
    "transformer", "transformer_decoder", "transformer_encoder", "unet", "vae", "vit",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
