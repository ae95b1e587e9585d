"""Filters made by hand, and filters that a ConvNet learns.

    python examples/course/filters.py [--short] [--seed N] [--out FOLDER]

The filters of computer vision are kernels that people chose: Sobel's differentiate along one axis
and smooth along the other, second differences find lines, a mean blurs. In a ConvNet they are
parameters. Ten hand-made filters that stay frozen, ten frozen random ones and ten learned ones are
the first layer of the same net. Then the learned filters are compared with the hand-made ones,
which span 6 of the 25 dimensions of kernels of 5 x 5: a random kernel has 24 % of its squared
weights there.
"""

from __future__ import annotations

from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from scipy import ndimage
from style import DIVERGING, bare, figure

import diffprog as dp

SIDE, SIZE = 16, 5
SMOOTH = np.array([1, 4, 6, 4, 1]) / 16
SLOPE = np.array([-1, -2, 0, 2, 1]) / 6        # a first difference
LINE = np.array([-1, 0, 2, 0, -1]) / 4         # a second difference, with minus
RIGHT, DOWN = np.outer(SMOOTH, SLOPE), np.outer(SLOPE, SMOOTH)  # Sobel's filters of 5 x 5
HAND_MADE = {
    "Sobel, right": RIGHT, "left": -RIGHT, "down": DOWN, "up": -DOWN,
    "down right": (RIGHT + DOWN) / 1.4, "up right": (RIGHT - DOWN) / 1.4,
    "upright line": np.outer(SMOOTH, LINE), "level line": np.outer(LINE, SMOOTH),
    "saddle": np.outer(SLOPE, SLOPE), "blur": np.outer(SMOOTH, SMOOTH),
}
KERNEL = np.stack(list(HAND_MADE.values()), -1)[:, :, None].astype(np.float32)  # (5, 5, 1, 10)


def by_hand(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
    """The hand-made filters, as an initializer."""
    return jnp.asarray(KERNEL, dtype).reshape(shape)


FIRST = {
    "hand-made, frozen": dp.freeze(dp.conv(10, SIZE, bias=False, kernel_init=by_hand)),
    "random, frozen": dp.freeze(dp.conv(10, SIZE, bias=False)),
    "learned": dp.conv(10, SIZE, bias=False),
}


def convnet(first: dp.Layer) -> dp.Layer:
    """Two convolutions, each with ReLU and a pool, and a linear layer."""
    return dp.serial(first=first, relu=jax.nn.relu, pool=dp.max_pool(2), second=dp.conv(20, 3),
                     relu_2=jax.nn.relu, pool_2=dp.max_pool(2), flat=dp.flatten(),
                     head=dp.linear(10))


def explained(kernel: Any) -> float:
    """Percent of the squared weights of filters in the span of the hand-made ones."""
    by_filter = KERNEL.reshape(SIZE**2, -1)
    basis = np.linalg.svd(by_filter)[0][:, : np.linalg.matrix_rank(by_filter)]
    flat = np.asarray(kernel).reshape(SIZE**2, -1)
    return 100 * float(((basis.T @ flat) ** 2).sum() / (flat**2).sum())


def enlarged(images: np.ndarray) -> np.ndarray:
    """Images of SIDE x SIDE pixels, on which windows of 5 x 5 are small."""
    return np.asarray(jax.image.resize(images, (len(images), SIDE, SIDE, 1), "linear"))


def main(experiment: Experiment) -> None:
    """Check Sobel's filter, train with three first layers, and draw filters and responses."""
    digits = data.digits(held_out=997, seed=experiment.seed)
    x, x_held_out = enlarged(digits.x), enlarged(digits.x_held_out)
    responses = np.asarray(dp.conv(10, SIZE, bias=False)({"kernel": KERNEL}, x_held_out))
    reference = ndimage.correlate1d(x_held_out[..., 0], SMOOTH, axis=1, mode="constant")
    reference = ndimage.correlate1d(reference, SLOPE, axis=2, mode="constant")
    error = experiment.record("largest difference of Sobel's filter and two 1-D filters of SciPy",
                              abs(responses[..., 0] - reference).max())
    experiment.claim("Sobel's filter is a blur along one axis and a difference along the other, "
                     "within 1e-5.", error < 1e-5)

    seeds, steps = experiment.pick(3, 1), experiment.pick(600, 200)
    accuracies, learned, starts = {}, [], []
    for name, first in FIRST.items():
        # Weight decay removes what is left of the initial values.
        step = dp.make_step(convnet(first), dp.classification(),
                            optax.adamw(3e-3, weight_decay=1.0))
        found = []
        for seed in range(seeds):
            key = jax.random.fold_in(experiment.key, seed)
            fit = dp.fit(step, dp.batches((x, digits.y), 50, seed=seed), steps=steps, key=key,
                         progress=False)
            metrics = dp.evaluate(step, fit.state, [(x_held_out, digits.y_held_out)])
            found.append(100 * metrics["accuracy"])
            if name == "learned":
                starts.append(step.net.init(key, x[:1])[0]["first"]["kernel"])
                learned.append(fit.state.params["first"]["kernel"])
        accuracies[name] = experiment.record(
            f"first layer {name}: held-out accuracy in percent", np.mean(found))
    in_span = {}
    for name, kernels in (("initial", starts), ("learned", learned)):
        in_span[name] = experiment.record(
            f"{name} filters: percent of the squared weights in the span of the hand-made ones",
            explained(np.concatenate(kernels, -1)))
    experiment.claim("Learned filters have twice as much in common with the hand-made ones as "
                     "their initial values.", in_span["learned"] > 2 * in_span["initial"])
    experiment.claim("The net is at most 2 points more accurate with a learned first layer than "
                     "with the hand-made one.",
                     accuracies["learned"] < accuracies["hand-made, frozen"] + 2)

    drawn = figure(11, 5.2, "Filters made by hand and filters that are learned (red positive, "
                   "blue negative)")
    grid = drawn.subplots(4, 11)
    rows = (KERNEL, responses[3][:, :, None], np.asarray(starts[0]), np.asarray(learned[0]))
    names = ("by hand", "", "initial\nvalues", "learned")
    for row, name, kernels in zip(grid, names, rows, strict=True):
        for axes in row:
            bare(axes)
        row[0].set_axis_off()
        row[0].text(0.5, 0.5, name, ha="center", va="center", transform=row[0].transAxes)
        for k, axes in enumerate(row[1:]):
            largest = abs(kernels[..., k]).max()
            axes.imshow(kernels[..., 0, k], cmap=DIVERGING, vmin=-largest, vmax=largest)
    grid[1, 0].imshow(x_held_out[3, ..., 0], cmap="gray_r")
    grid[1, 0].set_title("response to this", size=8)
    for axes, name in zip(grid[0, 1:], HAND_MADE, strict=True):
        axes.set_title(name, size=8)
    experiment.save(drawn, "filters", "Ten hand-made filters and their responses to a digit, and "
                    "ten filters of a ConvNet before and after training.")


if __name__ == "__main__":
    run(main)
