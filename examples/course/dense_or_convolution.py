"""A convolution needs few parameters, however large the image: its weights are shared.

    python examples/course/dense_or_convolution.py [--short] [--seed N] [--out FOLDER]

A dense layer from an image of side S with C channels to F features at each pixel has
(S S C + 1) S S F parameters, a convolution of size K has (K K C + 1) F. Both are counted by
`dp.summary`, which needs shapes only. Then both are the hidden layer of a classifier of digits,
which is also tested on digits that are moved. A convolution moves its output with the input; but if
a linear layer over all places follows, it has learned nothing for other places, as the dense layer.
Only with the maximum over places at the end the net does not notice.
"""

from __future__ import annotations

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from style import BLUE, GREEN, ORANGE, figure

import diffprog as dp

SIDES = (8, 16, 32, 64, 128, 224)
CHANNELS, FEATURES, SIZE = 3, 16, 3


def dense(side: int, features: int = FEATURES) -> dp.Layer:
    """A feature map of an image, each entry of which depends on all pixels."""
    return dp.flatten() >> dp.linear(side * side * features) >> dp.reshape((side, side, features))


def convolution(features: int = FEATURES) -> dp.Layer:
    """A feature map of the same shape, each entry of which depends on its window."""
    return dp.conv(features, SIZE)


def framed(x: np.ndarray, right: int = 0) -> np.ndarray:
    """Digits in a frame of two pixels, in its middle or so many pixels right of it."""
    return np.pad(x, ((0, 0), (2, 2), (2 + right, 2 - right), (0, 0)))


def classifiers() -> dict[str, dp.Layer]:
    """A linear layer over all places, after each layer; and one after the maximum over places."""
    def all_places(layer: dp.Layer) -> dp.Layer:
        return layer >> jax.nn.relu >> dp.max_pool(2) >> dp.flatten() >> dp.linear(10)

    return {
        "dense": all_places(dense(12)),
        "convolution": all_places(convolution()),
        "convolutions, maximum": (convolution() >> jax.nn.relu >> convolution(48) >> jax.nn.relu
                                  >> dp.global_max_pool() >> dp.linear(10)),
    }


def main(experiment: Experiment) -> None:
    """Count parameters by the side of the image, and compare both layers in a classifier."""
    counted = {"dense": [], "convolution": []}
    for side in SIDES:
        x = jax.ShapeDtypeStruct((1, side, side, CHANNELS), jnp.float32)
        for name, layer in (("dense", dense(side)), ("convolution", convolution())):
            assert layer.plan(x).y.shape == (1, side, side, FEATURES)
            counted[name].append(dp.summary(layer, x).parameters)
    pixels = np.square(SIDES).astype(object)                           # Python ints: no overflow
    formulas = {"dense": (pixels * CHANNELS + 1) * pixels * FEATURES,
                "convolution": (SIZE**2 * CHANNELS + 1) * FEATURES}
    for name, counts in counted.items():
        experiment.record(f"parameters of the {name} layer at {SIDES[-1]} x {SIDES[-1]} x 3",
                          counts[-1])
    experiment.claim("The counts are (S S C + 1) S S F and (K K C + 1) F.", all(
        (np.array(counts, object) == formulas[name]).all() for name, counts in counted.items()))
    experiment.claim("At 224 x 224 pixels the dense layer has more than a hundred billion "
                     "parameters, the convolution 448.",
                     counted["dense"][-1] > 1e11 and counted["convolution"][-1] == 448)

    digits = data.digits(seed=experiment.seed)
    x = framed(digits.x)
    tested = {"as in training": framed(digits.x_held_out),
              "moved by 2 pixels": framed(digits.x_held_out, 2)}
    sizes = experiment.pick((50, 100, 200, 400, 800), (400,))
    accuracies = {}
    nets = classifiers()
    for name, net in nets.items():
        experiment.record(f"parameters of the classifier, {name}",
                          dp.summary(net, x[:1]).parameters)
        step = dp.make_step(net, dp.classification(), optax.adam(5e-3))
        for size in sizes:
            batches = dp.batches((x[:size], digits.y[:size]), 50, seed=experiment.seed)
            fit = dp.fit(step, batches, steps=experiment.pick(400, 200), key=experiment.key,
                         progress=False)
            for where, held_out in tested.items():
                found = dp.evaluate(step, fit.state, [(held_out, digits.y_held_out)])
                accuracies[name, where, size] = 100 * found["accuracy"]
                if size == 400:
                    experiment.record(f"{name}, 400 digits, {where}: held-out accuracy in percent",
                                      100 * found["accuracy"])

    drawn = figure(11, 4, "A dense layer against a convolution of 3 x 3")
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.3))
    for name, color, dashes in (("dense", ORANGE, "--"), ("convolution", BLUE, "-")):
        left.plot(SIDES, counted[name], "o", ls=dashes, color=color, label=name)
    for name, color, marker in zip(nets, (ORANGE, BLUE, GREEN), "so^", strict=True):
        for where, dashes in zip(tested, ("-", ":"), strict=True):
            right.plot(sizes, [accuracies[name, where, size] for size in sizes], marker, ls=dashes,
                       color=color, label=f"{name}, {where}",
                       markerfacecolor=color if dashes == "-" else "white")
    left.set(xscale="log", yscale="log", xlabel="side of the image in pixels", xticks=SIDES,
             xticklabels=SIDES, ylabel="parameters", title="One layer, 3 channels to 16 features")
    right.set(xscale="log", xlabel="digits for training", ylabel="held-out accuracy in percent",
              title="Digits in a frame", xticks=sizes, xticklabels=sizes, ylim=(0, 103))
    for axes in (left, right):
        axes.minorticks_off()
    left.legend()
    right.legend(loc="center left", bbox_to_anchor=(0, 0.5), fontsize=8)
    experiment.save(drawn, "dense_or_convolution", "Parameters by the side of the image, and "
                    "accuracy by the number of digits.")
    plain, shifted = ({name: accuracies[name, where, 400] for name in nets} for where in tested)
    experiment.claim("With 400 digits a convolution is as accurate as a dense layer, within 5 "
                     "points, in a classifier with a fiftieth of the parameters.",
                     abs(plain["dense"] - plain["convolution"]) < 5)
    experiment.claim("If digits are moved by 2 pixels, both nets fall below 40 %: a linear layer "
                     "over all places follows.",
                     max(shifted["dense"], shifted["convolution"]) < 40)
    experiment.claim("With the maximum over places at the end, moving digits costs less than 2 "
                     "points.", plain["convolutions, maximum"]
                     - shifted["convolutions, maximum"] < 2)


if __name__ == "__main__":
    run(main)
