"""Translate dates from fifteen written formats to 1987-03-28.

    python examples/translate.py [--model transformer|seq2seq] [--steps N] [--seed N] [--out FILE]

Data: the days from 1900 to 2099, written by this program: "28. III. 1987", "the 28th of March,
1987", "March twenty-eighth, nineteen eighty-seven", "4th last day of March 1987", in upper and
lower case. A Transformer, or LSTMs with attention, translate the characters to those of the ISO
date. 7,500 days are held out: in training they are not the target of any format. Takes about three
minutes on two cores (3.3 minutes of CPU time; the LSTMs 2.8). Expected: 99.9 % of the dates exact,
by either model. All hyperparameters were chosen on 750 validation days, which are not trained on.

Draws the attention of each output character to the source, and the accuracy of each format during
training.
"""

from __future__ import annotations

import argparse
import calendar
import datetime
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from style import plt

import diffprog as dp

Date = datetime.date
Batch = dict[str, Any]  # x: targets from BEGIN to END; source; source_mask

BATCH, LONGEST = 64, 48
HELD_OUT, VALIDATION = 7500, 750  # days
SYMBOLS = "0123456789-"
BEGIN, END = len(SYMBOLS), len(SYMBOLS) + 1

ROMAN = "I II III IV V VI VII VIII IX X XI XII".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
ONES = ("- one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
            "nine": "ninth", "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}


def words(number: int) -> str:
    """A number from 1 to 99 in words."""
    if number < len(ONES):
        return ONES[number]
    return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")


def ordinal_words(number: int) -> str:
    """An ordinal number in words: first, second, ..., thirty-first."""
    *tens, last = words(number).split("-")
    return "-".join([*tens, ORDINALS.get(last, f"{last}th")])


def year_words(year: int) -> str:
    """A year in words: nineteen hundred, nineteen oh five, two thousand, twenty twelve."""
    century, rest = divmod(year, 100)
    if rest == 0:
        return "two thousand" if year == 2000 else f"{words(century)} hundred"
    return f"{words(century)} {'oh ' if rest < 10 else ''}{words(rest)}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ..."""
    endings = {1: "st", 2: "nd", 3: "rd"} if number not in (11, 12, 13) else {}
    return f"{number}{endings.get(number % 10, 'th')}"


def from_end(d: Date) -> str:
    """Which day of the month it is, counted from its end: last, 2nd last, 3rd last, ..."""
    left = calendar.monthrange(d.year, d.month)[1] - d.day
    return f"{ordinal(left + 1)} last" if left else "last"


# A text denotes one day only. The last two formats are more frequent in training, because they are
# harder: numbers in words, and the lengths of months, in leap years too.
FORMATS: tuple[Callable[[Date], str], ...] = (
    lambda d: f"{d:%Y/%m/%d}",
    lambda d: f"{d:%d.%m.%Y}",
    lambda d: f"{d.day}.{d.month}.{d.year}",
    lambda d: f"{d.day}. {ROMAN[d.month - 1]}. {d.year}",
    lambda d: f"{d.day}-{d:%b}-{d.year}",
    lambda d: f"{d:%b} {d.day}, {d.year}",
    lambda d: f"{d.year} {d:%B} {d.day}",
    lambda d: f"{d:%B} {d.day}, {d.year}",
    lambda d: f"{d:%a}, {d.day} {d:%b} {d.year}",
    lambda d: f"{d:%A}, {d.day} {d:%B} {d.year}",
    lambda d: f"{d:%A}, {d:%B} {ordinal(d.day)}, {d.year}",
    lambda d: f"the {ordinal(d.day)} of {d:%B}, {d.year}",
    lambda d: f"{ordinal(d.day)} day of {d:%B} in {d.year}",
    lambda d: f"{d:%B} {ordinal_words(d.day)}, {year_words(d.year)}",
    lambda d: f"{from_end(d)} day of {d:%B} {d.year}",
)
PROBABILITIES = np.array([1.0] * 13 + [3.0, 6.0]) / 22
CASES = (str, str.lower, str.upper)
EXAMPLE = Date(1987, 3, 28)


class Days(NamedTuple):
    """Disjoint sets of days, as numbers of `datetime.date.toordinal`."""

    training: np.ndarray
    validation: np.ndarray
    held_out: np.ndarray


def split() -> Days:
    """The 73,049 days from 1900 to 2099, split at random with a fixed seed."""
    days = np.arange(Date(1900, 1, 1).toordinal(), Date(2100, 1, 1).toordinal())
    days = np.random.default_rng(0).permutation(days)
    held_out, validation, training = np.split(days, [HELD_OUT, HELD_OUT + VALIDATION])
    return Days(training, validation, held_out)


def written_dates(
    days: np.ndarray, formats: np.ndarray, rng: np.random.Generator
) -> tuple[list[str], Batch]:
    """The days in these formats and random cases: the texts, and the batch of ids."""
    dates = [Date.fromordinal(day) for day in days]
    cases = rng.integers(0, len(CASES), len(days))
    texts = [CASES[c](FORMATS[f](d)) for c, f, d in zip(cases, formats, dates, strict=True)]
    source = np.array([list(text.ljust(LONGEST, "\0").encode()) for text in texts], np.int32)
    x = [[BEGIN, *map(SYMBOLS.index, date.isoformat()), END] for date in dates]
    return texts, {"x": np.array(x, np.int32), "source": source, "source_mask": source > 0}


def endless(days: np.ndarray, seed: int) -> Iterator[Batch]:
    """Endless batches of random days in random formats."""
    rng = np.random.default_rng(seed)
    while True:
        some, formats = rng.choice(days, BATCH), rng.choice(len(FORMATS), BATCH, p=PROBABILITIES)
        yield written_dates(some, formats, rng)[1]


def every_format(days: np.ndarray) -> tuple[list[str], Batch]:
    """Every day once, with the formats in turn, so that they are equally frequent."""
    return written_dates(days, np.arange(len(days)) % len(FORMATS), np.random.default_rng(0))


def accuracy_by_format(correct: np.ndarray) -> np.ndarray:
    """Percent of correct answers by format, for days from `every_format`."""
    return 100 * correct.reshape(-1, len(FORMATS)).mean(0)


class Model(NamedTuple):
    """A network, its training steps, and the path of its cross-attention."""

    net: dp.Layer
    steps: int
    attention_path: str


MODELS = {
    "transformer": lambda: Model(
        dp.models.transformer(128, END + 1, width=64, depth=2, heads=4, hidden=256,
            norm_first=True), 2000,
        "decoder/body/blocks/cross/body"),
    "seq2seq": lambda: Model(
        dp.models.seq2seq(128, END + 1, width=128), 1500, "decoder/attend"),
}


def train(
    net: dp.Layer, days: Days, steps: int, seed: int
) -> tuple[Any, list[tuple[int, np.ndarray]]]:
    """Train with AdamW; returns the parameters, and exact match by format on the validation days.

    Validation uses teacher forcing. All its characters are correct if and only if the output of
    greedy decoding is.
    """
    rates = optax.cosine_onecycle_schedule(steps, 3e-3)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates, weight_decay=1e-2))
    step = dp.make_step(net, dp.text.next_token(), optimizer)
    batches, (_, validation) = endless(days.training, seed), every_format(days.validation)
    side = {name: validation[name] for name in ("source", "source_mask")}
    state, history = step.init(jax.random.key(seed), validation["x"][:, :-1], **side), []
    for number in range(1, steps + 1):
        state, metrics = step.apply(state, next(batches))
        if number % max(steps // 25, 10) == 0 or number == steps:
            predicted = dp.predict(net, state.params, validation["x"][:, :-1], **side).argmax(-1)
            percent = accuracy_by_format((np.asarray(predicted) == validation["x"][:, 1:]).all(-1))
            history.append((number, percent))
            print(f"step {number:5}   loss {float(metrics['loss']):.4f}   "
                  f"exact match {percent.mean():5.1f} % in validation", flush=True)
    return state.params, history


def translate(net: dp.Layer, params: Any, batch: Batch) -> np.ndarray:
    """The ids of greedy decoding, up to END."""
    source, mask = jnp.asarray(batch["source"]), jnp.asarray(batch["source_mask"])
    memory = net.children["encoder"](params["encoder"], source, mask=mask)
    begin = np.full((len(source), 1), BEGIN)
    steps = batch["x"].shape[1] - 1
    return np.asarray(dp.text.generate(net, params, begin, steps, memory=memory, memory_mask=mask,
                                  stop_tokens=[END]).tokens)


def text(ids: np.ndarray) -> str:
    """The symbols of ids before END."""
    return "".join(SYMBOLS[i] for i in ids if 0 <= i < len(SYMBOLS))


def attention(model: Model, params: Any, batch: Batch) -> np.ndarray:
    """Cross-attention weights (batch, target, source): the mean over the heads of the last block.
    """
    tapped = dp.tap(model.net, model.attention_path, attention_weights=True)
    _, seen = tapped(params, batch["x"][:, :-1], source=batch["source"],
                     source_mask=batch["source_mask"])
    weights = seen[model.attention_path]  # (blocks, batch, heads, target, source), or one block
    return np.asarray(weights[-1] if weights.ndim == 5 else weights).mean(1)


def chosen_examples(batch: Batch) -> list[int]:
    """Three to draw: with day of the week, in words, and from the end of a leap-year February."""
    dates = [Date.fromisoformat(text(x)) for x in batch["x"]]
    leap = [i for i, d in enumerate(dates) if calendar.isleap(d.year) and d.month == 2
            and i % len(FORMATS) == len(FORMATS) - 1]
    return [9, 13, max(leap, key=lambda i: dates[i].day)]


def draw_map(axes: Axes, source: str, output: str, true: str, weights: np.ndarray) -> None:
    """Attention weights: source from left to right, output from top to bottom."""
    rows = [*output, "end"][: len(weights)]
    axes.imshow(weights[: len(rows), : len(source)], cmap="Blues", aspect="auto", vmin=0)
    axes.grid(False)
    axes.set_xticks(range(len(source)), list(source), family="monospace", size=10, va="baseline")
    axes.set_yticks(range(len(rows)), rows, family="monospace", size=10)
    axes.tick_params("x", length=0, pad=13)
    axes.tick_params("y", length=0)
    axes.spines[:].set_visible(False)
    wrong = "" if output == true else f"   (wrong: true is {true})"
    axes.set_title(f"{source}   \N{RIGHTWARDS ARROW}   {output}{wrong}", size=11, loc="left")


def draw_history(axes: Axes, history: list[tuple[int, np.ndarray]], final: np.ndarray) -> None:
    """Exact match by format during training; at the right, on the held-out dates."""
    steps, rows = zip(*history, strict=True)
    axes.imshow(np.array(rows).T, cmap="YlGnBu", aspect="auto", vmin=0, vmax=100)
    axes.grid(False)
    axes.set_yticks(range(len(FORMATS)), [written(EXAMPLE) for written in FORMATS], size=9)
    axes.set_xticks(ticks := range(0, len(steps), max(len(steps) // 4, 1)),
                    [str(steps[i]) for i in ticks])
    for row, percent in enumerate(final):
        axes.text(len(steps) - 0.3, row, f"{percent:5.1f}", va="center", family="monospace", size=9)
    axes.text(len(steps) - 0.3, -0.7, "held out", size=9)
    axes.set_xlabel("training step; darker is better")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def main() -> None:
    """Train, translate, evaluate and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="transformer")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("translate.png"))
    args = parser.parse_args()

    model, days = MODELS[args.model](), split()
    assert not np.intersect1d(np.concatenate([days.training, days.validation]), days.held_out).size
    params, history = train(model.net, days, args.steps or model.steps, args.seed)

    texts, held_out = every_format(days.held_out)
    parts = dp.batches(held_out, 500)
    ids = np.concatenate([translate(model.net, params, part) for part in parts])
    outputs, correct = [text(row) for row in ids], (ids == held_out["x"][:, 1:]).all(1)

    count = len(texts) // len(FORMATS)
    print(f"\n{'exact':>6}   percent of {count} held-out dates in each format, such as")
    for format_id, percent in enumerate(accuracy_by_format(correct)):
        print(f"{percent:6.1f}   {texts[format_id]:{LONGEST}}   {outputs[format_id]}")
    for i in np.flatnonzero(~correct)[:5]:
        print(f" wrong   {texts[i]:{LONGEST}}   {outputs[i]}")

    shown = chosen_examples(held_out)
    maps = attention(model, params, jax.tree.map(lambda leaf: leaf[shown], held_out))
    figure = plt.figure(figsize=(15, 8))
    left, side = np.asarray(figure.subfigures(1, 2, width_ratios=(1.4, 1)))
    left.suptitle(f"Cross-attention of the {args.model}: output in rows, source in columns")
    for axes, i, weights in zip(left.subplots(3), shown, maps, strict=True):
        draw_map(axes, texts[i], outputs[i], text(held_out["x"][i]), weights)
    side.suptitle("Exact match in percent, by format")
    draw_history(side.subplots(), history, accuracy_by_format(correct))
    figure.savefig(args.out, dpi=90)
    print(f"\npicture: {args.out}")
    exact = 100 * correct.mean()
    print(f"exact match {exact:.1f} % on {len(correct)} held-out dates ({args.model})")


if __name__ == "__main__":
    main()
