"""Language models: objectives, prompts, sampling, generation."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.text.beams import beam_search
from diffprog.text.cloze import mask_tokens, sentence_pairs
from diffprog.text.generation import Generation, generate
from diffprog.text.objectives import chunked_next_token, masked_language, next_token
from diffprog.text.sampling import sample
from diffprog.text.scoring import log_probabilities

__all__ = [
    "Generation", "beam_search", "chunked_next_token", "generate", "log_probabilities",
    "mask_tokens", "masked_language", "next_token", "sample", "sentence_pairs",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
