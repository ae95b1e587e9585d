"""Each architecture assumes something about its data, wins where it is true, and loses elsewhere.

    python examples/course/no_free_lunch.py [--short] [--seed N] [--out FOLDER]

An MLP, a ConvNet and a Transformer classify four kinds of data, from few examples: digits; the same
digits with one fixed permutation of the pixels; windows of text, by the page that they are from;
and digits as sets of points in random order. The MLP assumes that an entry means the same in each
example, the ConvNet that neighbours belong together wherever they are, and the Transformer without
positions, on sets, that order means nothing. All take the same number of training steps.
"""

from __future__ import annotations

import functools
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from style import BLACK, figure

import diffprog as dp

POINTS, WINDOW, VOCABULARY, WIDTH = 20, 32, 128, 32
LONGEST = sorted(topics, key=lambda name: -len(topics[name]))[:6]
TRAINING = 400  # images, and sets


class Kind(NamedTuple):
    """One kind of data.

    Attributes:
        split: examples and classes.
        embed: the first layer of all nets.
        dims: spatial axes of an example, for the ConvNet.
        tokens: from an example to vectors (batch, tokens, WIDTH), for the Transformer.
    """

    split: data.Split
    embed: Any
    dims: int
    tokens: Any


def as_sets(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points (row, column, ink) of pixels with ink, POINTS of each image in random order."""
    ink = images[..., 0].reshape(-1, 64)
    order = np.argsort((ink == 0) + rng.uniform(size=ink.shape), 1)[:, :POINTS]
    rows, columns = np.divmod(order, 8)
    return np.stack([rows / 3.5 - 1, columns / 3.5 - 1, np.take_along_axis(ink, order, 1)],
                    -1).astype(np.float32)



def kinds(experiment: Experiment) -> dict[str, Kind]:
    """The four kinds of data."""
    rng = experiment.rng
    digits = data.digits(held_out=1797 - TRAINING, seed=experiment.seed)
    order = rng.permutation(64)
    permuted = digits._replace(**{name: getattr(digits, name).reshape(-1, 64)[:, order].reshape(
        -1, 8, 8, 1) for name in ("x", "x_held_out")})
    sets = digits._replace(x=as_sets(digits.x, rng), x_held_out=as_sets(digits.x_held_out, rng))
    none = dp.serial()
    patches = dp.patches(2) >> dp.linear(WIDTH) >> dp.learned_positions(
        16, embedding_init=jax.nn.initializers.normal(0.5))
    words = dp.linear(WIDTH) >> dp.sinusoidal_positions()
    found = {
        "digits": Kind(digits, none, 2, patches),
        "permuted digits": Kind(permuted, none, 2, patches),
        "sets of points": Kind(sets, none, 1, dp.linear(WIDTH)),
    }
    if not experiment.short:
        pages = data.windows(rng, LONGEST, WINDOW, VOCABULARY, (1000, 200))
        found["text"] = Kind(pages, dp.embedding(VOCABULARY, WIDTH), 1, words)
    return found


def mlp(kind: Kind) -> dp.Layer:
    """Two hidden layers over all entries."""
    return kind.embed >> dp.flatten() >> dp.models.mlp((128, 64), 10)


def convnet(kind: Kind) -> dp.Layer:
    """Two convolutions, a pool between them, and the largest value of each channel at the end."""
    dims = kind.dims
    return (kind.embed >> dp.conv(24, 3, dims=dims) >> jax.nn.relu >> dp.max_pool(2, dims=dims)
            >> dp.conv(48, 3, dims=dims) >> jax.nn.relu >> dp.global_max_pool(dims=dims)
            >> dp.linear(10))


def transformer(kind: Kind) -> dp.Layer:
    """A block of self-attention over tokens, and their mean."""
    body = dp.models.transformer_encoder(1, heads=4, hidden=2 * WIDTH, norm_first=True)
    return kind.embed >> kind.tokens >> body >> dp.collapse("mean") >> dp.linear(10)


ARCHITECTURES = {"MLP": mlp, "ConvNet": convnet, "Transformer": transformer}


def main(experiment: Experiment) -> None:
    """Train each architecture on each kind of data, and draw the table."""
    seeds, steps = experiment.pick(3, 1), experiment.pick(500, 200)
    data_of = kinds(experiment)
    rate = optax.cosine_onecycle_schedule(steps, 4e-3)

    @functools.cache
    def step_of(net: dp.Layer) -> dp.training.Step:
        return dp.make_step(net, dp.classification(), optax.adam(rate))

    table = np.zeros((len(data_of), len(ARCHITECTURES), seeds))
    for i, (kind_name, kind) in enumerate(data_of.items()):
        split = kind.split
        for j, (name, architecture) in enumerate(ARCHITECTURES.items()):
            step = step_of(architecture(kind))                         # equal nets compile once
            for seed in range(seeds):
                key = jax.random.fold_in(experiment.key, seed)
                batches = dp.batches((split.x, split.y), 50, seed=seed)
                fit = dp.fit(step, batches, steps=steps, key=key, progress=False)
                logits = dp.predict(step.net, fit.state.params, jnp.asarray(split.x_held_out),
                                    batch_size=1400)
                table[i, j, seed] = 100 * dp.metrics.accuracy(
                    logits, jnp.asarray(split.y_held_out))
            experiment.record(f"{kind_name}, {name}: held-out accuracy in percent",
                              table[i, j].mean())
    means = table.mean(-1)

    drawn = figure(7.5, 4.2, "Held-out accuracy in percent: no architecture wins everywhere")
    axes = drawn.subplots()
    behind = means.max(1, keepdims=True) - means
    shown = axes.imshow(-behind, cmap="cividis", vmin=-10, vmax=0, aspect="auto")
    for (i, j), mean in np.ndenumerate(means):
        best = behind[i, j] == 0
        axes.text(j, i, f"{mean:.1f}" + (f" ± {table[i, j].std(ddof=1):.1f}" if seeds > 1 else "")
                  + ("\nbest" if best else ""), ha="center", va="center",
                  color=BLACK if behind[i, j] < 5 else "white", weight="bold" if best else None)
    axes.set(xticks=range(len(ARCHITECTURES)), xticklabels=ARCHITECTURES,
             yticks=range(len(data_of)), yticklabels=data_of)
    axes.grid(False)
    drawn.colorbar(shown, label="points behind the best", extend="min")
    experiment.save(drawn, "no_free_lunch", "Three architectures on four kinds of data; mean ± "
                    "deviation over three seeds.")

    of = {(kind, name): means[i, j] for i, kind in enumerate(data_of)
          for j, name in enumerate(ARCHITECTURES)}
    slack = experiment.pick(0.0, 1.0)  # points, as a short run has one seed
    experiment.claim("The ConvNet wins on digits, and the Transformer is worst.",
                     means[0, 1] > means[0, 0] - slack and means[0].argmin() == 2)
    experiment.claim("On permuted digits the MLP wins, and the ConvNet falls behind it.",
                     means[1].argmax() == 0)
    experiment.claim("The permutation costs the ConvNet more than the MLP.",
                     of["digits", "ConvNet"] - of["permuted digits", "ConvNet"]
                     > of["digits", "MLP"] - of["permuted digits", "MLP"] + 0.5)
    experiment.claim("On sets in random order the Transformer wins by over 20 points, and the MLP "
                     "is worst.", means[2, 2] > max(means[2, :2]) + 20 and means[2].argmin() == 0)
    if not experiment.short:
        experiment.claim("On text the ConvNet wins, whose filters find a piece of a word wherever "
                         "it stands.", means[3].argmax() == 1)


if __name__ == "__main__":
    run(main)
