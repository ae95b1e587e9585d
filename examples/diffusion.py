"""Draw handwritten digits that nobody wrote: diffusion, conditioned on the class, with guidance.

    python examples/diffusion.py [--denoiser unet|dit] [--steps N] [--samples N] [--seed N]
                                 [--out diffusion.png]

Data: scikit-learn's 1,797 images of 8x8 pixels, of which 360 are held out, the same as in
examples/digits.py. The net is shown digits drowned in noise and learns to tell one from the other;
sampling begins with noise alone and takes it away in 50 steps. 1,000 samples, 100 of each class,
are then measured:

- recognized: how many a classifier of real digits (a support vector machine, trained on the same
  images) reads as the class that was asked for;
- deviation: how much samples of a class differ from each other, as the standard deviation of their
  pixels, of that of the real images of the class;
- copies: how many lie nearer to some training image than the nearest 5 % of the held-out digits do.

Takes four to five minutes of CPU time. Expected with seed 0: 99.6 % recognized, a deviation of 0.86
in the class that has the least, 5.3 % copies; with `--denoiser dit` 99.3 %, 0.82 and 2.1 %.
Guidance and steps of sampling were chosen by these three measures, on one training run of the
U-Net.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from digits import load
from sklearn.svm import SVC

import diffprog as dp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, CLASSES = 64, 10
SCHEDULE = dp.diffusion.cosine_noise(1000)
GUIDANCE, SAMPLING_STEPS = 1.2, 50
OPTIONS: Any = {"predict": "velocity", "null_class": CLASSES}


def unet(width: int = 16) -> dp.Layer:
    """Two grids, 8 x 8 and 4 x 4, with attention on the second."""
    net = dp.models.unet(1, widths=(width, 3 * width), depth=1, groups=8, classes=CLASSES)
    return dp.ema(net, 0.99)  # samples by averaged parameters are cleaner


def dit(width: int = 64, depth: int = 4) -> dp.Layer:
    """A Transformer of sixteen patches of 2 x 2 pixels."""
    net = dp.models.dit(1, width=width, depth=depth, heads=4, classes=CLASSES)
    return dp.ema(net, 0.99)


# denoiser -> net, training steps, largest learning rate
DENOISERS = {"unet": (unet, 3000, 3e-3), "dit": (dit, 4000, 2e-3)}


class Measured(NamedTuple):
    """What is measured of samples; deviation is that of the class with the least."""

    recognized: float
    deviation: float
    copies: float


def scaled(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Pixels from -1 to 1, as large as the noise, and the classes."""
    return {"x": 2 * images - 1, "condition": labels}


def train(
    net: dp.Layer, images: dict[str, np.ndarray], steps: int, rate: float, seed: int
) -> dp.training.Fit:
    """Train with Adam and a learning rate that rises and falls once."""
    optimizer = optax.adam(optax.cosine_onecycle_schedule(steps, rate))
    step = dp.make_step(net, dp.diffusion.denoising(SCHEDULE, **OPTIONS), optimizer)
    return dp.fit(step, dp.batches(images, BATCH, seed=seed), key=jax.random.key(seed),
                  steps=steps, log_every=max(steps // 40, 1))


def draw_digits(
    net: dp.Layer, trained: dp.training.TrainState, labels: np.ndarray, seed: int
) -> np.ndarray:
    """Samples of these classes, pixels in [0, 1]."""
    noise = jax.random.normal(jax.random.key(seed), (len(labels), 8, 8, 1))
    x = dp.diffusion.ddim(net, trained.params, noise, SCHEDULE, steps=SAMPLING_STEPS,
        state=trained.state,
                guidance_scale=GUIDANCE, condition=jnp.asarray(labels), **OPTIONS)
    return np.clip((np.asarray(x) + 1) / 2, 0, 1)


def distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """From each image to each of the others, as vectors of pixels: (images, others)."""
    a, b = images.reshape(len(images), -1), others.reshape(len(others), -1)
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))


def measure(
    samples: np.ndarray, labels: np.ndarray, images: Any, held: Any
) -> tuple[Measured, np.ndarray]:
    """The three shares, and which samples were recognized."""
    (x, y), flat = images, lambda x: x.reshape(len(x), -1)
    reader: Any = SVC(C=10).set_params(gamma=0.25).fit(flat(x), y)
    print(f"the classifier reads {100 * reader.score(flat(held[0]), held[1]):.1f} % of the real "
          "held-out digits")
    right = reader.predict(flat(samples)) == labels
    deviation = [samples[labels == digit].std(0).mean() / x[y == digit].std(0).mean()
                 for digit in range(CLASSES)]
    limit = np.quantile(distances(held[0], x).min(1), 0.05)
    copies = distances(samples, x).min(1) < limit
    return Measured(right.mean(), min(deviation), copies.mean()), right


def draw(
    path: pathlib.Path, samples: np.ndarray, right: np.ndarray, x: np.ndarray, held: np.ndarray,
    history: list[dict[str, float]],
) -> None:
    """Ten samples of each class, the learning curve, and how near samples are to what was seen."""
    figure = plt.figure(figsize=(12, 7.5), layout="constrained")
    left, side = np.asarray(figure.subfigures(1, 2, width_ratios=(1.5, 1)))
    left.suptitle("Samples, ten of each class; framed: not recognized as it")
    shown = np.arange(len(samples)).reshape(CLASSES, -1)[:, :10]
    for axes, i in zip(left.subplots(10, 10).flat, shown.flat, strict=True):
        axes.imshow(samples[i, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=not right[i], color="tab:red", linewidth=2)

    above, below = side.subfigures(2, 1, height_ratios=(1.4, 1))
    curve, near = above.subplots(2)
    curve.plot([row["step"] for row in history], [row["loss"] for row in history])
    curve.set(title="Learning curve", xlabel="step", ylabel="squared error", ylim=(0, None))
    between, usual = distances(samples, x), distances(held, x).min(1)
    bins = np.linspace(0, between.min(1).max(), 50)
    for found, label in ((between.min(1), "samples"), (usual, "held-out digits")):
        near.hist(found, bins, density=True, histtype="step", label=label)
    near.axvline(np.quantile(usual, 0.05), color="0.5", ls=":", label="nearest 5 % of held-out")
    near.set(title="Distance to the nearest training image", xlabel="distance", ylabel="density")
    near.legend(fontsize=7, loc="upper left")

    below.suptitle("The nearest samples, above their training images")
    pairs = below.subplots(2, 6)
    for column, i in zip(pairs.T, between.min(1).argsort(), strict=False):
        for axes, image in zip(column, (samples[i], x[between[i].argmin()]), strict=True):
            axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
            axes.set_axis_off()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train, sample, measure, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--denoiser", choices=DENOISERS, default="unet")
    parser.add_argument("--steps", type=int, help="training steps; those of the net if not given")
    parser.add_argument("--samples", type=int, default=100, help="of each class; at least 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("diffusion.png"))
    given = parser.parse_args()

    make, steps, rate = DENOISERS[given.denoiser]
    net, (images, held) = make(), load()
    fit = train(net, scaled(*images), given.steps or steps, rate, given.seed)
    print(f"{given.denoiser}: {dp.tree.count(fit.state.params):,} parameters")

    labels = np.repeat(np.arange(CLASSES), given.samples)
    samples = draw_digits(net, fit.state, labels, given.seed)
    found, right = measure(samples, labels, images, held)
    draw(given.out, samples, right, images[0], held[0], fit.history)
    print(f"picture: {given.out}")
    print(f"recognized {100 * found.recognized:.1f} %, least deviation {found.deviation:.2f} of "
          f"the real one, copies {100 * found.copies:.1f} %")


if __name__ == "__main__":
    main()
