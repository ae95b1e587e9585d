"""An MLP does not know which pixels are neighbours; a ConvNet does.

    python examples/course/permuted_pixels.py [--short] [--seed N] [--out FOLDER]

The pixels of all digits are permuted by one fixed permutation. If the rows of an MLP's first kernel
are permuted with them, all pre-activations are the same sums in another order: each later number of
the training is the same up to rounding. So the MLP learns as well from permuted pixels. The kernel
of a convolution has no row for each pixel that could be permuted, and its windows hold strangers.
"""

from __future__ import annotations

import itertools
from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from style import BLUE, ORANGE, bare, figure

import diffprog as dp

MLP = dp.serial(flat=dp.flatten(), first=dp.linear(128), relu=jax.nn.relu, second=dp.linear(64),
                relu_2=jax.nn.relu, head=dp.linear(10))
CONVNET = dp.serial(first=dp.conv(16, 3), relu=jax.nn.relu, pool=dp.max_pool(2),
                    second=dp.conv(32, 3), relu_2=jax.nn.relu, pool_2=dp.max_pool(2),
                    flat=dp.flatten(), head=dp.linear(10))


def training(step: dp.training.Step, state: Any, images: Any, steps: int) -> tuple[Any, np.ndarray]:
    """The last state, and the loss of each step."""
    losses = []
    for batch in itertools.islice(dp.batches(images, 32, seed=0), steps):
        state, metrics = step.apply(state, batch)
        losses.append(metrics["loss"])
    return state, np.array(losses)


def main(experiment: Experiment) -> None:
    """Train each net on digits and on permuted digits, from the same initial values."""
    images = data.digits(held_out=1397, seed=experiment.seed)
    order = experiment.rng.permutation(64)
    steps = experiment.pick(400, 200)

    def permuted(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, 64)[:, order].reshape(x.shape)

    drawn = figure(11, 3.6, "One fixed permutation of the pixels")
    pictures, *curves = np.asarray(drawn.subfigures(1, 3, width_ratios=(0.8, 1, 1)))
    for row, (label, x) in zip(pictures.subplots(2, 3), (
            ("digits", images.x), ("permuted", permuted(images.x))), strict=True):
        for i, axes in enumerate(row):
            axes.imshow(x[i, ..., 0], cmap="gray_r")
            bare(axes)
        row[0].set_title(label)

    losses, accuracies = {}, {}
    for (name, net), part in zip({"MLP": MLP, "ConvNet": CONVNET}.items(), curves, strict=True):
        step = dp.make_step(net, dp.classification(), optax.sgd(0.05, momentum=0.9), donate=False)
        state = step.init(experiment.key, images.x[:1])
        moved = state
        if name == "MLP":
            kernel = state.params["first"]["kernel"][jnp.array(order)]  # (64, 128)
            first = state.params["first"] | {"kernel": kernel}
            moved = state._replace(params=state.params | {"first": first})
        axes = part.subplots()
        for label, start, change, color in (("digits", state, np.asarray, BLUE),
                                            ("permuted", moved, permuted, ORANGE)):
            last, found = training(step, start, (change(images.x), images.y), steps)
            held_out = change(images.x_held_out), images.y_held_out
            losses[name, label] = found
            accuracies[name, label] = experiment.record(
                f"{name} on {label}: held-out accuracy in percent",
                100 * dp.evaluate(step, last, [held_out])["accuracy"])
            axes.plot(found, color=color, ls="-" if label == "digits" else "--", label=label)
        axes.set(title=f"{name}: training loss", yscale="log", xlabel="step",
                 ylabel="loss in nats", ylim=(3e-3, 4))
        axes.legend()
    experiment.save(drawn, "permuted_pixels", "The same digits with permuted pixels, and the "
                    "training losses of an MLP whose first kernel is permuted as well, and of a "
                    "ConvNet.")

    differences = {name: float(abs(losses[name, "digits"] - losses[name, "permuted"]).max())
                   for name in ("MLP", "ConvNet")}
    for name, difference in differences.items():
        experiment.record(f"{name}: largest difference of the loss of a step in nats", difference)
    experiment.claim("An MLP whose first kernel is permuted with the pixels has the same training "
                     "losses, within 1e-5.", differences["MLP"] < 1e-5)
    experiment.claim("A ConvNet has other losses on permuted pixels, and classifies fewer digits.",
                     differences["ConvNet"] > 0.1 and
                     accuracies["ConvNet", "digits"] > accuracies["ConvNet", "permuted"] + 1)
    experiment.claim("The ConvNet is better than the MLP on digits, and worse on permuted ones.",
                     accuracies["ConvNet", "digits"] > accuracies["MLP", "digits"] + 0.2 and
                     accuracies["ConvNet", "permuted"] < accuracies["MLP", "permuted"] - 0.2)


if __name__ == "__main__":
    run(main)
