"""Batch norm needs a batch: against layer norm at batch sizes 1 to 64.

    python examples/course/batch_sizes.py [--short] [--seed N] [--out FOLDER]

An MLP on 8 x 8 digits, with either norm behind its hidden layers, takes the same number of steps
with batches of each size. Batch norm standardizes a feature over the batch in training (Ioffe and
Szegedy 2015, arXiv:1502.03167), and with running averages of these statistics at test time; layer
norm standardizes the features of one example in both (Ba, Kiros, Hinton 2016, arXiv:1607.06450).
The held-out digits are classified in both modes. A batch of one has no variance, so that batch norm
refuses it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from data import digits
from experiment import Experiment, run
from style import COLORS, figure

import diffprog as dp

HELD_OUT = 320  # a multiple of all batch sizes
NORMS: dict[str, Callable[[], dp.Layer]] = {
    "batch norm": dp.batch_norm, "layer norm": dp.layer_norm}


def mlp(norm: Callable[[], dp.Layer]) -> dp.Layer:
    """Two hidden layers, each with a norm."""
    hidden = [dp.linear(64), norm(), jax.nn.relu, dp.linear(64), norm(), jax.nn.relu]
    return dp.serial(dp.flatten(), *hidden, dp.linear(10))


def refuses_one(x: jax.Array) -> bool:
    """Whether training on one example with batch norm raises."""
    net = dp.batch_norm()
    params, state = net.init(jax.random.key(0), x[:, 0, :, 0])
    try:
        net.apply(params, state, x[:, 0, :, 0], train=True)
    except dp.LayerError:
        return True
    return False


def main(experiment: Experiment) -> None:
    """Train with each norm and batch size, and classify in both modes."""
    split = digits(seed=experiment.seed)
    x, y = jnp.asarray(split.x_held_out[:HELD_OUT]), jnp.asarray(split.y_held_out[:HELD_OUT])
    sizes, steps = experiment.pick((1, 2, 4, 8, 16, 32, 64), (2, 64)), experiment.pick(600, 300)
    accuracy: dict[tuple[str, str], list[float]] = {
        (norm, mode): [] for norm in NORMS for mode in ("training", "test")}
    apart: dict[str, list[float]] = {norm: [] for norm in NORMS}
    for norm, make in NORMS.items():
        net = mlp(make)
        step = dp.make_step(net, dp.classification(), optax.adam(1e-3))

        @jax.jit
        def classify(params: dict, state: dict, batches: jax.Array, net: dp.Layer = net) -> tuple:
            """Logits in training mode, batch by batch, and at test time."""
            training = jax.lax.map(
                lambda x: net.apply(params, state, x, key=None, train=True)[0], batches)
            test = net(params, batches.reshape(x.shape), state=state)
            return training.reshape(test.shape), test

        for size in sizes:
            if norm == "batch norm" and size == 1:
                continue
            state = dp.fit(step, dp.batches(split[:2], size, seed=experiment.seed), steps=steps,
                           key=experiment.key, progress=False).state
            modes = classify(state.params, state.state, x.reshape(-1, size, *x.shape[1:]))
            for mode, logits in zip(("training", "test"), modes, strict=True):
                percent = 100 * (logits.argmax(-1) == y).mean()
                accuracy[norm, mode].append(experiment.record(
                    f"held-out accuracy, {norm}, batches of {size}, {mode} mode (percent)",
                    percent))
            training, test = (jax.nn.softmax(logits) for logits in modes)
            apart[norm].append(experiment.record(
                f"distance of the probabilities of both modes, {norm}, batches of {size}",
                jnp.abs(training - test).sum(-1).mean() / 2))

    drawn = figure(11, 4, f"Two norms by batch size, {steps} steps each")
    left, right = drawn.subplots(1, 2)
    for norm, color, mark in zip(NORMS, COLORS, "so", strict=False):
        known = sizes[-len(apart[norm]):]
        for mode, dashes in (("training", "--"), ("test", "-")):
            left.plot(known, accuracy[norm, mode], color=color, ls=dashes, marker=mark,
                      label=f"{norm}, {mode} mode")
        right.plot(known, apart[norm], color=color, ls="-", marker=mark, label=norm)
    left.set(xscale="log", xlabel="batch size", ylabel="held-out accuracy (percent)")
    right.set(xscale="log", xlabel="batch size", ylabel="mean total variation",
              title="Distance of the probabilities of both modes")
    for axes in (left, right):
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.legend()
    experiment.save(drawn, "sizes", "Accuracy in both modes, and how far the modes are apart.")

    experiment.claim("In training mode batch norm in batches of two classifies at least 10 points "
                     "less than in batches of 64.", accuracy["batch norm", "training"][0]
                     < accuracy["batch norm", "training"][-1] - 10)
    experiment.claim("The modes of batch norm are further apart in small batches.",
                     apart["batch norm"][0] > 2 * apart["batch norm"][-1])
    experiment.claim("Layer norm is the same in both modes.", max(apart["layer norm"]) < 1e-5)
    experiment.claim("With its smallest batches layer norm classifies at least 20 points more than "
                     "batch norm, at test time.", accuracy["layer norm", "test"][0]
                     > accuracy["batch norm", "test"][0] + 20)
    experiment.claim("Batch norm refuses to train on a batch of one.", refuses_one(x[:1]))


if __name__ == "__main__":
    run(main)
