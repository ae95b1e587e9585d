"""Byte pairs in thirty lines, and one BERT on words, on pieces and on characters.

    python examples/course/tokens.py [--short] [--seed N] [--out FOLDER]

What is comparable? Not the loss per token, as a token is a word for one net and a letter for
another. So the same words of the same lines are masked for all three, each in all its tokens, and
two figures count: how many words are restored exactly, and the bits of a masked word divided by
its characters. A word outside the vocabulary counts as not restored, and its spelling is charged
by the frequencies of characters. One advantage stays: pieces and characters are told by the
number of masks how long the word is.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import text
from experiment import Experiment, run
from style import COLORS, figure

import diffprog as dp

PAD, MASK, UNKNOWN = range(3)
LINES = 16  # that are evaluated at once
CHARACTERS, WIDTH, BATCH, RATE = 72, 48, 32, 0.15  # of a line; of the vectors; lines; masked words
Spelling = dict[str, tuple[str, ...]]  # word -> its tokens


def characters(words: list[str]) -> Spelling:
    """Each word as its characters; the first one has a space before it."""
    return {word: (" " + word[0], *word[1:]) for word in set(words)}


def byte_pairs(words: list[str], merges: int) -> tuple[Spelling, list[tuple[str, str]]]:
    """Join the most frequent pair of neighbouring tokens everywhere, again and again.

    Sennrich et al. 2016, arXiv:1508.07909, algorithm 1. Returns the spelling of each word, and the
    pairs in the order in which they were joined.
    """
    count, spelling, learned = Counter(words), characters(words), []
    for _ in range(merges):
        pairs = Counter()
        for word, tokens in spelling.items():
            for pair in itertools.pairwise(tokens):
                pairs[pair] += count[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learned.append(best)
        for word, tokens in spelling.items():
            if best[0] in tokens and best[1] in tokens:
                spelling[word] = joined(tokens, best)
    return spelling, learned


def joined(tokens: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The tokens, with this pair of neighbours as one token wherever it occurs."""
    found: list[str] = []
    for token in tokens:
        if found and (found[-1], token) == pair:
            found[-1] += token
        else:
            found.append(token)
    return tuple(found)


def lines(words: list[str]) -> list[list[str]]:
    """The words, in lines of at most CHARACTERS."""
    found, room = [[]], CHARACTERS
    for word in (word for word in words if len(word) < CHARACTERS):
        if len(word) > room:
            found.append([])
            room = CHARACTERS
        found[-1].append(word)
        room -= len(word)
    return found


class Encoded:
    """Lines as ids (lines, tokens), and the number of the word that each token belongs to."""

    def __init__(self, text: list[list[str]], spelling: Spelling, known: dict[str, int]) -> None:
        rows = [[(known.get(token, UNKNOWN), number) for number, word in enumerate(line)
                 for token in spelling[word]] for line in text]
        self.ids, self.word = np.zeros((2, len(rows), max(map(len, rows))), np.int32)
        for i, row in enumerate(rows):
            self.ids[i, : len(row)], self.word[i, : len(row)] = np.transpose(row)

    def batch(self, rows: Any, masked_words: np.ndarray) -> dict[str, np.ndarray]:
        """Some lines, with words (rows, words) masked in all their tokens."""
        ids, valid = self.ids[rows], self.ids[rows] != PAD
        masked = np.take_along_axis(masked_words, self.word[rows], 1) & valid
        return {"x": np.where(masked, MASK, ids), "y": ids, "mask": valid, "target_mask": masked}


def bert(vocabulary: int, length: int) -> dp.Layer:
    """A small BERT with a score for each token of the vocabulary at each step."""
    @dp.program(encoder=dp.models.bert(vocabulary, length=length, width=WIDTH, depth=2, heads=4,
                                       kernel_init="lecun_normal"), down=dp.linear(WIDTH))
    def net(layers: Any, x: jax.Array) -> jax.Array:
        y, _ = layers.encoder(x)
        return dp.unembed(layers.encoder.params["embed"], layers.down(y))

    return dp.replace(net, "encoder/embed", dp.embedding(vocabulary, WIDTH))


@functools.partial(jax.jit, static_argnums=0)
def read(net: dp.Layer, params: Any, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The bits of each token of the batch, and the most likely tokens."""
    logits = net(params, batch["x"], mask=batch["mask"])
    bits = dp.losses.cross_entropy(logits, batch["y"], reduction="none") / jnp.log(2)
    return bits, logits.argmax(-1)


def main(experiment: Experiment) -> None:
    """Learn byte pairs, train three nets on the same masked words, and compare them."""
    rng, steps = experiment.rng, experiment.pick(400, 50)
    words = re.findall(r"[a-z_]+|\S", text().lower())
    words = words[: experiment.pick(60_000, 8_000)]
    pieces, pairs = byte_pairs(words, experiment.pick(400, 40))
    spellings = {"words": {word: (word,) for word in set(words)}, "pieces": pieces,
                 "characters": characters(words)}
    found = lines(words)
    held_out_lines, training = found[::10], [line for i, line in enumerate(found) if i % 10]
    test = held_out_lines[: len(held_out_lines) // LINES * LINES]
    longest = max(map(len, found))
    masked_test = rng.random((len(test), longest)) < RATE
    chosen = [(rng.integers(len(training), size=BATCH), rng.random((BATCH, longest)) < RATE)
              for _ in range(steps)]

    letters = Counter(token for line in training for word in line
                      for token in spellings["characters"][word])
    bits_of = {token: -np.log2(count / letters.total()) for token, count in letters.items()}
    restored, bits, tokens_per_word = {}, {}, {}
    for kind in experiment.pick(list(spellings), ["words", "characters"]):
        spelling = spellings[kind]
        count = Counter(token for line in training for word in line for token in spelling[word])
        known = {token: i for i, (token, _) in enumerate(count.most_common(1500), UNKNOWN + 1)}
        trained_on, held_out = (Encoded(part, spelling, known) for part in (training, test))
        step = dp.make_step(bert(UNKNOWN + 1 + len(known), trained_on.ids.shape[1] + 8),
                            dp.classification(), optax.adam(3e-3))
        batches = [trained_on.batch(*each) for each in chosen]
        state = dp.fit(step, batches, key=experiment.key, steps=steps, progress=False).state

        batch = held_out.batch(slice(None), masked_test)
        parts = [jax.tree.map(lambda a, i=i: a[i : i + LINES], batch)
                 for i in range(0, len(test), LINES)]
        scores = [jax.device_get(read(step.net, state.params, part)) for part in parts]
        per_token, best = (np.concatenate(each) for each in zip(*scores, strict=True))
        right = (best == batch["y"]) & (batch["y"] != UNKNOWN)
        hits, cost, length = [], 0.0, 0
        for row, line in enumerate(test):
            for number in np.flatnonzero(masked_test[row, : len(line)]):
                own = (held_out.word[row] == number) & batch["mask"][row]
                hits.append(right[row][own].all())
                cost += per_token[row][own].sum()
                length += len(line[number])
                if UNKNOWN in batch["y"][row][own]:
                    cost += sum(bits_of.get(token, 12.0)
                                for token in spellings["characters"][line[number]])
        restored[kind], bits[kind] = 100 * np.mean(hits), cost / length
        tokens_per_word[kind] = np.mean([len(spelling[word]) for word in words])
        experiment.record(f"tokens in the vocabulary, {kind}", len(known))
        experiment.record(f"tokens per word, {kind}", tokens_per_word[kind])
        experiment.record(f"masked words restored exactly, {kind}, percent", restored[kind])
        experiment.record(f"bits per character of masked words, {kind}", bits[kind])

    drawn = figure(10, 4, "The same BERT on words, pieces and characters")
    for axes, (title, values) in zip(drawn.subplots(1, 3), {
            "Tokens per word": tokens_per_word, "Masked words restored (percent)": restored,
            "Bits per character": bits}.items(), strict=True):
        bars = axes.bar(list(values), list(values.values()), color=COLORS)
        axes.bar_label(bars, fmt="%.2f")
        axes.set(title=title)
    experiment.save(drawn, "tokens", "Three ways to cut a text: length, accuracy and code length.")
    print("first pairs:", ", ".join(repr(a + b) for a, b in pairs[:20]))

    experiment.claim("The sequences of characters are at least twice as long as those of words.",
                     tokens_per_word["characters"] > 2 * tokens_per_word["words"])
    experiment.claim("With as many steps the net of words needs the fewest bits per character.",
                     min(bits, key=lambda kind: bits[kind]) == "words")


if __name__ == "__main__":
    run(main)
