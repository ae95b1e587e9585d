"""Pretrain a small BERT on the standard library's help texts, and draw its word embeddings.

    python examples/bert_pretrain.py [--steps N] [--seed N] [--out bert_pretrain.png]

Data: the topics of `pydoc_data.topics`, every tenth of which is held out; the vocabulary is the
thousand most frequent words of the others and all their characters, which spell other words. An
example is two sentences with some tokens masked; the net predicts these tokens, and whether the
second sentence follows the first. Prints predictions on held-out sentences, and draws a map of the
most frequent words, the learning curves, and the nearest neighbours of eight words.

Takes about three minutes on two cores (four of CPU time). Expected: 35.3 % of the masked tokens of
held-out documents are predicted correctly (the most frequent token: 7.3 %), with a perplexity of
22.3 (unigram frequencies: 129.6). Next-sentence prediction is harder to learn from so little text:
61.8 % are correct, where chance is 50 %. Sizes, learning rate and steps were chosen on every tenth
of the training documents.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import pathlib
import pydoc_data.topics
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.manifold import TSNE
from style import plt

import diffprog as dp

LENGTH, BATCH, WIDTH, DEPTH, HEADS = 64, 16, 96, 2, 4
WORDS = 1000
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
PAD, CLS, SEP, MASK = range(4)
Words = list[list[str]]  # the sentences of a document
Ids = list[list[int]]
Batch = dict[str, Any]


def documents() -> list[Words]:
    """The topics as sentences of words; a paragraph of several topics is kept in the first."""
    seen, found = set[str](), []
    for _, text in sorted(pydoc_data.topics.topics.items()):
        sentences: list[str] = []
        for paragraph in re.split(r"\n\s*\n", text.lower()):
            # Underlines and rows of tables are dropped.
            lines = [line for line in paragraph.split("\n") if not re.match(r"[|+]|\W*$", line)]
            content = " ".join(" ".join(lines).split())
            if content and content not in seen:
                seen.add(content)
                sentences += re.split(r"(?<=[.:;!?]) ", content)
        if sentences:
            found.append([re.findall(r"[^\W\d]+|\S", sentence) for sentence in sentences])
    return found


def vocabulary(text: Sequence[Words]) -> list[str]:
    """The special tokens, every character, and the most frequent words by falling frequency."""
    count = collections.Counter(word for document in text for line in document for word in line)
    characters = sorted({character for word in count for character in word})
    words = [word for word, _ in count.most_common() if len(word) > 1]
    return [*SPECIAL, *characters, *words[:WORDS]]


def encode(document: Words, tokens: Sequence[str]) -> Ids:
    """Token ids of the sentences of a document.

    Words outside the vocabulary are spelled; characters outside it are dropped.
    """
    index = {token: i for i, token in enumerate(tokens)}
    parts = [[part for word in line for part in ([word] if word in index else word)]
             for line in document]
    lines = [[index[part] for part in line if part in index] for line in parts]
    return [line for line in lines if line]


def balanced(pairs: Batch) -> Batch:
    """Pairs that follow and pairs that do not, in turn; the surplus of one kind is dropped."""
    kinds = [np.flatnonzero(pairs["follows"] == kind) for kind in (0, 1)]
    rows = np.array(list(zip(*kinds, strict=False))).ravel()
    return {name: values[rows] for name, values in pairs.items()}


def batches(text: Sequence[Ids], size: int, seed: int, *, balance: bool = False) -> Iterator[Batch]:
    """Endless batches of sentence pairs with masked tokens; each epoch draws other pairs."""
    mask_tokens = jax.jit(functools.partial(
        dp.text.mask_tokens, vocabulary=size, mask_token=MASK,
        special_tokens=range(len(SPECIAL))))
    key = jax.random.key(seed)
    for epoch in itertools.count():
        pairs = dp.text.sentence_pairs(text, LENGTH, start_token=CLS, separator_token=SEP,
                                  padding_token=PAD, seed=1000 * seed + epoch)
        pairs = balanced(pairs) if balance else pairs
        follows = pairs.pop("follows")
        for batch, order in dp.batches((pairs, follows), BATCH):
            if len(order) == BATCH:  # a smaller last batch is dropped
                key, now = jax.random.split(key)
                x, labels = mask_tokens(now, batch["x"], mask=batch["mask"])
                yield batch | {"x": x, "y": (labels, order)}


def sinusoids(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initial positions: sines and cosines of the scale of the initial word embeddings."""
    steps, features = shape
    angles = jnp.arange(steps)[:, None] / 200 ** jnp.linspace(0, 1, features // 2)
    return (jnp.hstack([jnp.sin(angles), jnp.cos(angles)]) * (2 / features) ** 0.5).astype(dtype)


def bert(size: int) -> dp.Layer:
    """A BERT with other initial values, with which it learns faster from little text.

    Variances are one over the number of inputs, as the 0.02 of the paper is small at this width,
    and initial positions are sinusoids.
    """
    net = dp.models.bert_pretraining(size, length=LENGTH, width=WIDTH, depth=DEPTH, heads=HEADS,
                                     kernel_init="lecun_normal")
    tables = {"embed": dp.embedding(size, WIDTH), "types": dp.embedding(2, WIDTH),
              "positions": dp.learned_positions(LENGTH, embedding_init=sinusoids)}
    for name, table in tables.items():
        net = dp.replace(net, f"encoder/{name}", table)
    return net


def unigram_scores(
    training: Sequence[Ids], held_out: Sequence[Batch], size: int
) -> tuple[float, float]:
    """On the masked tokens, accuracy of the most frequent token and loss of token frequencies."""
    ids = [i for document in training for line in document for i in line]
    count = np.bincount(ids, minlength=size) + 1
    labels = np.concatenate([batch["y"][0][batch["y"][0] != -100] for batch in held_out])
    loss = -np.log(count / count.sum())[labels].mean()
    return float((labels == count.argmax()).mean()), float(loss)


def show_predictions(
    net: dp.Layer, fit: dp.training.Fit, held_out: Sequence[Ids], tokens: list[str]
) -> None:
    """Print some held-out sentences with one masked word, and predictions for it."""
    rng = np.random.default_rng(0)
    long = {i for i, token in enumerate(tokens) if i > MASK and len(token) > 2}
    lines = [line for document in held_out for line in document
             if len(line) <= 24 and sum(i in long for i in line) >= 8]
    for row in rng.choice(len(lines), min(6, len(lines)), replace=False):
        ids = np.array([CLS, *lines[row], SEP])
        position = int(rng.choice([i for i, token in enumerate(ids) if token in long]))
        target, ids[position] = tokens[ids[position]], MASK
        scores, _ = dp.predict(net, fit.state.params, ids[None], state=fit.state.state)
        probabilities = np.asarray(jax.nn.softmax(scores[0, position]))
        best = [f"{tokens[i]} {probabilities[i]:.0%}" for i in (-probabilities).argsort()[:4]]
        print(" ".join(tokens[i] for i in ids[1:-1]))
        print(f"    predictions: {', '.join(best)}   target: {target}")


def separated(positions: np.ndarray, words: Sequence[str]) -> np.ndarray:
    """Move labels up and down until no two overlap."""
    half = np.array([(0.0068 * len(word) + 0.004, 0.0105) for word in words])
    for _ in range(500):
        gap = positions[:, None] - positions
        room = half[:, None] + half - abs(gap)
        hit = (room > 0).all(-1) & ~np.eye(len(words), dtype=bool)
        side = np.sign(np.arange(len(words))[:, None] - np.arange(len(words)))
        push = np.where(gap[..., 1] == 0, side, np.sign(gap[..., 1])) * room[..., 1]
        positions = positions + np.stack([0 * positions[:, 0], 0.25 * (push * hit).sum(1)], 1)
    return positions


def draw_map(axes: Any, vectors: np.ndarray, words: Sequence[str]) -> None:
    """Words in the plane, placed by t-SNE of their embeddings and coloured by cluster."""
    tsne = TSNE(metric="cosine", init="pca", perplexity=10, random_state=0)
    positions = tsne.fit_transform(vectors)
    positions = (positions - positions.min(0)) / np.ptp(positions, axis=0)
    groups = KMeans(8, random_state=0).fit_predict(vectors)
    for word, (x, y), group in zip(words, separated(positions, words), groups, strict=True):
        axes.text(x, y, word, ha="center", va="center", size=8.5, weight="bold",
                  color=plt.get_cmap("Dark2")(group))
    axes.set(title=f"Embeddings of the {len(words)} most frequent words (t-SNE)",
             xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=[], yticks=[])


def draw_curves(grid: Any, history: Sequence[dict[str, float]], baseline: Any) -> None:
    """Accuracy and loss on masked tokens, beside those of token frequencies."""
    steps = [row["step"] for row in history]
    for axes, name, line in zip(grid, ("token_accuracy", "token_loss"), baseline, strict=True):
        axes.plot(steps, [row[name] for row in history], label="training")
        axes.plot(steps, [row[f"validation/{name}"] for row in history], label="held out")
        axes.axhline(line, color="gray", linestyle="--", label="unigram frequencies")
        axes.set(title=f"Masked tokens: {name[6:]}", xlabel="step")
    grid[0].legend()


def draw_neighbours(grid: Any, vectors: np.ndarray, words: Sequence[str]) -> None:
    """The five nearest words of each of the most frequent content words, by cosine similarity."""
    similarity = vectors @ vectors.T
    content = [i for i, word in enumerate(words)
               if len(word) > 3 and word not in ENGLISH_STOP_WORDS]
    for axes, i in zip(grid, content, strict=False):
        best = (-similarity[i]).argsort()[1:6]
        axes.barh(range(5), similarity[i, best], color="#9ecae1")
        for row, j in enumerate(best):
            axes.text(0.03, row, words[j], va="center", size=9)
        axes.set(xlim=(0, 1), yticks=[])
        axes.set_title(words[i], size=11, weight="bold")
        axes.invert_yaxis()


def draw(path: pathlib.Path, fit: dp.training.Fit, tokens: list[str], baseline: Any) -> None:
    """A map of words, the learning curves, and the nearest neighbours of eight words."""
    first = len(tokens) - WORDS
    words = tokens[first : first + 400]
    table = np.asarray(fit.state.params["encoder"]["embed"]["embedding"])[first : first + 400]
    table = table - table.mean(0)  # a common offset would dominate cosines
    vectors = table / np.linalg.norm(table, axis=1, keepdims=True)
    figure = plt.figure(figsize=(16, 10))
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    draw_map(parts[0].subplots(), vectors[:150], words[:150])
    top, bottom = parts[1].subfigures(2, 1, height_ratios=(1, 1.6))
    draw_curves(top.subplots(1, 2), fit.history, baseline)
    bottom.suptitle("Nearest words, by cosine similarity of embeddings")
    draw_neighbours(bottom.subplots(2, 4, sharex=True).flat, vectors, words)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train, predict, evaluate and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bert_pretrain.png"))
    args = parser.parse_args()

    text = documents()
    training_text = [document for i, document in enumerate(text) if i % 10 != 9]
    tokens = vocabulary(training_text)
    size = len(tokens)
    training = [encode(document, tokens) for document in training_text]
    held_documents = [encode(document, tokens) for document in text[9::10]]
    held_out = list(itertools.islice(batches(held_documents, size, seed=0, balance=True), 64))
    baseline = unigram_scores(training, held_out, size)

    net = bert(size)
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    print(dp.summary(net, ids))
    schedule = optax.cosine_onecycle_schedule(args.steps, 3e-3, pct_start=0.15)
    step = dp.make_step(net, dp.text.masked_language(), optax.adamw(schedule, weight_decay=1e-2))
    # Held-out documents are evaluated here for the picture only; no choice depends on them.
    fit = dp.fit(step, batches(training, size, args.seed), key=jax.random.key(args.seed),
                 steps=args.steps, log_every=max(args.steps // 25, 10), validation=held_out[:12])

    show_predictions(net, fit, held_documents, tokens)
    draw(args.out, fit, tokens, baseline)
    found = dp.evaluate(step, fit.state, held_out)
    order = np.concatenate([batch["y"][1] for batch in held_out])
    chance = max(order.mean(), 1 - order.mean())
    print(f"picture: {args.out}")
    print(f"perplexity of masked tokens: {np.exp(found['token_loss']):.1f}, "
          f"unigram frequencies {np.exp(baseline[1]):.1f}")
    print(f"masked tokens: {100 * found['token_accuracy']:.1f} % correct, "
          f"most frequent token {100 * baseline[0]:.1f} % (held-out documents)")
    print(f"next sentence: {100 * found['follows_accuracy']:.1f} % correct, "
          f"chance {100 * chance:.1f} %")


if __name__ == "__main__":
    main()
