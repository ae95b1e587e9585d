"""Draw digits that nobody wrote: a generator and a discriminator that learn from each other.

    python examples/gan.py [--steps N] [--inner K] [--seed N] [--out gan.png]

Data: 1,437 of scikit-learn's digits of 8x8 pixels, without their labels; 360 are held out. Takes
three to four minutes on two cores that others use too (2.3 minutes of CPU time). Samples are read
by a judge, trained on the real digits and on what is none: blends of two, shuffled images, noise.
Expected over seeds 0 to 2: 93.5 %, 93.7 % and 91.2 % of 1,000 samples recognized, the rarest digit
7.7 %, 7.4 % and 7.0 % of them; the program prints how often the judge itself is right.

Draws samples of each digit beside real ones, the losses of both players, and the share of each
digit. Widths, rate, penalty and the judge's threshold were chosen with seed 0.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from digits import load
from digits import train as train_classifier

import diffprog as dp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, LATENT, RATE, SLOPE = 64, 32, 1e-3, 0.1
SAMPLES = 1000
Images = tuple[Any, Any]
Aux = tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]


def players(width: int = 128, hidden: int = 512) -> dp.Layer:
    """Noise -> image -> logit: the generator, then the discriminator.

    An image of 8 x 8 leaves room for one convolution on either side, which is too little to know
    what a digit is; so hidden layers that see all of it stand before and behind.
    """
    leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)

    def whole(features: int, activation: Any) -> dp.Layer:
        return dp.linear(features, bias=False) >> dp.batch_norm() >> activation

    plan = whole(hidden, jax.nn.relu) ** 2
    look = dp.conv(width // 2, 4, stride=2) >> leaky >> dp.flatten() >> whole(256, leaky)
    return dp.serial(generator=plan >> dp.models.dcgan_generator(8, 1, width=width),
                     discriminator=look >> dp.linear(1))


def noise(key: jax.Array, count: int) -> jax.Array:
    """What the generator begins from."""
    return jax.random.normal(key, (count, LATENT))


def tell(
    net: dp.Layer, params: Any, state: Any, images: Any, *, key: jax.Array, train: bool
) -> Aux:
    """The discriminator's objective: give real images 1 and made ones 0, without steep slopes.

    Real and made images are two batches, each normalized by its own statistics; the running
    statistics go through both calls, and what the generator's would become is left to its turn.
    The penalty on the slope at real images (R1) keeps it from learning 1,437 images by heart.
    """
    generator, discriminator = net.children.values()
    made, _ = generator.apply(
        params["generator"], state["generator"], noise(key, len(images)), train=train)
    judge = functools.partial(discriminator.apply, params["discriminator"], train=train)
    real, slopes, seen = jax.vjp(
        functools.partial(judge, state["discriminator"]), images, has_aux=True)
    fake, seen = judge(seen, made)
    penalty = jnp.square(slopes(jnp.ones_like(real))[0]).sum((1, 2, 3)).mean()
    loss = (dp.losses.binary_cross_entropy(real, jnp.ones_like(real))
            + dp.losses.binary_cross_entropy(fake, jnp.zeros_like(fake)))
    right = ((real > 0).mean() + (fake < 0).mean()) / 2
    return loss + SLOPE / 2 * penalty, (
        {"discriminator": seen}, {"loss": loss, "penalty": penalty, "accuracy": right})


def fool(
    net: dp.Layer, params: Any, state: Any, images: Any, *, key: jax.Array, train: bool
) -> Aux:
    """The generator's objective: be given 1. It does not saturate where 0 is given for sure."""
    generator, discriminator = net.children.values()
    made, after = generator.apply(
        params["generator"], state["generator"], noise(key, len(images)), train=train)
    fake, _ = discriminator.apply(
        params["discriminator"], state["discriminator"], made, train=train)
    loss = dp.losses.binary_cross_entropy(fake, jnp.ones_like(fake))
    return loss, ({"generator": after}, {"loss": loss})


def train(
    images: np.ndarray, steps: int, inner: int, seed: int, **options: Any
) -> tuple[dp.Layer, dp.training.Fit]:
    """Play the game; the net and what `fit` gives."""

    def adam(updates: int) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(RATE, updates, 0.05), b1=0.5)

    net = players()
    step = dp.training.make_game(net, {
        "discriminator": dp.training.Player(tell, adam(steps * inner), steps=inner),
        "generator": dp.training.Player(fool, adam(steps)),
    }, inputs=lambda images: jax.ShapeDtypeStruct((len(images), LATENT), jnp.float32))
    data = dp.batches(2 * images - 1, BATCH * inner, seed=seed)
    return net, dp.fit(step, data, key=jax.random.key(seed), steps=steps, **options)


def samples(net: dp.Layer, state: dp.training.TrainState, seed: int) -> np.ndarray:
    """Images in [0, 1] that the generator makes at rest, by its running statistics."""
    z = noise(jax.random.key(seed), SAMPLES)
    images = dp.predict(net.children["generator"], state.params["generator"], z,
                        state=state.state["generator"])
    return np.asarray(images + 1) / 2


# The judge: who is to recognize a digit must know what is none.


def no_digits(images: Images, seed: int) -> np.ndarray:
    """Blends of two images of different digits, images with shuffled pixels, and noise, 2 : 1 : 1.
    """
    x, y = images
    draw = np.random.default_rng(seed)
    other = draw.permutation(len(x))
    share = draw.uniform(0.35, 0.65, (len(x), 1, 1, 1))
    blends = (share * x + (1 - share) * x[other])[y != y[other]]
    shuffled = draw.permuted(x.reshape(len(x), -1), axis=1).reshape(x.shape)[::2]
    return np.concatenate([blends, shuffled, draw.uniform(size=shuffled.shape)], dtype=np.float32)


def learn_to_judge(images: Images, steps: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier of real digits and of no digits: images -> 0 to 9, or 10 if it sees none.

    It need not be sure which digit it is, but a tenth of its belief must be that it is one.
    """

    def block(width: int) -> dp.Layer:
        return dp.conv(width, 3, bias=False) >> dp.batch_norm() >> jax.nn.relu >> dp.max_pool(2)

    net = block(32) >> block(64) >> dp.flatten() >> dp.dropout(0.3) >> dp.linear(11)
    (x, y), none = images, no_digits(images, seed)
    shown = np.concatenate([x, none]), np.concatenate([y, np.full(len(none), 10, np.int32)])
    _, fit = train_classifier(net, shown, steps, 1, seed, progress=False)

    def judge(x: np.ndarray) -> np.ndarray:
        logits = dp.predict(net, fit.state.params, jnp.asarray(x), state=fit.state.state)
        belief = np.asarray(jax.nn.softmax(logits))
        return np.where(belief[:, 10] < 0.9, belief[:, :10].argmax(-1), 10)

    return judge


def nearest(x: np.ndarray, images: np.ndarray) -> np.ndarray:
    """How far each image is from the most similar one of others."""
    x, images = x.reshape(len(x), 1, -1), images.reshape(1, len(images), -1)
    squared = (x**2).sum(-1) + (images**2).sum(-1) - 2 * x[:, 0] @ images[0].T
    return np.sqrt(np.maximum(squared, 0).min(-1))


def draw(
    path: pathlib.Path, fit: dp.training.Fit, made: np.ndarray, found: np.ndarray, images: Images
) -> None:
    """Samples and real digits by class, the losses of both players, and the share of each class."""
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2))

    names, rows = [*map(str, range(10)), "none"], (10, 4)
    sheets = ("Made of noise, as the judge reads it", made, found), ("Real", *images)
    grid = left.subplots(2, 1, height_ratios=rows)
    for axes, count, (title, x, y) in zip(grid, rows, sheets, strict=True):
        sheet = np.zeros((9 * count, 9 * len(names)))
        for column in range(len(names)):
            for row, image in enumerate(x[y == column][:count, :, :, 0]):
                sheet[9 * row : 9 * row + 8, 9 * column : 9 * column + 8] = image
        axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
        axes.set(title=title, yticks=[])
        axes.set_xticks(9 * np.arange(len(names)) + 3.5, names)

    above, below = right.subplots(2)
    steps = [row["step"] for row in fit.history]
    for name in ("discriminator", "generator"):
        above.plot(steps, [row[f"{name}/loss"] for row in fit.history], label=name)
    above.axhline(2 * np.log(2), color="C0", ls=":", lw=1, label="if it cannot tell")
    above.axhline(np.log(2), color="C1", ls=":", lw=1)
    above.set(title="Losses of the two players", xlabel="step", ylabel="loss in nats")
    above.legend()

    shares = 100 * np.bincount(found, minlength=11) / len(found)
    below.bar(names, shares, color=["C2"] * 10 + ["0.6"])
    below.set(title="What the samples are", xlabel="read as", ylabel=f"percent of {SAMPLES}")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Play, judge and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--inner", type=int, default=1, help="the discriminator's in each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gan.png"))
    given = parser.parse_args()

    learn, held = load()
    judge = learn_to_judge(learn, min(given.steps, 1000), given.seed)
    none = no_digits(held, given.seed)
    print(f"the judge reads {100 * (judge(held[0]) == held[1]).mean():.1f} % of held-out digits "
          f"rightly, and takes {100 * (judge(none) < 10).mean():.1f} % of blends, shuffled images "
          "and noise for digits")

    net, fit = train(learn[0], given.steps, given.inner, given.seed,
                     log_every=max(given.steps // 100, 1))
    made = samples(net, fit.state, given.seed)
    found = judge(made)
    print(f"distance to the most similar image learned from, median: samples "
          f"{np.median(nearest(made, learn[0])):.2f}, held-out digits "
          f"{np.median(nearest(held[0], learn[0])):.2f}")
    draw(given.out, fit, made, found, learn)
    print(f"picture: {given.out}")
    shares = 100 * np.bincount(found, minlength=11)[:10] / len(made)
    print(f"recognized {shares.sum():.1f} % of {len(made)} samples, the rarest digit "
          f"{shares.min():.1f} %")


if __name__ == "__main__":
    main()
