"""Depth and width on digits: trial and error, since there is no theory that tells which is best.

    python examples/course/depth_and_width.py [--short] [--seed N] [--out FOLDER]

MLPs of 1 to 8 hidden layers and of 4 to 64 features are trained on 300 digits with the same
optimizer, number of steps and batches, three seeds at once by `jax.vmap`, and measured on the
digits left.
"""

from __future__ import annotations

import jax
import numpy as np
import optax
from data import digits
from experiment import Experiment, run
from style import figure

import diffprog as dp

TRAINING, SEEDS = 300, 3


def mlp(depth: int, width: int) -> dp.Layer:
    """`depth` hidden layers of `width` features, with He's initial values."""
    layer = dp.linear(width, kernel_init="he_normal") >> jax.nn.relu
    more = [dp.repeat(depth - 1, layer)] if depth > 1 else []
    return dp.serial(dp.flatten(), layer, *more, dp.linear(10))


def main(experiment: Experiment) -> None:
    """Train all sizes, and draw a heat map of the held-out error."""
    split = digits(seed=experiment.seed)
    training = split.x[:TRAINING], split.y[:TRAINING]
    test = (np.concatenate([split.x[TRAINING:], split.x_held_out]),
            np.concatenate([split.y[TRAINING:], split.y_held_out]))
    depths, widths = experiment.pick((1, 2, 4, 8), (1, 4)), experiment.pick((4, 16, 64), (4, 64))
    steps = experiment.pick(400, 150)
    keys = jax.random.split(experiment.key, SEEDS)
    errors = np.zeros((len(depths), len(widths), SEEDS))
    for at in np.ndindex(len(depths), len(widths)):
        depth, width = depths[at[0]], widths[at[1]]
        step = dp.make_step(mlp(depth, width), dp.classification(),
                            optax.adam(optax.cosine_decay_schedule(1e-2, steps)), donate=False)

        @jax.jit
        @jax.vmap
        def train(state: dp.training.TrainState, step: dp.training.Step = step) -> jax.Array:
            """The held-out accuracy after training on all images at once."""
            state, _ = jax.lax.scan(lambda state, _: (step.apply(state, training)[0], None), state,
                                    length=steps)
            return step.evaluate(state, test)["accuracy"]

        states = jax.vmap(lambda key, step=step: step.init(key, training[0][:1]))(keys)
        errors[at] = 100 * (1 - train(states))
        experiment.record(f"held-out error, depth {depth}, width {width} (percent)",
                          errors[at].mean())

    drawn = figure(6.5, 4.6, f"Held-out error of MLPs on {TRAINING} digits (percent)")
    axes = drawn.subplots()
    mean, deviation = errors.mean(-1), errors.std(-1)
    image = axes.imshow(np.log(mean), aspect="auto")
    for i, j in np.ndindex(mean.shape):
        light = np.log(mean[i, j]) < np.log(mean).mean()
        axes.text(j, i, f"{mean[i, j]:.1f} ± {deviation[i, j]:.1f}", ha="center", va="center",
                  color="white" if light else "black")
    axes.set(xticks=range(len(widths)), xticklabels=widths, yticks=range(len(depths)),
             yticklabels=depths, xlabel="features of a hidden layer", ylabel="hidden layers",
             title=f"Mean and deviation of {SEEDS} seeds")
    axes.grid(False)
    drawn.colorbar(image, ax=axes, label="log of the error")
    experiment.save(drawn, "sizes", "Held-out error by depth and width.")

    experiment.claim("Wider nets err less, at every depth.", bool((mean[:, 0] > mean[:, -1]).all()))
    experiment.claim("Deeper nets do not: at no width do the deepest err less than 0.8 times as "
                     "often as those of one hidden layer.",
                     bool((mean[-1] > 0.8 * mean[0]).all()))


if __name__ == "__main__":
    run(main)
