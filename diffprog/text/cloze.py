"""What BERT is trained on: text with hidden tokens, and pairs of sentences of which one follows.

Devlin, Chang, Lee, Toutanova 2018, arXiv:1810.04805, section 3.1 and appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import as_int32, check_array, check_count, check_share
from diffprog.core.errors import LayerError
from diffprog.core.notation import show
from diffprog.losses.entries import Mask, spread

__all__ = ["mask_tokens", "sentence_pairs"]

Sentence = Sequence[int]


def mask_tokens(
    key: jax.Array, ids: jax.Array, *, vocabulary: int, mask_token: int,
    special_tokens: Sequence[int] = (), rate: float = 0.15, mask: Mask = None,
) -> tuple[jax.Array, jax.Array]:
    """Hide tokens: of `rate` of them 80 % become `mask_token`, 10 % any token, 10 % stay.

    Of each row ``round(rate * n)`` tokens are chosen, and at least one, n being how many may be.

    Shapes:
        ids: ints (batch, time) in [0, vocabulary). mask: booleans (batch, time), True = real.
        Returns the text with hidden tokens, and the labels: the true ids where a token was chosen,
            -100 elsewhere; both int32, whatever ints the ids are.

    Args:
        key: other keys choose other tokens.
        vocabulary: how many tokens there are.
        mask_token: the id that stands for a hidden token.
        special_tokens: ids that are never chosen, such as those at the ends of sentences. They may
            still be drawn as any token.
        rate: share of tokens that are chosen, in [0, 1).
        mask: padding is never chosen.

    Raises:
        LayerError: ids are no ints (batch, time); mask_token or special_tokens lie outside the
            vocabulary.

    Example:
        >>> ids = jnp.arange(20).reshape(1, 20)
        >>> x, labels = dp.text.mask_tokens(jax.random.key(0), ids, vocabulary=21, mask_token=20)
        >>> int((labels != -100).sum()), bool((jnp.where(labels != -100, labels, x) == ids).all())
        (3, True)

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1 and appendix A.1.
    """
    check_share("rate", rate)
    check_count("vocabulary", vocabulary)
    check_array(ids, rank=2, axes="(batch, time)", floating=False)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim != 2:
        raise LayerError("ids as ints (batch, time)", show(ids), "give one row to each text")
    ids = as_int32(ids)  # -100 is a number of no unsigned dtype
    if any(not 0 <= token < vocabulary for token in (mask_token, *special_tokens)):
        raise LayerError(f"mask_token and special_tokens in [0, {vocabulary})",
                         f"{mask_token} and {tuple(special_tokens)}",
                         "give the numbers of tokens")
    order, how, drawn = jax.random.split(key, 3)
    free = ~jnp.isin(ids, jnp.asarray(special_tokens, ids.dtype))  # none of them: all are free
    if mask is not None:
        free &= spread(mask, ids.shape)
    count = free.sum(1, keepdims=True, dtype=jnp.int32)
    wanted = jnp.round(rate * count.astype(float)).astype(jnp.int32)
    count = jnp.clip(wanted, jnp.minimum(count, 1), count)
    lots = jnp.where(free, jax.random.uniform(order, ids.shape), 2.0)  # what is kept comes last
    ranks = jnp.argsort(jnp.argsort(lots, axis=1), axis=1).astype(jnp.int32)
    chosen = ranks < count
    share = jax.random.uniform(how, ids.shape)
    other = jax.random.randint(drawn, ids.shape, 0, vocabulary, ids.dtype)
    hidden = jnp.asarray(mask_token, ids.dtype)
    new = jnp.where(share < 0.8, hidden, jnp.where(share < 0.9, other, ids))
    return jnp.where(chosen, new, ids), jnp.where(chosen, ids, -100)


def sentence_pairs(
    documents: Sequence[Sequence[Sentence]], length: int, *, start_token: int,
    separator_token: int, seed: int, padding_token: int = 0, short_rate: float = 0.1,
) -> dict[str, np.ndarray]:
    """Cut documents into pairs ``start A separator B separator`` in which B may follow A.

    Where a document has a sentence left for B, it is B in half of the pairs; in all others B is of
    another document. So documents of few or long sentences give fewer pairs that follow: look at
    the mean of ``follows``. Every sentence is in some pair. A pair fills `length` as far as
    sentences go; what is too long loses tokens at a random end of the longer part.

    Shapes:
        Returns arrays by name: ``x``, ints (pairs, length); ``token_types``, 0 for A and its ends
            and 1 for B; ``mask``, False where padded behind; ``follows``, ints (pairs,), 0 where B
            follows A and 1 where it does not.

    Args:
        documents: each a sequence of sentences, each a sequence of ids; at least two documents.
        length: of a pair, with the three ids that are put around it; at least 5.
        start_token: the id that stands first, for the whole.
        separator_token: the id at the end of A and of B.
        seed: of all random choices.
        padding_token: the id that fills up.
        short_rate: share of the pairs that aim at a random shorter length, in [0, 1).

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
    check_share("short_rate", short_rate)
    full = [list(map(list, document)) for document in documents if len(document)]
    if len(full) < 2 or not all(all(document) for document in full):
        raise LayerError("at least two documents, of sentences that are not empty",
                         f"{len(full)}, {sum(not all(parts) for parts in full)} with empty ones",
                         "add documents, and leave empty sentences out")
    draw = np.random.default_rng(seed)
    room = length - 3
    pairs = [pair for at in range(len(full)) for pair in _pairs(full, at, room, draw, short_rate)]
    draw.shuffle(pairs)
    rows = {"x": np.full((len(pairs), length), padding_token, np.int32),
            "token_types": np.zeros((len(pairs), length), np.int32),
            "mask": np.zeros((len(pairs), length), bool),
            "follows": np.array([other for _, _, other in pairs], np.int32)}
    for i, (first, second, _) in enumerate(pairs):
        _cut(first, second, room, draw)
        ids = [start_token, *first, separator_token, *second, separator_token]
        rows["x"][i, : len(ids)] = ids
        rows["token_types"][i, len(first) + 2 : len(ids)] = 1
        rows["mask"][i, : len(ids)] = True
    return rows


def _pairs(
    documents: Any, number: int, room: int, draw: np.random.Generator, short_rate: float
) -> Any:
    """The pairs (A, B, 0 or 1) whose A is of one document."""
    sentences, begin = documents[number], 0
    while begin < len(sentences):
        aim = int(draw.integers(2, room + 1)) if draw.random() < short_rate else room
        end, size = begin, 0
        while end < len(sentences) and size < aim:
            size += len(sentences[end])
            end += 1
        between = begin + int(draw.integers(1, end - begin)) if end - begin > 1 else end
        first = [token for sentence in sentences[begin:between] for token in sentence]
        if between < end and draw.random() < 0.5:
            second, other = sentences[between:end], 0
            begin = end
        else:
            second, other = _elsewhere(documents, number, aim - len(first), draw), 1
            begin = between  # what would have followed begins the next pair
        yield first, [token for sentence in second for token in sentence], other


def _elsewhere(documents: Any, number: int, size: int, draw: np.random.Generator) -> Any:
    """Sentences of another document, about `size` tokens of them, from a random one on."""
    at = int(draw.integers(len(documents) - 1))
    other = documents[at + (at >= number)]
    end = begin = int(draw.integers(len(other)))
    while end < len(other) and (end == begin or size > 0):
        size -= len(other[end])
        end += 1
    return other[begin:end]


def _cut(first: list[int], second: list[int], room: int, draw: np.random.Generator) -> None:
    """Drop tokens of the longer part, at either end, until both fit."""
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        longer.pop(0 if draw.random() < 0.5 else -1)
