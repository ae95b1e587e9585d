"""Generate handwritten digits: class-conditional diffusion with classifier-free guidance.

    python examples/diffusion.py [--denoiser unet|dit] [--steps N] [--samples N] [--seed N]
                                 [--out diffusion.png]

Data: scikit-learn's 1,797 images of 8x8 pixels, of which 360 are held out, the same as in
examples/digits.py. The net learns to denoise; sampling starts from pure noise and takes 50
steps. Three measures are computed on 1,000 samples, 100 of each class:

- recognized: the fraction whose class a classifier of real digits predicts correctly (a support
  vector machine, trained on the same images);
- diversity: the standard deviation of the pixels of a class over its samples, relative to that over
  its real images;
- copies: the fraction nearer to a training image than the nearest 5 % of the held-out digits.

Takes four to five minutes of CPU time. Expected with seed 0: 99.6 % recognized, a diversity of 0.86
in the class where it is lowest, 5.3 % copies; with `--denoiser dit` 99.3 %, 0.82 and 2.1 %.
Guidance and sampling steps were chosen by these three measures, on one training run of the U-Net.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import load
from sklearn.svm import SVC
from style import plt

import diffprog as dp

BATCH, CLASSES = 64, 10
SCHEDULE = dp.diffusion.cosine_noise(1000)
GUIDANCE, SAMPLING_STEPS = 1.2, 50
OPTIONS: Any = {"predict": "velocity", "null_class": CLASSES}


def unet(width: int = 16) -> dp.Layer:
    """A U-Net of two resolutions, 8 x 8 and 4 x 4, with attention at the second."""
    net = dp.models.unet(1, widths=(width, 3 * width), depth=1, groups=8, classes=CLASSES)
    return dp.ema(net, 0.99)  # averaged parameters give cleaner samples


def dit(width: int = 64, depth: int = 4) -> dp.Layer:
    """A Transformer of sixteen patches of 2 x 2 pixels."""
    net = dp.models.dit(1, width=width, depth=depth, heads=4, classes=CLASSES)
    return dp.ema(net, 0.99)


# denoiser -> net, training steps, largest learning rate
DENOISERS = {"unet": (unet, 3000, 3e-3), "dit": (dit, 4000, 2e-3)}


class Measures(NamedTuple):
    """The three measures of samples; diversity is that of the class where it is lowest."""

    recognized: float
    diversity: float
    copies: float


def as_batch(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of images with pixels scaled to [-1, 1], like the noise, and their classes."""
    return {"x": 2 * images - 1, "condition": labels}


def train(
    net: dp.Layer, images: dict[str, np.ndarray], steps: int, rate: float, seed: int
) -> dp.training.Fit:
    """Train with Adam and a one-cycle learning rate."""
    optimizer = optax.adam(optax.cosine_onecycle_schedule(steps, rate))
    step = dp.make_step(net, dp.diffusion.denoising(SCHEDULE, **OPTIONS), optimizer)
    return dp.fit(step, dp.batches(images, BATCH, seed=seed), key=jax.random.key(seed),
                  steps=steps, log_every=max(steps // 40, 1))


def sample_digits(
    net: dp.Layer, trained: dp.training.TrainState, labels: np.ndarray, seed: int
) -> np.ndarray:
    """Samples of the classes `labels`, with pixels in [0, 1]."""
    noise = jax.random.normal(jax.random.key(seed), (len(labels), 8, 8, 1))
    x = dp.diffusion.ddim(
        net, trained.params, noise, SCHEDULE, steps=SAMPLING_STEPS, state=trained.state,
        guidance_scale=GUIDANCE, condition=jnp.asarray(labels), **OPTIONS)
    return np.clip((np.asarray(x) + 1) / 2, 0, 1)


def distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distances between the pixels of each image and each other: (images, others)."""
    a, b = images.reshape(len(images), -1), others.reshape(len(others), -1)
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))


def measure(
    samples: np.ndarray, labels: np.ndarray, images: Any, held_out: Any
) -> tuple[Measures, np.ndarray]:
    """The three measures, and which samples are recognized."""
    (x, y), flat = images, lambda x: x.reshape(len(x), -1)
    classifier: Any = SVC(C=10).set_params(gamma=0.25).fit(flat(x), y)
    print("accuracy of the classifier on real held-out digits: "
          f"{100 * classifier.score(flat(held_out[0]), held_out[1]):.1f} %")
    recognized = classifier.predict(flat(samples)) == labels
    diversity = [samples[labels == digit].std(0).mean() / x[y == digit].std(0).mean()
                 for digit in range(CLASSES)]
    limit = np.quantile(distances(held_out[0], x).min(1), 0.05)
    copies = distances(samples, x).min(1) < limit
    return Measures(recognized.mean(), min(diversity), copies.mean()), recognized


def draw(
    path: pathlib.Path, samples: np.ndarray, recognized: np.ndarray, x: np.ndarray,
    held_out: np.ndarray, history: list[dict[str, float]],
) -> None:
    """Ten samples of each class, the learning curve, and distances to training images."""
    figure = plt.figure(figsize=(12, 7.5))
    left, side = np.asarray(figure.subfigures(1, 2, width_ratios=(1.5, 1)))
    left.suptitle("Ten samples of each class; framed: not recognized")
    shown = np.arange(len(samples)).reshape(CLASSES, -1)[:, :10]
    for axes, i in zip(left.subplots(10, 10).flat, shown.flat, strict=True):
        axes.imshow(samples[i, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=not recognized[i], color="tab:red", linewidth=2)

    above, below = side.subfigures(2, 1, height_ratios=(1.4, 1))
    curve, histogram = above.subplots(2)
    curve.plot([row["step"] for row in history], [row["loss"] for row in history])
    curve.set(title="Learning curve", xlabel="step", ylabel="squared error", ylim=(0, None))
    distance, reference = distances(samples, x), distances(held_out, x).min(1)
    bins = np.linspace(0, distance.min(1).max(), 50)
    for found, label in ((distance.min(1), "samples"), (reference, "held-out digits")):
        histogram.hist(found, bins, density=True, histtype="step", label=label)
    histogram.axvline(np.quantile(reference, 0.05), color="0.5", ls=":",
                      label="nearest 5 % of held-out")
    histogram.set(title="Distance to the nearest training image", xlabel="distance",
                  ylabel="density")
    histogram.legend(fontsize=7, loc="upper left")

    below.suptitle("Nearest samples (above) and training images")
    pairs = below.subplots(2, 6)
    for column, i in zip(pairs.T, distance.min(1).argsort(), strict=False):
        for axes, image in zip(column, (samples[i], x[distance[i].argmin()]), strict=True):
            axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
            axes.set_axis_off()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train, sample, measure and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--denoiser", choices=DENOISERS, default="unet")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the net)")
    parser.add_argument("--samples", type=int, default=100, help="per class; at least 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("diffusion.png"))
    args = parser.parse_args()

    make, steps, rate = DENOISERS[args.denoiser]
    net, (images, held_out) = make(), load()
    fit = train(net, as_batch(*images), args.steps or steps, rate, args.seed)
    print(f"{args.denoiser}: {dp.tree.count(fit.state.params):,} parameters")

    labels = np.repeat(np.arange(CLASSES), args.samples)
    samples = sample_digits(net, fit.state, labels, args.seed)
    found, recognized = measure(samples, labels, images, held_out)
    draw(args.out, samples, recognized, images[0], held_out[0], fit.history)
    print(f"picture: {args.out}")
    print(f"recognized {100 * found.recognized:.1f} %, lowest diversity {found.diversity:.2f}, "
          f"copies {100 * found.copies:.1f} %")


if __name__ == "__main__":
    main()
