"""Training data of BERT: masked tokens, and pairs of sentences for next-sentence prediction.

Devlin, Chang, Lee, Toutanova 2018, arXiv:1810.04805, section 3.1 and appendix A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import as_int32, check_array, check_count, check_fraction
from diffprog.core.dtypes import is_int
from diffprog.core.errors import LayerError
from diffprog.core.notation import show
from diffprog.losses.entries import Mask, spread

__all__ = ["mask_tokens", "sentence_pairs"]

Sentence = Sequence[int]


def mask_tokens(
    key: jax.Array, ids: jax.Array, *, vocabulary: int, mask_token: int,
    special_tokens: Sequence[int] = (), rate: float = 0.15, mask: Mask = None,
) -> tuple[jax.Array, jax.Array]:
    """Mask a fraction `rate` of tokens: 80 % become `mask_token`, 10 % a random id, 10 % stay.

    Each row has ``round(rate * n)`` chosen tokens, at least one, among n candidates.

    Shapes:
        ids: ints (batch, time) in [0, vocabulary). mask: booleans (batch, time), True = valid.
        Returns the masked ids, and the labels: the original id of a chosen token, -100 elsewhere;
            both int32, whatever the dtype of the ids.

    Args:
        key: PRNG key of the choice.
        vocabulary: number of token ids.
        mask_token: the id that replaces a masked token.
        special_tokens: ids that are never chosen, such as start and separator tokens. A random id
            may be one of them.
        rate: fraction of tokens that are chosen, in [0, 1).
        mask: padding is never chosen.

    Raises:
        LayerError: ids are not ints (batch, time); mask_token or special_tokens lie outside the
            vocabulary.

    Example:
        >>> ids = jnp.arange(20).reshape(1, 20)
        >>> x, labels = dp.text.mask_tokens(jax.random.key(0), ids, vocabulary=21, mask_token=20)
        >>> int((labels != -100).sum()), bool((jnp.where(labels != -100, labels, x) == ids).all())
        (3, True)

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1 and appendix A.1.
    """
    check_fraction("rate", rate)
    check_count("vocabulary", vocabulary)
    check_array(ids, rank=2, axes="(batch, time)", floating=False)
    if not is_int(ids) or ids.ndim != 2:
        raise LayerError("ids as ints (batch, time)", show(ids), "give one row to each text")
    ids = as_int32(ids)  # an unsigned dtype could not hold the label -100
    if any(not 0 <= token < vocabulary for token in (mask_token, *special_tokens)):
        raise LayerError(f"mask_token and special_tokens in [0, {vocabulary})",
                         f"{mask_token} and {tuple(special_tokens)}",
                         "pass ids of the vocabulary")
    choice_key, kind_key, id_key = jax.random.split(key, 3)

    # Choose tokens: those of the smallest random numbers in each row.
    candidates = ~jnp.isin(ids, jnp.asarray(special_tokens, ids.dtype))  # (batch, time)
    if mask is not None:
        candidates &= spread(mask, ids.shape)
    count = candidates.sum(1, keepdims=True, dtype=jnp.int32)            # (batch, 1)
    wanted = jnp.round(rate * count.astype(float)).astype(jnp.int32)
    count = jnp.clip(wanted, jnp.minimum(count, 1), count)
    order = jnp.where(candidates, jax.random.uniform(choice_key, ids.shape), 2.0)
    ranks = jnp.argsort(jnp.argsort(order, axis=1), axis=1).astype(jnp.int32)
    chosen = ranks < count                                               # (batch, time)

    # Replace them.
    kind = jax.random.uniform(kind_key, ids.shape)
    random_id = jax.random.randint(id_key, ids.shape, 0, vocabulary, ids.dtype)
    masked = jnp.asarray(mask_token, ids.dtype)
    new = jnp.where(kind < 0.8, masked, jnp.where(kind < 0.9, random_id, ids))
    return jnp.where(chosen, new, ids), jnp.where(chosen, ids, -100)


def sentence_pairs(
    documents: Sequence[Sequence[Sentence]], length: int, *, start_token: int,
    separator_token: int, seed: int, padding_token: int = 0, short_rate: float = 0.1,
) -> dict[str, np.ndarray]:
    """Cut documents into pairs ``start A separator B separator`` for next-sentence prediction.

    B follows A with probability 1/2 if the document has a sentence left for B; otherwise B comes
    from another document. Documents with few or long sentences thus have fewer pairs that follow:
    check the mean of ``follows``. Every sentence is in some pair. Sentences are added to a pair up
    to `length`; a pair that is too long loses tokens at random ends of its longer part.

    Shapes:
        Returns arrays by name: ``x``, ints (pairs, length); ``token_types``, (pairs, length), 0 for
            A with its special tokens and for padding, 1 for B with its separator; ``mask``,
            (pairs, length), False in the padding, on the right; ``follows``, ints (pairs,), 0 if B
            follows A and 1 if it does not.

    Args:
        documents: at least two sequences of sentences; a sentence is a sequence of ids.
        length: number of tokens of a pair, its three special tokens included; at least 5.
        start_token: the first id of a pair.
        separator_token: the id after A and after B.
        seed: seed of all random choices.
        padding_token: the id of the padding.
        short_rate: fraction of pairs with a random shorter target length, in [0, 1).

    Raises:
        LayerError: fewer than two documents with sentences; an empty sentence; `length` below 5.

    Example:
        >>> documents = [[[5, 6], [7, 8, 9]], [[3], [4, 4]]]
        >>> pairs = dp.text.sentence_pairs(documents, 10, start_token=1, separator_token=2, seed=0)
        >>> pairs["x"].shape[1], pairs["x"][:, 0].tolist() == [1] * len(pairs["x"])
        (10, True)

    Source: Devlin et al. 2018, arXiv:1810.04805, appendix A.2, and the paper's code.
    """
    check_count("length", length, least=5)
    check_fraction("short_rate", short_rate)
    full = [list(map(list, document)) for document in documents if len(document)]
    if len(full) < 2 or not all(all(document) for document in full):
        empty = sum(not all(document) for document in full)
        raise LayerError("at least two documents without empty sentences",
                         f"{len(full)}, {empty} with empty ones",
                         "add documents, and leave empty sentences out")
    rng = np.random.default_rng(seed)
    room = length - 3  # without the special tokens
    pairs = [pair for number in range(len(full))
             for pair in _pairs(full, number, room, rng, short_rate)]
    rng.shuffle(pairs)
    rows = {"x": np.full((len(pairs), length), padding_token, np.int32),
            "token_types": np.zeros((len(pairs), length), np.int32),
            "mask": np.zeros((len(pairs), length), bool),
            "follows": np.array([follows for _, _, follows in pairs], np.int32)}
    for i, (first, second, _) in enumerate(pairs):
        _truncate(first, second, room, rng)
        ids = [start_token, *first, separator_token, *second, separator_token]
        rows["x"][i, : len(ids)] = ids
        rows["token_types"][i, len(first) + 2 : len(ids)] = 1
        rows["mask"][i, : len(ids)] = True
    return rows


def _pairs(
    documents: list[list[list[int]]], number: int, room: int, rng: np.random.Generator,
    short_rate: float,
) -> Iterator[tuple[list[int], list[int], int]]:
    """The pairs (A, B, follows) with A from one document."""
    sentences, begin = documents[number], 0
    while begin < len(sentences):
        target = int(rng.integers(2, room + 1)) if rng.random() < short_rate else room
        end, size = begin, 0
        while end < len(sentences) and size < target:
            size += len(sentences[end])
            end += 1
        middle = begin + int(rng.integers(1, end - begin)) if end - begin > 1 else end
        first = _joined(sentences[begin:middle])
        if middle < end and rng.random() < 0.5:
            second, follows = sentences[middle:end], 0
            begin = end
        else:
            second, follows = _other_sentences(documents, number, target - len(first), rng), 1
            begin = middle  # the sentences that would have followed begin the next pair
        yield first, _joined(second), follows


def _other_sentences(
    documents: list[list[list[int]]], number: int, size: int, rng: np.random.Generator
) -> list[list[int]]:
    """Consecutive sentences of another document, about `size` tokens, from a random start."""
    at = int(rng.integers(len(documents) - 1))
    sentences = documents[at + (at >= number)]
    end = begin = int(rng.integers(len(sentences)))
    while end < len(sentences) and (end == begin or size > 0):
        size -= len(sentences[end])
        end += 1
    return sentences[begin:end]


def _joined(sentences: list[list[int]]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


def _truncate(first: list[int], second: list[int], room: int, rng: np.random.Generator) -> None:
    """Drop tokens at random ends of the longer part until both parts fit."""
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if rng.random() < 0.5 else -1)
