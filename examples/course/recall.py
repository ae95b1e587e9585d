"""Recall over a gap: how far back each kind of sequence net remembers.

    python examples/course/recall.py [--short] [--seed N] [--out FOLDER]

One of eight symbols stands somewhere in random filler, and at the question mark at the end the net
must name it. A recurrent net carries the symbol through every step of the gap; attention looks at
it directly, so that the distance does not matter. Each net is trained on all distances at once,
with the same batches, optimizer and width, and measured at each.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from experiment import Experiment, run
from style import COLORS, DASHES, figure

import diffprog as dp

SYMBOLS, FILLER, WIDTH, BATCH = 8, 8, 32, 32
QUESTION = SYMBOLS + FILLER


@dp.program(head=dp.attention_head(WIDTH))
def attend(layers: Any, x: jax.Array) -> jax.Array:
    """The question, one query (batch, 1, WIDTH), attends to all steps of x."""
    question = x[:, -1:]
    return question + layers.head(question, memory=x)


BODIES = {
    "simple RNN": dp.recurrent(dp.simple_rnn(WIDTH)),
    "LSTM": dp.recurrent(dp.lstm(WIDTH)),
    "GRU": dp.recurrent(dp.gru(WIDTH)),
    "attention": attend,
}


def draw(
    rng: np.random.Generator, shape: tuple[int, ...], gaps: list[int], longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (*shape, longest + 1) with a symbol one of the gaps before the end, and these."""
    x = rng.integers(SYMBOLS, QUESTION, (*shape, longest + 1)).astype(np.int32)
    symbols = rng.integers(SYMBOLS, size=shape).astype(np.int32)
    where = longest - rng.choice(gaps, shape)
    np.put_along_axis(x, where[..., None], symbols[..., None], -1)
    x[..., -1] = QUESTION
    return x, symbols


def trained(step: dp.training.Step, keys: jax.Array, batches: Any) -> Any:
    """The states after a step on each batch, for each key."""
    def one(key: jax.Array) -> Any:
        state = step.init(key, batches[0][0])
        return jax.lax.scan(
            lambda state, batch: (step.apply(state, batch)[0], None), state, batches)[0]

    return jax.jit(jax.vmap(one))(keys)


def main(experiment: Experiment) -> None:
    """Train each net on all distances, and draw the accuracy over the distance."""
    gaps = experiment.pick([5, 10, 20, 50, 100, 200], [5, 80])
    kinds = experiment.pick(list(BODIES), ["simple RNN", "attention"])
    keys = jax.random.split(experiment.key, experiment.pick(3, 1))
    rng, longest = experiment.rng, max(gaps)
    batches = draw(rng, (experiment.pick(400, 150), BATCH), gaps, longest)
    tests = [draw(rng, (512,), [gap], longest) for gap in gaps]

    found = {}
    for kind in kinds:
        net = (dp.embedding(QUESTION + 1, WIDTH) >> BODIES[kind] >> dp.collapse("last")
               >> dp.linear(SYMBOLS))
        step = dp.make_step(net, dp.classification(), optax.adam(3e-3), donate=False)
        states = trained(step, keys, batches)
        evaluate = jax.jit(jax.vmap(step.evaluate, (0, None)))
        found[kind] = [100 * evaluate(states, test)["accuracy"] for test in tests]
        for gap, of_gap in zip(gaps, found[kind], strict=True):
            experiment.record(f"accuracy of {kind} over {gap} steps, percent", of_gap.mean())

    drawn = figure(8, 4, "Naming a symbol after a gap of filler")
    axes = drawn.subplots()
    for (kind, accuracies), color, dashes in zip(found.items(), COLORS, DASHES, strict=False):
        mean = [float(of_gap.mean()) for of_gap in accuracies]
        spread = [float(of_gap.std()) for of_gap in accuracies]
        axes.errorbar(gaps, mean, spread, color=color, ls=dashes, marker="o", label=kind)
    axes.axhline(100 / SYMBOLS, color="0.6", lw=1)
    axes.set(xscale="log", ylim=(0, 105), xlabel="distance of the symbol from the question, steps",
             ylabel="accuracy (percent); grey: a guess", xticks=gaps, xticklabels=gaps)
    axes.minorticks_off()
    drawn.legend(loc="outside right center")
    experiment.save(drawn, "recall", "Accuracy of recall over the distance, mean and deviation.")

    near, far = ({kind: found[kind][i].mean() for kind in kinds} for i in (0, -1))
    experiment.claim("Attention recalls over all distances.",
                     min(of_gap.mean() for of_gap in found["attention"]) > 95)
    experiment.claim("A simple RNN recalls over the smallest distance at least 10 points more "
                     "often than over the largest.", near["simple RNN"] > far["simple RNN"] + 10)


if __name__ == "__main__":
    run(main)
