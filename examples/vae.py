"""A variational autoencoder of handwritten digits with two latent variables.

    python examples/vae.py [--steps N] [--seed N] [--out vae.png]

Data: scikit-learn's 1,797 digits of 8x8 pixels, binarized; 360 are held out. Labels are
not used in training. Two measures are computed on held-out digits: the negative evidence lower
bound (ELBO) in nats per image, a mean over 100 samples of the latent variables, beside two
baselines with independent pixels, of one probability for all pixels and of one for each; and the
accuracy of a classification by the five nearest neighbours in the latent plane.

Takes half a minute on two cores (19 s of CPU time). Expected: 19.1 nats, 14.7 of them for the
reconstruction and 4.4 for the KL divergence (independent pixels: 25.2); 83 % of the held-out digits
are classified correctly. Width and steps were chosen on 287 of the training digits.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import load
from sklearn.neighbors import KNeighborsClassifier
from style import plt

import diffprog as dp

BATCH, PIXELS = 64, 64


class Terms(NamedTuple):
    """The two terms of the negative ELBO, in nats per image."""

    reconstruction: float
    kl: float


def autoencoder(width: int = 256) -> dp.Layer:
    """The encoder, from pixels to a normal distribution over the latent plane, and the decoder.

    The decoder maps a latent point to the logits of pixels. Both have two hidden layers.
    """
    hidden = dp.serial(dp.linear(width), dp.gelu, dp.linear(width), dp.gelu)
    latent = dp.branch(mean=dp.linear(2), log_variance=dp.linear(2))
    return dp.models.vae(dp.serial(body=hidden, latent=latent),
                  dp.serial(body=hidden, head=dp.linear(PIXELS)))


def binarized(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pixels as 0 or 1, (N, 64); and the labels, which are used for evaluation only."""
    x, y = images
    return (x.reshape(len(x), PIXELS) >= 0.5).astype(np.float32), y


def baseline_nats(training: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """The negative log-likelihood in nats per held-out image, of independent pixels."""
    by_pixel = (training.sum(0) + 1) / (len(training) + 2)  # smoothed: none is 0 or 1
    probabilities = {"one probability for all": np.full(PIXELS, training.mean()),
                     "one per pixel": by_pixel}
    return {name: float(-(held_out * np.log(p) + (1 - held_out) * np.log(1 - p)).sum(1).mean())
            for name, p in probabilities.items()}


def negative_elbo(net: dp.Layer, params: Any, x: np.ndarray, samples: int = 100) -> Terms:
    """The terms of the negative ELBO, means over images and over samples of z."""

    @jax.jit
    def sample_terms(key: jax.Array) -> Any:
        _, (_, metrics) = dp.training.elbo()(net, params, {}, (x, x), key=key, train=False)
        return metrics["reconstruction"], metrics["kl"]

    found = [sample_terms(key) for key in jax.random.split(jax.random.key(1), samples)]
    return Terms(*np.mean(found, 0).tolist())


def train(net: dp.Layer, x: np.ndarray, steps: int, seed: int) -> dp.training.Fit:
    """Train with Adam and a one-cycle learning rate; print the terms."""
    optimizer = optax.adam(optax.cosine_onecycle_schedule(steps, 3e-3))
    step = dp.make_step(net, dp.training.elbo(), optimizer)
    print("step   reconstruction     kl    (nats per training image)")

    def log(number: int, row: dict[str, float]) -> None:
        print(f"{number:5}   {row['reconstruction']:14.2f}  {row['kl']:5.2f}")

    return dp.fit(step, dp.batches((x, x), BATCH, seed=seed), key=jax.random.key(seed),
                  steps=steps, log_every=max(steps // 20, 1), log=log, progress=False)


def draw(
    path: pathlib.Path, net: dp.Layer, fit: dp.training.Fit, means: np.ndarray,
    labels: np.ndarray, baseline: dict[str, float],
) -> None:
    """The decoded latent plane, the held-out digits in it, and the learning curve."""
    params, side = fit.state.params, 15
    quantiles = [NormalDist().inv_cdf((i + 0.5) / side) for i in range(side)]
    grid = np.stack(np.meshgrid(quantiles, quantiles[::-1]), -1).reshape(-1, 2).astype(np.float32)
    ink = jax.nn.sigmoid(net.children["decoder"](params["decoder"], jnp.asarray(grid)))
    tiles = np.pad(np.asarray(ink).reshape(side, side, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)))
    sheet = tiles.swapaxes(1, 2).reshape(10 * side, 10 * side)

    figure = plt.figure(figsize=(14, 7.5))
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1.05, 1)))
    axes = left.subplots()
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
    ticks = range(0, side, 2)
    marks = [f"{quantiles[i]:.1f}" for i in ticks]
    axes.set(title="Decoder output over the latent plane\n(at quantiles of the prior)",
             xlabel="first latent variable", ylabel="second latent variable",
             xticks=[10 * i + 4.5 for i in ticks], xticklabels=marks,
             yticks=[10 * i + 4.5 for i in ticks], yticklabels=marks[::-1])

    above, below = right.subplots(2, height_ratios=(2.4, 1))
    for digit in range(10):
        one = means[labels == digit]
        above.scatter(*one.T, s=14, color=plt.get_cmap("tab10")(digit), label=str(digit))
        above.annotate(str(digit), np.median(one, 0), ha="center", va="center", size=15,
                       weight="bold", bbox={"boxstyle": "circle,pad=0.15", "fc": "white",
                                            "ec": plt.get_cmap("tab10")(digit), "alpha": 0.85})
    above.set(title="Held-out digits in the latent plane; labels are not used in training",
              aspect="equal", xlabel="first latent variable", ylabel="second latent variable")
    steps = [row["step"] for row in fit.history]
    parts = [[row[name] for row in fit.history] for name in ("kl", "reconstruction")]
    below.stackplot(steps, parts, alpha=0.7)
    for text, nats in {"KL term": 0.5, "reconstruction": 8.0}.items():
        below.text(steps[-1], nats, text + " ", ha="right", va="bottom")
    for name, nats in baseline.items():
        below.axhline(nats, color="black", ls="--", lw=1)
        below.text(steps[-1], nats + 0.5, f"independent pixels, {name} ", ha="right", size=9)
    below.set(title="The two terms of the negative ELBO, training images", xlabel="step",
              ylabel="nats per image", xlim=(steps[0], steps[-1]), ylim=(0, 46))
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train, evaluate and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("vae.png"))
    args = parser.parse_args()

    (x, y), (x_held_out, y_held_out) = map(binarized, load())
    net = autoencoder()
    fit = train(net, x, args.steps, args.seed)
    params = fit.state.params

    baseline = baseline_nats(x, x_held_out)
    for name, nats in baseline.items():
        print(f"independent pixels, {name}: {nats:.2f} nats per held-out image")
    encode = functools.partial(net.children["encoder"], params["encoder"])
    means, means_held_out = (np.asarray(encode(jnp.asarray(part))[0]) for part in (x, x_held_out))
    draw(args.out, net, fit, means_held_out, y_held_out, baseline)
    print(f"picture: {args.out}")
    accuracy = KNeighborsClassifier(5).fit(means, y).score(means_held_out, y_held_out)
    print(f"five nearest neighbours classify {100 * accuracy:.1f} % of 360 held-out digits")
    terms = negative_elbo(net, params, x_held_out)
    print(f"negative ELBO: {sum(terms):.2f} nats per held-out image ({terms.reconstruction:.2f} + "
          f"{terms.kl:.2f}), independent pixels {min(baseline.values()):.2f}")


if __name__ == "__main__":
    main()
