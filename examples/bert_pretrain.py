"""Pretrain a small BERT on the standard library's help texts, and draw which words it holds near.

    python examples/bert_pretrain.py [--steps N] [--seed N] [--out bert_pretrain.png]

Data: the topics of `pydoc_data.topics`, every tenth of which is held out; the vocabulary is the
thousand commonest words of the others and all their characters, by which other words are spelled.
Two sentences stand side by side, some tokens are hidden, and the net guesses these and whether the
second follows the first. Prints guesses on held-out sentences, and draws a map of the commonest
words, the learning curves, and the nearest words of eight.

Takes about three minutes on two cores (four of CPU time). Expected: 35.3 % of the hidden
tokens of held-out documents, where always guessing the commonest gets 7.3 %, and a perplexity of
22.3 where frequencies alone have 129.6; whether the second sentence follows is harder to learn from
so little text: 61.8 %, where chance is 50 %. Sizes, rate and steps were chosen on every tenth of
the training documents.
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
import matplotlib
import numpy as np
import optax
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.manifold import TSNE

import diffprog as dp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH, BATCH, WIDTH, DEPTH, HEADS = 64, 16, 96, 2, 4
WORDS = 1000
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
PADDING, START, SEPARATOR, HIDDEN = range(4)
Words = list[list[str]]  # the sentences of a document
Ids = list[list[int]]
Batch = dict[str, Any]


def documents() -> list[Words]:
    """The topics as sentences of words; a paragraph that several topics share comes once."""
    seen, found = set[str](), []
    for _, text in sorted(pydoc_data.topics.topics.items()):
        sentences: list[str] = []
        for paragraph in re.split(r"\n\s*\n", text.lower()):
            # Underlines and tables are no language.
            lines = [line for line in paragraph.split("\n") if not re.match(r"[|+]|\W*$", line)]
            content = " ".join(" ".join(lines).split())
            if content and content not in seen:
                seen.add(content)
                sentences += re.split(r"(?<=[.:;!?]) ", content)
        if sentences:
            found.append([re.findall(r"[^\W\d]+|\S", sentence) for sentence in sentences])
    return found


def vocabulary(text: Sequence[Words]) -> list[str]:
    """The tokens: special ones, every character, and the commonest words, common ones first."""
    count = collections.Counter(word for document in text for line in document for word in line)
    characters = sorted({character for word in count for character in word})
    words = [word for word, _ in count.most_common() if len(word) > 1]
    return [*SPECIAL, *characters, *words[:WORDS]]


def encode(document: Words, tokens: Sequence[str]) -> Ids:
    """Numbers of words. Other words are spelled; characters never seen in training are dropped."""
    number = {token: i for i, token in enumerate(tokens)}
    parts = [[part for word in line for part in ([word] if word in number else word)]
             for line in document]
    lines = [[number[part] for part in line if part in number] for line in parts]
    return [line for line in lines if line]


def evened(pairs: Batch) -> Batch:
    """Pairs that follow and pairs that do not, in turn; those of one kind left over are dropped."""
    kinds = [np.flatnonzero(pairs["follows"] == kind) for kind in (0, 1)]
    rows = np.array(list(zip(*kinds, strict=False))).ravel()
    return {name: values[rows] for name, values in pairs.items()}


def batches(text: Sequence[Ids], size: int, seed: int, *, even: bool = False) -> Iterator[Batch]:
    """Endless pairs with hidden tokens; each epoch cuts the text elsewhere and hides others."""
    hide = jax.jit(functools.partial(
        dp.text.mask_tokens, vocabulary=size, mask_token=HIDDEN,
        special_tokens=range(len(SPECIAL))))
    key = jax.random.key(seed)
    for epoch in itertools.count():
        pairs = dp.text.sentence_pairs(text, LENGTH, start_token=START, separator_token=SEPARATOR,
                                  padding_token=PADDING, seed=1000 * seed + epoch)
        pairs = evened(pairs) if even else pairs
        follows = pairs.pop("follows")
        for batch, order in dp.batches((pairs, follows), BATCH):
            if len(order) == BATCH:  # the few pairs left over come elsewhere in the next epoch
                key, now = jax.random.split(key)
                x, labels = hide(now, batch["x"], mask=batch["mask"])
                yield batch | {"x": x, "y": (labels, order)}


def waves(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Positions begin as sines and cosines, as far apart as words begin: neighbours are alike."""
    steps, features = shape
    angles = jnp.arange(steps)[:, None] / 200 ** jnp.linspace(0, 1, features // 2)
    return (jnp.hstack([jnp.sin(angles), jnp.cos(angles)]) * (2 / features) ** 0.5).astype(dtype)


def reader(size: int) -> dp.Layer:
    """A BERT, but for the values that its positions begin with: it learns sooner from little."""
    net = dp.models.bert_pretraining(size, length=LENGTH, width=WIDTH, depth=DEPTH, heads=HEADS)
    positions = dp.learned_positions(LENGTH, embedding_init=waves)
    return dp.replace(net, "encoder/positions", positions)


def unigram(learn: Sequence[Ids], held: Sequence[Batch], size: int) -> tuple[float, float]:
    """What frequencies alone reach on the hidden tokens: share of the commonest, and loss."""
    seen = [i for document in learn for line in document for i in line]
    count = np.bincount(seen, minlength=size) + 1
    labels = np.concatenate([batch["y"][0][batch["y"][0] != -100] for batch in held])
    loss = -np.log(count / count.sum())[labels].mean()
    return float((labels == count.argmax()).mean()), float(loss)


def show_guesses(net: dp.Layer, fit: dp.training.Fit, held: Sequence[Ids],
    tokens: list[str]) -> None:
    """Print some held-out sentences with a hidden word, and what the net makes of them."""
    draw = np.random.default_rng(0)
    long = {i for i, token in enumerate(tokens) if i > HIDDEN and len(token) > 2}
    lines = [line for document in held for line in document
             if len(line) <= 24 and sum(i in long for i in line) >= 8]
    for at in draw.choice(len(lines), min(6, len(lines)), replace=False):
        ids = np.array([START, *lines[at], SEPARATOR])
        place = int(draw.choice([i for i, token in enumerate(ids) if token in long]))
        true, ids[place] = tokens[ids[place]], HIDDEN
        scores, _ = dp.predict(net, fit.state.params, ids[None], state=fit.state.state)
        chances = np.asarray(jax.nn.softmax(scores[0, place]))
        best = [f"{tokens[i]} {chances[i]:.0%}" for i in (-chances).argsort()[:4]]
        print(" ".join(tokens[i] for i in ids[1:-1]))
        print(f"    guesses: {', '.join(best)}   true: {true}")


def apart(places: np.ndarray, words: Sequence[str]) -> np.ndarray:
    """Move labels up and down until no two overlap."""
    half = np.array([(0.0068 * len(word) + 0.004, 0.0105) for word in words])
    for _ in range(500):
        gap = places[:, None] - places
        room = half[:, None] + half - abs(gap)
        hit = (room > 0).all(-1) & ~np.eye(len(words), dtype=bool)
        side = np.sign(np.arange(len(words))[:, None] - np.arange(len(words)))
        push = np.where(gap[..., 1] == 0, side, np.sign(gap[..., 1])) * room[..., 1]
        places = places + np.stack([0 * places[:, 0], 0.25 * (push * hit).sum(1)], 1)
    return places


def draw_map(axes: Any, vectors: np.ndarray, words: Sequence[str]) -> None:
    """Words in the plane, near where their vectors are; colours are eight clusters."""
    places = TSNE(metric="cosine", init="pca", perplexity=10, random_state=0).fit_transform(vectors)
    places = (places - places.min(0)) / np.ptp(places, axis=0)
    groups = KMeans(8, random_state=0).fit_predict(vectors)
    for word, (x, y), group in zip(words, apart(places, words), groups, strict=True):
        axes.text(x, y, word, ha="center", va="center", size=8.5, weight="bold",
                  color=plt.get_cmap("Dark2")(group))
    axes.set(title=f"The {len(words)} commonest words, by their vectors", xlim=(-0.05, 1.05),
             ylim=(-0.05, 1.05), xticks=[], yticks=[])


def draw_curves(places: Any, history: Sequence[dict[str, float]], base: Any) -> None:
    """Accuracy and loss on hidden tokens, beside what frequencies alone reach."""
    steps = [row["step"] for row in history]
    for axes, name, line in zip(places, ("token_accuracy", "token_loss"), base, strict=True):
        axes.plot(steps, [row[name] for row in history], label="training")
        axes.plot(steps, [row[f"validation/{name}"] for row in history], label="held out")
        axes.axhline(line, color="gray", linestyle="--", label="unigram guess")
        axes.set(title=f"Hidden tokens: {name[6:]}", xlabel="step")
    places[0].legend()


def draw_neighbours(places: Any, vectors: np.ndarray, words: Sequence[str]) -> None:
    """Five nearest words of each of the commonest words with content, by cosine."""
    near = vectors @ vectors.T
    content = [i for i, word in enumerate(words)
               if len(word) > 3 and word not in ENGLISH_STOP_WORDS]
    for axes, i in zip(places, content, strict=False):
        best = (-near[i]).argsort()[1:6]
        axes.barh(range(5), near[i, best], color="#9ecae1")
        for row, j in enumerate(best):
            axes.text(0.03, row, words[j], va="center", size=9)
        axes.set(xlim=(0, 1), yticks=[])
        axes.set_title(words[i], size=11, weight="bold")
        axes.invert_yaxis()


def draw(path: pathlib.Path, fit: dp.training.Fit, tokens: list[str], base: Any) -> None:
    """A map of words, the learning curves, and the nearest words of eight."""
    first = len(tokens) - WORDS
    words = tokens[first : first + 400]
    table = np.asarray(fit.state.params["encoder"]["embed"]["embedding"])[first : first + 400]
    table = table - table.mean(0)  # what all words share says nothing
    vectors = table / np.linalg.norm(table, axis=1, keepdims=True)
    figure = plt.figure(figsize=(16, 10), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    draw_map(parts[0].subplots(), vectors[:150], words[:150])
    top, bottom = parts[1].subfigures(2, 1, height_ratios=(1, 1.6))
    draw_curves(top.subplots(1, 2), fit.history, base)
    bottom.suptitle("Nearest words, by the cosine of their vectors")
    draw_neighbours(bottom.subplots(2, 4, sharex=True).flat, vectors, words)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train, measure, guess and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bert_pretrain.png"))
    given = parser.parse_args()

    text = documents()
    seen = [document for i, document in enumerate(text) if i % 10 != 9]
    tokens = vocabulary(seen)
    size = len(tokens)
    learn = [encode(document, tokens) for document in seen]
    unseen = [encode(document, tokens) for document in text[9::10]]
    held = list(itertools.islice(batches(unseen, size, seed=0, even=True), 64))
    base = unigram(learn, held, size)

    net = reader(size)
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    print(dp.summary(net, ids))
    schedule = optax.cosine_onecycle_schedule(given.steps, 3e-3, pct_start=0.15)
    step = dp.make_step(net, dp.text.masked_language(), optax.adamw(schedule, weight_decay=1e-2))
    # The held-out documents are watched for the picture; nothing is chosen by them.
    fit = dp.fit(step, batches(learn, size, given.seed), key=jax.random.key(given.seed),
                 steps=given.steps, log_every=max(given.steps // 25, 10), validation=held[:12])

    show_guesses(net, fit, unseen, tokens)
    draw(given.out, fit, tokens, base)
    found = dp.evaluate(step, fit.state, held)
    order = np.concatenate([batch["y"][1] for batch in held])
    chance = max(order.mean(), 1 - order.mean())
    print(f"picture: {given.out}")
    print(f"perplexity of hidden tokens: {np.exp(found['token_loss']):.1f}, "
          f"by frequencies alone {np.exp(base[1]):.1f}")
    print(f"masked tokens: {100 * found['token_accuracy']:.1f} % right, "
          f"unigram guess {100 * base[0]:.1f} % (held-out documents)")
    print(f"next sentence: {100 * found['follows_accuracy']:.1f} % right, "
          f"chance {100 * chance:.1f} %")


if __name__ == "__main__":
    main()
