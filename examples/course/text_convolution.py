"""A 1-D convolution classifies text: its filters find pieces of words, wherever they stand.

    python examples/course/text_convolution.py [--short] [--seed N] [--out FOLDER]

The net sees 64 characters from one of six pages of Python's documentation, and says which page.
embed >> conv(size) >> relu >> largest value over time >> linear: a filter of size n scores each
piece of n characters, and the maximum asks whether a piece that it likes occurs anywhere (Kim 2014,
arXiv:1408.5882). Size 1 knows which characters occur, and nothing of their order.
"""

from __future__ import annotations

from collections import Counter
from pydoc_data.topics import topics
from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from style import BLUE, ORANGE, figure

import diffprog as dp

PAGES = sorted(topics, key=lambda name: -len(topics[name]))[:6]
WINDOW, VOCABULARY, FILTERS = 64, 128, 64


def classifier(size: int) -> dp.Layer:
    """Ids (batch, time) to logits of the pages."""
    return dp.serial(
        embed=dp.embedding(VOCABULARY, 16),                            # (batch, time, 16)
        conv=dp.conv(FILTERS, size, dims=1, padding="VALID"),          # (batch, time', FILTERS)
        relu=jax.nn.relu,
        pool=dp.global_max_pool(dims=1),                               # (batch, FILTERS)
        head=dp.linear(len(PAGES)),
    )



def favourites(params: Any, x: np.ndarray, size: int) -> list[tuple[str, str]]:
    """The pieces that excite a filter most, for the strongest filter of each page."""
    scores = np.asarray(classifier(size).children["conv"](
        params["conv"], params["embed"]["embedding"][x]))             # (batch, time', FILTERS)
    pieces = np.lib.stride_tricks.sliding_window_view(x, size, 1)      # (batch, time', size)
    weights = params["head"]["kernel"] * scores.max(1).mean(0)[:, None]  # (FILTERS, pages)
    found = []
    for label, page in enumerate(PAGES):
        best = int(jnp.argmax(weights[:, label] - weights.mean(1)))
        top = np.argsort(-scores[..., best], None)[:200]
        texts = Counter("".join(map(chr, piece)) for piece in pieces.reshape(-1, size)[top])
        found.append((page, "   ".join(
            "“" + text.replace("\n", "↵") + "”" for text, _ in texts.most_common(4))))
    return found


def main(experiment: Experiment) -> None:
    """Compare sizes of the filters, shuffle the characters, and read the filters."""
    split, rng = data.windows(
        experiment.rng, PAGES, WINDOW, VOCABULARY, (1500, 300)), experiment.rng
    shuffled = rng.permuted(split.x_held_out, axis=1)
    sizes, steps = experiment.pick((1, 2, 3, 5, 8), (1, 5)), experiment.pick(500, 200)
    accuracies, on_shuffled, trained = [], [], {}
    for size in sizes:
        step = dp.make_step(classifier(size), dp.classification(), optax.adam(3e-3))
        batches = dp.batches((split.x, split.y), 50, seed=experiment.seed)
        fit = dp.fit(step, batches, steps=steps, key=experiment.key, progress=False)
        trained[size] = fit.state.params
        for found, x in ((accuracies, split.x_held_out), (on_shuffled, shuffled)):
            logits = dp.predict(step.net, fit.state.params, jnp.asarray(x), batch_size=1800)
            found.append(100 * float(dp.metrics.accuracy(logits, jnp.asarray(split.y_held_out))))
        experiment.record(f"filters of {size}: held-out accuracy in percent", accuracies[-1])
        experiment.record(f"filters of {size}: the same, characters shuffled", on_shuffled[-1])

    five = sizes.index(5)
    experiment.claim("Filters of 5 characters classify at least 5 points more than filters of 1.",
                     accuracies[five] > accuracies[0] + 5)
    experiment.claim("Filters of 1 character give the same accuracy if the characters are "
                     "shuffled; filters of 5 lose at least 10 points.",
                     accuracies[0] == on_shuffled[0]
                     and accuracies[five] > on_shuffled[five] + 10)

    # One page inside blank space: the place of the text does not change the largest values.
    net, params = classifier(5), trained[5]
    blank = np.full((50, WINDOW), ord(" "), np.int32)
    places = [np.concatenate([blank[:, :before], split.x_held_out[:50], blank[:, before:]], 1)
              for before in (8, 24, 40)]
    logits = np.stack([net(params, jnp.asarray(x)) for x in places])
    moved = experiment.record("largest change of a logit if the text is moved in blank space",
                              np.ptp(logits, axis=0).max())
    experiment.claim("Moving a text inside blank space changes no logit, within 1e-4.",
                     moved < 1e-4)

    drawn = figure(11, 3.8, "A 1-D convolution reads text")
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.5))
    left.plot(sizes, accuracies, "o", ls="-", color=BLUE, label="text")
    left.plot(sizes, on_shuffled, "s", ls="--", color=ORANGE, label="characters shuffled")
    left.axhline(100 / len(PAGES), color="0.5", ls=":", label="chance")
    left.set(title="Accuracy by size of the filters", xlabel="characters of a filter",
             ylabel="held-out accuracy in percent", xticks=sizes, ylim=(0, 100))
    left.legend()
    right.set_axis_off()
    right.set_title("Pieces that excite the filter of a page most")
    for row, (page, texts) in enumerate(favourites(params, split.x, 5)):
        height = 0.9 - 0.15 * row
        right.text(0, height, page, weight="bold", transform=right.transAxes)
        right.text(0.3, height, texts, family="monospace", size=9, transform=right.transAxes)
    experiment.save(drawn, "text_convolution", "Accuracy by the size of the filters, and pieces "
                    "of text that excite them.")


if __name__ == "__main__":
    run(main)
