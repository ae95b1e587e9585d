"""Learn to write help about Python, one character at a time, and watch it learn.

    python examples/language_model.py [--model gpt|llama|lstm|gru] [--text FILE] [--steps N]
                                      [--seed N] [--out language_model.png]

Takes about three minutes on two cores, and ends with

    unigram 4.58, trigram 2.36, gpt 1.515 bits per character on the last 5 %
    unigram 4.68, trigram 2.51, gpt 1.512 bits per character on every 20th block

On the way it writes a sample now and then; at last it draws how it learned, what it wrote, and how
much each character of the end of the text surprised it. Of the others gru reaches 1.461 and 1.375
in more steps; in shorter runs llama 1.513 and 1.534, with `--steps 500`, and lstm 1.945 and 2.004,
with `--steps 200`.

Data: the help texts of the standard library (`pydoc_data.topics`), 465,048 characters in Python
3.11, or a file of UTF-8 text. The last 5 % of the characters are held out, and of the rest every
20th block of 2,048; what it learns from reaches into neither. The help repeats itself: 36 % and
48 % of the held-out characters stand in a run of 64 that is found word for word elsewhere, so that
counting what follows four characters, `counted(text, 5)`, reaches 1.70 and 1.61 bits.

Window, optimizer and its rates were chosen for gpt in runs of 500 steps, by parts of the training
text that these did not learn from: the 5 % before the last, and the blocks halfway between those
held out. The held-out text chose nothing.
"""

from __future__ import annotations

import argparse
import pathlib
import pydoc_data.topics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import diffprog as dp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH, BATCH, WIDTH = 64, 32, 128
BLOCK, EVERY = 2048, 20
LEARN, TAIL, BLOCKS = 0, 1, 2  # what a character is for
HOLDOUTS = {TAIL: "the last 5 %", BLOCKS: f"every {EVERY}th block"}
STAGES, PROMPT = 5, "The statement "
RETURN = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"  # shows the end of a line


class Text(NamedTuple):
    """A text, the number of each of its characters, and what each is for."""

    alphabet: str
    ids: np.ndarray
    purpose: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        """Numbers of characters; those that the alphabet lacks have the number behind its last."""
        numbers = {character: i for i, character in enumerate(self.alphabet)}
        return np.array([numbers.get(character, len(self.alphabet)) for character in text])

    def decode(self, ids: Any) -> str:
        """The characters of some numbers."""
        return "".join((self.alphabet + "\N{REPLACEMENT CHARACTER}")[i] for i in np.asarray(ids))


def read(path: pathlib.Path | None) -> str:
    """The text of a file, or the help of the standard library; complain in one line."""
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
    """Hold out the last 5 %, and of the rest every 20th block; the alphabet is of what is left."""
    places = np.arange(len(text))
    purpose = np.where(places // BLOCK % EVERY == EVERY - 1, BLOCKS, LEARN)
    purpose[len(text) - len(text) // 20 :] = TAIL
    known = {character for character, use in zip(text, purpose, strict=True) if use == LEARN}
    empty = Text("".join(sorted(known)), places, purpose)
    return empty._replace(ids=empty.encode(text))


def windows(text: Text, seed: int) -> Iterator[np.ndarray]:
    """Batches of random pieces of the text, none of which reaches into a held-out part."""
    held = np.cumsum(np.append(0, text.purpose != LEARN))
    begins = np.flatnonzero(held[LENGTH + 1 :] == held[: -LENGTH - 1])
    draw = np.random.default_rng(seed)
    while True:
        yield text.ids[draw.choice(begins, BATCH)[:, None] + np.arange(LENGTH + 1)]


def gpt(vocabulary: int) -> dp.Layer:
    """Four blocks of attention and feed-forward nets, and a learned vector at each position."""
    return dp.models.gpt(vocabulary, length=LENGTH, width=WIDTH, depth=4, heads=4)


def llama(vocabulary: int) -> dp.Layer:
    """The same with rotary positions, RMS norms and SwiGLU."""
    return dp.models.llama(vocabulary, width=WIDTH, depth=4, heads=4, hidden=8 * WIDTH // 3,
        tied=True)


def recurrent(cell: Callable[[int], dp.Layer], width: int = 256) -> Callable[[int], dp.Layer]:
    """Two layers of a recurrent cell, each with a norm behind it."""

    def net(vocabulary: int) -> dp.Layer:
        layers = [dp.recurrent(cell(width)) >> dp.layer_norm() for _ in range(2)]
        return dp.serial(embed=dp.embedding(vocabulary, WIDTH), body=dp.serial(*layers),
                         head=dp.linear(vocabulary))

    return net


# model -> network of so many characters, and training steps
MODELS = {"gpt": (gpt, 700), "llama": (llama, 700), "lstm": (recurrent(dp.lstm), 700),
          "gru": (recurrent(dp.gru), 1000)}


def muon(steps: int) -> optax.GradientTransformation:
    """Muon for the kernels, which are matrices or stacks of them, and AdamW for all the rest."""

    def matrices(params: Any) -> Any:
        axes = optax.contrib.MuonDimensionNumbers(-2, -1)
        return jax.tree.map(lambda chosen: axes if chosen else None,
                            dp.tree.mask(params, "**/kernel"))

    rate = optax.cosine_onecycle_schedule(steps, 0.02, pct_start=0.1)
    return optax.contrib.muon(rate, adam_b2=0.99, muon_weight_dimension_numbers=matrices)


def train(
    net: dp.Layer, text: Text, steps: int, seed: int, report: Callable[[dp.training.Fit], None]
) -> tuple[dp.training.TrainState, list[dict[str, float]]]:
    """Train in stages, and report after each."""
    step = dp.make_step(net, dp.text.next_token(), muon(steps))
    data, state, history = windows(text, seed), None, []
    for part in np.diff(np.linspace(0, steps, (STAGES if steps > 100 else 1) + 1).astype(int)):
        begin: Any = {"key": jax.random.key(seed)} if state is None else {"state": state}
        fit = dp.fit(step, data, steps=int(part), log_every=max(steps // 100, 1), **begin)
        state, history = fit.state, history + fit.history
        report(fit)
    assert state is not None
    return state, history


def write(
    net: dp.Layer, state: dp.training.TrainState, text: Text, prompt: str, count: int, seed: int
) -> str:
    """Go on after a prompt, as often as needed from the last half window of what is there."""
    half, written = LENGTH // 2, text.encode(prompt)
    for number in range(-(-count // half)):
        key = jax.random.fold_in(jax.random.key(seed), number)
        more = dp.text.generate(net, state.params, written[None, -half:], half, key=key,
                           temperature=0.7)
        written = np.append(written, more.tokens[0])
    return text.decode(written[: len(text.encode(prompt)) + count])


def surprise(net: dp.Layer, state: dp.training.TrainState, text: Text) -> np.ndarray:
    """Bits that the net needs for each held-out character, knowing those before it.

    Windows overlap by half, and the second half of each is read: every character is measured once,
    with the LENGTH / 2 + 1 to LENGTH characters before it in sight.
    """
    half = LENGTH // 2

    @dp.program(net=net)
    def measure(layers: Any, ids: jax.Array) -> jax.Array:
        scores = layers.net(ids[:, :-1])[:, -half:]
        return dp.losses.cross_entropy(scores, ids[:, -half:], reduction="none") / np.log(2)

    halves = np.unique(np.flatnonzero(text.purpose != LEARN) // half)
    ends = np.minimum((halves + 1) * half, len(text.ids))[:, None]
    bits = np.full(len(text.ids), np.nan)
    bits[ends + np.arange(-half, 0)] = dp.predict(
        measure, {"net": state.params}, text.ids[ends + np.arange(-LENGTH - 1, 0)],
        batch_size=BATCH)
    return bits


def counted(text: Text, order: int) -> np.ndarray:
    """Bits that counting needs for each character, knowing the `order` - 1 before it.

    How often it came after these while learning, as if the guess of one order less had been seen
    five times besides (MacKay and Peto 1995, "A hierarchical Dirichlet language model").
    """
    prior, size = 5, len(text.alphabet) + 1
    learn, guess = text.purpose == LEARN, np.full(len(text.ids), 1 / size)
    context = np.zeros(len(text.ids), np.int64)
    for n in range(order):
        whole = context * size + text.ids
        guess = (_times(whole, learn) + prior * guess) / (_times(context, learn) + prior)
        learn = learn & np.roll(text.purpose == LEARN, n + 1)
        context = np.roll(text.ids, n + 1) * size**n + context
    return -np.log2(guess)


def _times(grams: np.ndarray, learn: np.ndarray) -> np.ndarray:
    """For each gram, how often it stands where there is something to learn."""
    _, kind = np.unique(grams, return_inverse=True)
    return np.bincount(kind, weights=learn)[kind]


def draw(
    path: pathlib.Path, name: str, history: list[dict[str, float]], samples: dict[int, str],
    scores: dict[str, dict[str, float]], passage: str, bits: np.ndarray,
) -> None:
    """How it learned, what it wrote on the way, and what surprised it in text it had not seen."""
    figure = plt.figure(figsize=(15, 8.4), layout="constrained")
    places: Any = figure.subfigures(1, 2, width_ratios=(1, 1.45))
    above, below = places[0].subplots(2, 1)

    steps = [row["step"] for row in history]
    above.plot(steps, [row["bits"] for row in history], label="what it learns from")
    for holdout, marker in zip(HOLDOUTS.values(), "os", strict=True):
        above.plot(steps[-1], scores[name][holdout], marker, color="C3", clip_on=False,
                   label=f"{holdout}: {scores[name][holdout]:.2f}")
    for baseline in ("unigram", "trigram"):
        level = scores[baseline][HOLDOUTS[TAIL]]
        above.axhline(level, color="0.5", linestyle="--", linewidth=1)
        above.text(steps[-1], level, f"{baseline} {level:.2f}", color="0.4", ha="right",
                   va="bottom")
    above.set(title=f"{name} learns", xlabel="step", ylabel="bits per character",
              xlim=(0, steps[-1]), ylim=(0, 7))
    above.legend(frameon=False, loc="upper center")

    below.set_title("and writes")
    rows = []
    for step, sample in samples.items():
        line = sample.replace("\n", RETURN)
        rows += [f"after {step} steps", *(line[i : i + 62] for i in range(0, len(line), 62)), ""]
    below.text(0, 1, "\n".join(rows), family="monospace", size=9, va="top")
    below.set_axis_off()

    heat(places[1], passage, bits)
    figure.savefig(path, dpi=100)


def heat(place: Any, passage: str, bits: np.ndarray, rows: int = 36, columns: int = 76) -> None:
    """The end of a passage, each character on the colour of its surprise."""
    cells, row, column = [], 0, 0
    for sign, surprise in zip(passage, bits, strict=True):
        cells.append((row, column, sign, surprise))
        last = sign == "\n" or column == columns - 1
        row, column = (row + 1, 0) if last else (row, column + 1)
    first = max(cells[-1][0] - rows + 1, 0)
    table, axes = np.full((rows, columns), np.nan), place.subplots()
    for row, column, sign, surprise in cells:
        if row >= first:
            table[row - first, column] = surprise
            axes.text(column, row - first, RETURN if sign == "\n" else sign, size=8.5,
                      family="monospace", ha="center", va="center",
                      color="white" if surprise > 5 else "0.5" if sign == "\n" else "black")
    image = axes.imshow(table, cmap="OrRd", vmin=0, vmax=8, aspect="auto")
    axes.set(title="What surprises it: the end of the text, held out", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    place.colorbar(image, label="bits", orientation="horizontal", shrink=0.5, aspect=40, pad=0.02)


def main() -> None:
    """Train, write, measure and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="gpt")
    parser.add_argument("--text", type=pathlib.Path, help="a file to learn from")
    parser.add_argument("--steps", type=int, help="training steps; those of the model if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("language_model.png"))
    given = parser.parse_args()
    if given.steps is not None and given.steps < 1:
        parser.error(f"--steps: wants at least 1, got {given.steps}; leave it out for the default")
    if not given.out.parent.is_dir():
        parser.error(f"--out: wants a file in a folder, got {given.out}; make the folder first")

    text = split(read(given.text))
    make, steps = MODELS[given.model]
    net, samples = make(len(text.alphabet) + 1), {}
    prompt = PROMPT if given.text is None else text.decode(text.ids[: len(PROMPT)])
    print(dp.summary(net, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)), "\n")

    def report(fit: dp.training.Fit) -> None:
        step, loss = int(fit.state.step), fit.history[-1]["bits"]
        samples[step] = write(net, fit.state, text, prompt, 110, given.seed)
        print(f"\nafter {step} steps, at {loss:.2f} bits per character: {samples[step]}\n")

    state, history = train(net, text, given.steps or steps, given.seed, report)
    print(f"at last: {write(net, state, text, prompt, 600, given.seed + 1)}\n")

    bits = {"unigram": counted(text, 1), "trigram": counted(text, 3),
            given.model: surprise(net, state, text)}
    scores = {name: {holdout: each[text.purpose == purpose].mean()
                     for purpose, holdout in HOLDOUTS.items()} for name, each in bits.items()}
    end = np.flatnonzero(text.purpose == TAIL)[-3000:]
    draw(given.out, given.model, history, samples, scores, text.decode(text.ids[end]),
         bits[given.model][end])
    print(f"picture: {given.out}")
    for holdout in HOLDOUTS.values():
        print(", ".join(f"{name} {score[holdout]:.{3 if name == given.model else 2}f}"
                        for name, score in scores.items()), f"bits per character on {holdout}")


if __name__ == "__main__":
    main()
