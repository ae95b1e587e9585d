"""Few examples are learned by heart: what helps against it, and what it does to the weights.

    python examples/course/regularization.py [--short] [--seed N] [--out FOLDER]

An MLP sees 100 digits. It is trained plainly, with L2, L1, dropout, label smoothing, random shifts
of the images, and on twice as many digits, each from four seeds at once by `jax.vmap`. Early
stopping takes the plain net at the step where its loss on half of the other digits is lowest, and
is measured on the other half, as all others.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from data import digits
from experiment import Experiment, run
from style import COLORS, DASHES, figure

import diffprog as dp

TRAINING, SEEDS, READINGS = 100, 4, 20
SMALL = 1e-3  # a weight below is counted as zero


def mlp(dropout: float = 0.0) -> dp.Layer:
    """One hidden layer."""
    return dp.serial(dp.flatten(), dp.linear(128), jax.nn.relu, dp.dropout(dropout), dp.linear(10))


def shifted(objective: Any) -> Any:
    """The objective on images shifted by up to one pixel in training."""
    def moved(net: Any, params: Any, state: Any, batch: Any, *, key: Any, train: bool) -> Any:
        x, y = batch
        if train:
            x = dp.data.random_crop(jax.random.fold_in(key, 0), x, padding=1)
        return objective(net, params, state, (x, y), key=key, train=train)

    return moved


def penalty(f: Any, rate: float) -> Any:
    """Classification with a penalty on the kernels."""
    return dp.training.penalized(dp.classification(), lambda params: rate * f(params, "**/kernel"))


KINDS = {  # name -> net, objective
    "plain": (mlp(), dp.classification()),
    "L2": (mlp(), penalty(dp.losses.l2, 3e-3)),
    "L1": (mlp(), penalty(dp.losses.l1, 1e-3)),
    "dropout": (mlp(0.5), dp.classification()),
    "label smoothing": (mlp(), dp.classification(label_smoothing=0.1)),
    "shifts": (mlp(), shifted(dp.classification())),
    "twice the data": (mlp(), dp.classification()),
}


def main(experiment: Experiment) -> None:
    """Train all kinds, and compare losses, accuracies and weights."""
    split = digits(seed=experiment.seed)
    training = split.x[:TRAINING], split.y[:TRAINING]
    twice = split.x[: 2 * TRAINING], split.y[: 2 * TRAINING]
    rest = np.concatenate([split.x[2 * TRAINING :], split.x_held_out])
    classes = np.concatenate([split.y[2 * TRAINING :], split.y_held_out])
    kinds = experiment.pick(list(KINDS), ["plain", "L2", "L1", "twice the data"])
    half = len(rest) // 2
    selection, test = (rest[:half], classes[:half]), (rest[half:], classes[half:])
    steps = experiment.pick(1000, 300)
    every = steps // READINGS
    keys = jax.random.split(experiment.key, SEEDS)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    plain = mlp()

    def measured(params: Any, data: Any) -> Any:
        logits = plain(params, data[0])
        loss = dp.losses.cross_entropy(logits, data[1]).mean()
        return loss, 100 * (logits.argmax(-1) == data[1]).mean()

    curves, weights = {}, {}
    for name in kinds:
        net, objective = KINDS[name]
        seen = twice if name == "twice the data" else training
        step = dp.make_step(net, objective, optimizer, donate=False)
        # Dropout has no parameters, so that all kinds begin with those of the plain net.
        states = jax.vmap(lambda key, step=step: step.init(key, training[0][:1]))(keys)

        @jax.jit
        @jax.vmap
        def train(state: Any, step: dp.training.Step = step, seen: Any = seen) -> Any:
            """The last state, and (loss, accuracy) on each data at each reading."""
            def read(state: Any, _: None) -> Any:
                state, _ = jax.lax.scan(
                    lambda state, _: (step.apply(state, seen)[0], None), state, length=every)
                return state, [measured(state.params, data)
                               for data in (training, selection, test)]

            return jax.lax.scan(read, state, length=READINGS)

        last, found = train(states)
        curves[name] = [tuple(np.asarray(part) for part in each) for each in found]
        weights[name] = np.abs(np.asarray(last.params["linear_0"]["kernel"])).ravel()

    accuracy = {}
    for name, (_, _, (loss, percent)) in curves.items():
        accuracy[name] = experiment.record(f"test accuracy, {name} (percent)",
                                           percent[:, -1].mean())
        experiment.record(f"test loss, {name} (nats)", loss[:, -1].mean())
    stopped = curves["plain"][1][0].argmin(1)  # by the loss on the selection half
    percent = curves["plain"][2][1][np.arange(SEEDS), stopped]
    accuracy["early stopping"] = experiment.record("test accuracy, early stopping (percent)",
                                                   percent.mean())
    zeros = {name: experiment.record(f"weights of the first layer below {SMALL}, {name} (percent)",
                                     100 * (size < SMALL).mean())
             for name, size in weights.items() if name in ("plain", "L2", "L1")}

    drawn = figure(12, 4, f"An MLP on {TRAINING} digits: mean of {SEEDS} seeds")
    left, middle, right = drawn.subplots(1, 3)
    at = every * np.arange(1, READINGS + 1)
    for (name, each), color, dashes in zip(curves.items(), COLORS, DASHES, strict=False):
        left.plot(at, each[0][0].mean(0), color=color, ls=dashes, label=name)
        middle.plot(at, each[2][0].mean(0), color=color, ls=dashes)
    left.set(yscale="log", ylim=(1e-4, 3), xlabel="step", ylabel="cross-entropy (nats)",
             title="Training digits")
    middle.set(xlabel="step", ylabel="cross-entropy (nats)", title="Test digits")
    left.legend(fontsize=8)
    names = list(accuracy)
    right.barh(names, [accuracy[name] for name in names],
               color=[*COLORS[: len(kinds)], "0.5"])
    right.set(xlim=(min(accuracy.values()) - 3, max(accuracy.values()) + 2),
              xlabel="test accuracy (percent)", title="After the last step")
    experiment.save(drawn, "curves", "Losses on training and test digits, and test accuracy.")

    drawn = figure(8, 3.4, "Weights of the first layer")
    axes = drawn.subplots()
    bins = np.geomspace(1e-8, 2, 60).tolist()
    for name, color, dashes in zip(("plain", "L2", "L1"), COLORS, DASHES, strict=False):
        axes.hist(np.clip(weights[name], bins[0], None), bins, histtype="step", color=color,
                  ls=dashes, lw=1.6, label=f"{name}, {zeros[name]:.0f} % below {SMALL}")
    axes.set(xscale="log", xlabel="size of a weight", ylabel="number of weights")
    axes.legend(loc="upper left")
    experiment.save(drawn, "weights", "Sizes of weights after training: L1 has zeros.")

    losses = {name: [each[i][0][:, -1].mean() for i in (0, 2)] for name, each in curves.items()}
    experiment.claim("The plain net learns its digits by heart: the test loss is more than ten "
                     "times the training loss.", losses["plain"][1] > 10 * losses["plain"][0])
    experiment.claim("L2 and L1 keep the training loss up, more than twice as high.",
                     min(losses["L2"][0], losses["L1"][0]) > 2 * losses["plain"][0])
    experiment.claim("L1 makes at least twice as many weights small as L2.",
                     zeros["L1"] > 2 * zeros["L2"])
    experiment.claim("Twice as many digits help more than any method.",
                     max(accuracy, key=lambda name: accuracy[name]) == "twice the data")


if __name__ == "__main__":
    run(main)
