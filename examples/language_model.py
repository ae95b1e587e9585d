"""Train a language model on Python's help texts, character by character.

    python examples/language_model.py [--model gpt|llama|lstm|gru] [--text FILE] [--steps N]
                                      [--seed N] [--out language_model.png]

Takes about three minutes on two cores, and ends with

    unigram 4.58, trigram 2.36, gpt 1.478 bits per character on the last 5 %
    unigram 4.68, trigram 2.51, gpt 1.470 bits per character on every 20th block

It prints samples during training, and draws the learning curve, the samples, and the negative
log-likelihood of each character at the end of the text. Of the other models, gru reaches 1.461 and
1.375 in more steps; in shorter runs llama reaches 1.513 and 1.534, with `--steps 500`, and lstm
1.945 and 2.004, with `--steps 200`.

Data: the help texts of the standard library (`pydoc_data.topics`), 465,048 characters in Python
3.11, or a file of UTF-8 text. The last 5 % of the characters are held out, and of the rest every
20th block of 2,048; no training window overlaps with either. The texts contain repetitions: 36 %
and 48 % of the held-out characters are in a run of 64 that occurs elsewhere too, so a 5-gram model,
`ngram_bits(text, 5)`, reaches 1.70 and 1.61 bits.

Window length, optimizer and learning rates were chosen for gpt in runs of 500 steps, on parts of
the training text that these runs excluded: the 5 % before the last, and the blocks halfway between
the held-out ones. No choice depends on the held-out text.
"""

from __future__ import annotations

import argparse
import pathlib
import pydoc_data.topics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from style import plt

import diffprog as dp

LENGTH, BATCH, WIDTH = 64, 32, 128
BLOCK, EVERY = 2048, 20
TRAINING, TAIL, BLOCKS = 0, 1, 2  # the part of a character
HOLDOUTS = {TAIL: "the last 5 %", BLOCKS: f"every {EVERY}th block"}
STAGES, PROMPT = 5, "The statement "
NEWLINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"  # shows a newline in the picture


class Text(NamedTuple):
    """A text as ids of its characters, and the part of each: training or held out."""

    alphabet: str
    ids: np.ndarray
    part: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        """Ids of characters; those outside the alphabet have the id `len(alphabet)`."""
        numbers = {character: i for i, character in enumerate(self.alphabet)}
        return np.array([numbers.get(character, len(self.alphabet)) for character in text])

    def decode(self, ids: Any) -> str:
        """The characters of ids."""
        return "".join((self.alphabet + "\N{REPLACEMENT CHARACTER}")[i] for i in np.asarray(ids))


def read(path: pathlib.Path | None) -> str:
    """The text of a file, or the help of the standard library; errors are one line."""
    if path is None:
        topics = pydoc_data.topics.topics
        return "\n".join(topics[name] for name in sorted(topics))
    remedy = "choose a file of UTF-8 text"
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise SystemExit(f"{path}: wants a readable file, got {error.strerror}; {remedy}") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise SystemExit(f"{path}: wants UTF-8 text, got {byte}; {remedy}") from None
    if "\0" in text:
        raise SystemExit(f"{path}: wants text, got NUL at {text.index(chr(0))}; {remedy}")
    least = -(-BLOCK * EVERY * 20 // 19)
    if len(text) < least:
        raise SystemExit(f"{path}: wants at least {least} characters ({EVERY} blocks of {BLOCK}, "
                         f"and the last 5 %), got {len(text)}; choose a longer text")
    return text


def split(text: str) -> Text:
    """Hold out the last 5 %, and of the rest every 20th block; the alphabet is that of the rest."""
    positions = np.arange(len(text))
    part = np.where(positions // BLOCK % EVERY == EVERY - 1, BLOCKS, TRAINING)
    part[len(text) - len(text) // 20 :] = TAIL
    known = {character for character, use in zip(text, part, strict=True) if use == TRAINING}
    empty = Text("".join(sorted(known)), positions, part)
    return empty._replace(ids=empty.encode(text))


def windows(text: Text, seed: int) -> Iterator[np.ndarray]:
    """Batches of random windows of the text that do not overlap with a held-out part."""
    held_out = np.cumsum(np.append(0, text.part != TRAINING))
    starts = np.flatnonzero(held_out[LENGTH + 1 :] == held_out[: -LENGTH - 1])
    rng = np.random.default_rng(seed)
    while True:
        yield text.ids[rng.choice(starts, BATCH)[:, None] + np.arange(LENGTH + 1)]


def gpt(vocabulary: int) -> dp.Layer:
    """A GPT of four blocks, with learned positions."""
    return dp.models.gpt(vocabulary, length=LENGTH, width=WIDTH, depth=4, heads=4)


def llama(vocabulary: int) -> dp.Layer:
    """A LLaMA of four blocks: rotary positions, RMS norms and SwiGLU."""
    return dp.models.llama(
        vocabulary, width=WIDTH, depth=4, heads=4, hidden=8 * WIDTH // 3, tied=True)


def recurrent(cell: Callable[[int], dp.Layer], width: int = 256) -> Callable[[int], dp.Layer]:
    """Two layers of a recurrent cell, each followed by a layer norm."""

    def net(vocabulary: int) -> dp.Layer:
        layers = [dp.recurrent(cell(width)) >> dp.layer_norm() for _ in range(2)]
        return dp.serial(embed=dp.embedding(vocabulary, WIDTH), body=dp.serial(*layers),
                         head=dp.linear(vocabulary))

    return net


# model -> (network by size of the vocabulary, training steps)
MODELS = {"gpt": (gpt, 700), "llama": (llama, 700), "lstm": (recurrent(dp.lstm), 700),
          "gru": (recurrent(dp.gru), 1000)}


def muon(steps: int) -> optax.GradientTransformation:
    """Muon for the kernels, which are matrices or stacks of them, and AdamW for the others."""

    def matrices(params: Any) -> Any:
        axes = optax.contrib.MuonDimensionNumbers(-2, -1)
        return jax.tree.map(lambda chosen: axes if chosen else None,
                            dp.tree.mask(params, "**/kernel"))

    rate = optax.cosine_onecycle_schedule(steps, 0.02, pct_start=0.1)
    return optax.contrib.muon(rate, adam_b2=0.99, muon_weight_dimension_numbers=matrices)


def train(
    net: dp.Layer, text: Text, steps: int, seed: int, report: Callable[[dp.training.Fit], None]
) -> tuple[dp.training.TrainState, list[dict[str, float]]]:
    """Train in stages, with a report after each."""
    step = dp.make_step(net, dp.text.next_token(), muon(steps))
    data, state, history = windows(text, seed), None, []
    for count in np.diff(np.linspace(0, steps, (STAGES if steps > 100 else 1) + 1).astype(int)):
        origin: Any = {"key": jax.random.key(seed)} if state is None else {"state": state}
        fit = dp.fit(step, data, steps=int(count), log_every=max(steps // 100, 1), **origin)
        state, history = fit.state, history + fit.history
        report(fit)
    assert state is not None
    return state, history


def generate(
    net: dp.Layer, state: dp.training.TrainState, text: Text, prompt: str, count: int, seed: int
) -> str:
    """Continue a prompt, half a window at a time, from the last half window."""
    half, ids = LENGTH // 2, text.encode(prompt)
    for number in range(-(-count // half)):
        key = jax.random.fold_in(jax.random.key(seed), number)
        more = dp.text.generate(net, state.params, ids[None, -half:], half, key=key,
                           temperature=0.7)
        ids = np.append(ids, more.tokens[0])
    return text.decode(ids[: len(text.encode(prompt)) + count])


def net_bits(net: dp.Layer, state: dp.training.TrainState, text: Text) -> np.ndarray:
    """The negative log-likelihood in bits of each held-out character, given those before it.

    Windows overlap by half, and the second half of each is evaluated: the context of a character is
    LENGTH / 2 + 1 to LENGTH characters.
    """
    half = LENGTH // 2

    @dp.program(net=net)
    def measure(layers: Any, ids: jax.Array) -> jax.Array:
        scores = layers.net(ids[:, :-1])[:, -half:]
        return dp.losses.cross_entropy(scores, ids[:, -half:], reduction="none") / np.log(2)

    halves = np.unique(np.flatnonzero(text.part != TRAINING) // half)
    ends = np.minimum((halves + 1) * half, len(text.ids))[:, None]
    bits = np.full(len(text.ids), np.nan)
    bits[ends + np.arange(-half, 0)] = dp.predict(
        measure, {"net": state.params}, text.ids[ends + np.arange(-LENGTH - 1, 0)],
        batch_size=BATCH)
    return bits


def ngram_bits(text: Text, order: int) -> np.ndarray:
    """The negative log-likelihood in bits of each character under an n-gram model, n = `order`.

    Counts in the training text are smoothed by the model of one order less, which has the weight of
    five observations (MacKay and Peto 1995, "A hierarchical Dirichlet language model").
    """
    prior, size = 5, len(text.alphabet) + 1
    counted, probability = text.part == TRAINING, np.full(len(text.ids), 1 / size)
    context = np.zeros(len(text.ids), np.int64)
    for n in range(order):
        grams = context * size + text.ids
        total = _counts(context, counted) + prior
        probability = (_counts(grams, counted) + prior * probability) / total
        counted = counted & np.roll(text.part == TRAINING, n + 1)
        context = np.roll(text.ids, n + 1) * size**n + context
    return -np.log2(probability)


def _counts(grams: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """For each n-gram, how often it occurs where `counted` is true."""
    _, kind = np.unique(grams, return_inverse=True)
    return np.bincount(kind, weights=counted)[kind]


def draw(
    path: pathlib.Path, name: str, history: list[dict[str, float]], samples: dict[int, str],
    scores: dict[str, dict[str, float]], passage: str, bits: np.ndarray,
) -> None:
    """The learning curve, samples during training, and the bits of each held-out character."""
    figure = plt.figure(figsize=(15, 8.4))
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.45))
    above, below = parts[0].subplots(2, 1)

    steps = [row["step"] for row in history]
    above.plot(steps, [row["bits"] for row in history], label="training")
    for holdout, marker in zip(HOLDOUTS.values(), "os", strict=True):
        above.plot(steps[-1], scores[name][holdout], marker, color="C3", clip_on=False,
                   label=f"{holdout}: {scores[name][holdout]:.2f}")
    for baseline in ("unigram", "trigram"):
        level = scores[baseline][HOLDOUTS[TAIL]]
        above.axhline(level, color="0.5", linestyle="--", linewidth=1)
        above.text(steps[-1], level, f"{baseline} {level:.2f}", color="0.4", ha="right",
                   va="bottom")
    above.set(title=f"Learning curve of {name}", xlabel="step", ylabel="bits per character",
              xlim=(0, steps[-1]), ylim=(0, 7))
    above.legend(frameon=False, loc="upper center")

    below.set_title("Samples")
    rows = []
    for step, sample in samples.items():
        line = sample.replace("\n", NEWLINE)
        rows += [f"after {step} steps", *(line[i : i + 62] for i in range(0, len(line), 62)), ""]
    below.text(0, 1, "\n".join(rows), family="monospace", size=9, va="top")
    below.set_axis_off()

    draw_bits(parts[1], passage, bits)
    figure.savefig(path, dpi=100)


def draw_bits(
    figure: Any, passage: str, bits: np.ndarray, rows: int = 36, columns: int = 76
) -> None:
    """The end of a passage, each character on a colour by its negative log-likelihood in bits."""
    cells, row, column = [], 0, 0
    for character, value in zip(passage, bits, strict=True):
        cells.append((row, column, character, value))
        last = character == "\n" or column == columns - 1
        row, column = (row + 1, 0) if last else (row, column + 1)
    first = max(cells[-1][0] - rows + 1, 0)
    table, axes = np.full((rows, columns), np.nan), figure.subplots()
    for row, column, character, value in cells:
        if row >= first:
            table[row - first, column] = value
            axes.text(column, row - first, NEWLINE if character == "\n" else character, size=8.5,
                      family="monospace", ha="center", va="center",
                      color="white" if value > 5 else "0.5" if character == "\n" else "black")
    image = axes.imshow(table, cmap="OrRd", vmin=0, vmax=8, aspect="auto")
    axes.grid(False)
    axes.set(title="Negative log-likelihood of each character at the end of the text, held out",
             xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="bits", orientation="horizontal", shrink=0.5, aspect=40, pad=0.02)


def main() -> None:
    """Train, generate, evaluate and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="gpt")
    parser.add_argument("--text", type=pathlib.Path, help="a file of UTF-8 text to train on")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("language_model.png"))
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps: wants at least 1, got {args.steps}; leave it out for the default")
    if not args.out.parent.is_dir():
        parser.error(f"--out: wants a file in a folder, got {args.out}; make the folder first")

    text = split(read(args.text))
    make, steps = MODELS[args.model]
    net, samples = make(len(text.alphabet) + 1), {}
    prompt = PROMPT if args.text is None else text.decode(text.ids[: len(PROMPT)])
    print(dp.summary(net, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)), "\n")

    def report(fit: dp.training.Fit) -> None:
        step, loss = int(fit.state.step), fit.history[-1]["bits"]
        samples[step] = generate(net, fit.state, text, prompt, 110, args.seed)
        print(f"\nafter {step} steps, at {loss:.2f} bits per character: {samples[step]}\n")

    state, history = train(net, text, args.steps or steps, args.seed, report)
    print(f"final sample: {generate(net, state, text, prompt, 600, args.seed + 1)}\n")

    bits = {"unigram": ngram_bits(text, 1), "trigram": ngram_bits(text, 3),
            args.model: net_bits(net, state, text)}
    scores = {name: {holdout: each[text.part == part].mean()
                     for part, holdout in HOLDOUTS.items()} for name, each in bits.items()}
    end = np.flatnonzero(text.part == TAIL)[-3000:]
    draw(args.out, args.model, history, samples, scores, text.decode(text.ids[end]),
         bits[args.model][end])
    print(f"picture: {args.out}")
    for holdout in HOLDOUTS.values():
        print(", ".join(f"{name} {score[holdout]:.{3 if name == args.model else 2}f}"
                        for name, score in scores.items()), f"bits per character on {holdout}")


if __name__ == "__main__":
    main()
