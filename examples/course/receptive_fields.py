"""The receptive field of a unit: which pixels it can see, and which ones it does see.

    python examples/course/receptive_fields.py [--short] [--seed N] [--out FOLDER]

`dp.summary` computes the field of each layer from sizes and strides: a window of K positions adds
(K - 1) times the stride so far. Differentiation measures it: a pixel is in the field if the
gradient of the unit by that pixel is not zero for some image and initial values. The gradient also
says how much each pixel matters, and that is not spread evenly: most of it is near the centre (Luo
et al. 2016, arXiv:1701.04128).
"""

from __future__ import annotations

from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, run
from matplotlib.patches import Rectangle
from style import BLUE, ORANGE, SKY, bare, figure

import diffprog as dp

SIDE = 32
NET = dp.serial(
    conv_1=dp.conv(8, 3) >> jax.nn.relu, conv_2=dp.conv(8, 3) >> jax.nn.relu,
    pool_1=dp.max_pool(2),
    conv_3=dp.conv(8, 3) >> jax.nn.relu, conv_4=dp.conv(8, 3) >> jax.nn.relu,
    pool_2=dp.max_pool(2),
    conv_5=dp.conv(8, 3) >> jax.nn.relu,
)
STAGES = ("conv_1", "conv_2", "pool_1", "conv_4", "conv_5")


def stack(depth: int) -> dp.Layer:
    """So many convolutions of 3 x 3 one after the other, without a pool."""
    return dp.serial(*[dp.conv(8, 3, padding="VALID") >> jax.nn.relu for _ in range(depth)])


def influence(net: dp.Layer, images: jax.Array, key: jax.Array, draws: int) -> np.ndarray:
    """Mean squared gradient of the central unit by each pixel, (height, width).

    The mean is over images and over initial values.
    """

    def units(x: jax.Array, params: Any) -> jax.Array:
        y = net(params, x)                                             # (batch, height, width, C)
        return y[:, y.shape[1] // 2, y.shape[2] // 2, 0].sum()

    gradient = jax.jit(jax.grad(units))
    squared = [gradient(images, net.init(each, images)[0]) ** 2
               for each in jax.random.split(key, draws)]
    return np.mean(squared, (0, 1, 4))


def box(seen: np.ndarray) -> tuple[int, int, int, int]:
    """First row, first column, height and width of what is not zero."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return int(rows[0]), int(columns[0]), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def central(amount: np.ndarray) -> float:
    """Percent of the field's pixels, the largest first, that hold 90 % of the influence."""
    ordered = np.sort(amount[amount > 0])[::-1]
    return 100 * (np.searchsorted(ordered.cumsum(), 0.9 * ordered.sum()) + 1) / ordered.size


def main(experiment: Experiment) -> None:
    """Draw fields on a digit, compare them with the computed ones, and measure the centre."""
    images = data.digits(seed=experiment.seed).x[:8]
    images = jax.image.resize(jnp.asarray(images), (8, SIDE, SIDE, 1), "linear")
    draws = experiment.pick(32, 6)
    rows = {row.path: row for row in dp.summary(NET, images).rows}

    drawn = figure(11, 2.9, "The receptive field of one unit, by depth: computed (frame) and "
                   "measured (colour: gradient)")
    agree = []
    for axes, name in zip(drawn.subplots(1, len(STAGES)), STAGES, strict=True):
        field = rows[name if name.startswith("pool") else f"{name}/conv_0"].field
        assert field is not None
        prefix = dp.serial(**{child: NET.children[child] for child in list(NET.children)[
            : list(NET.children).index(name) + 1]})
        amount = influence(prefix, images, experiment.key, draws)
        top, left, height, width = box(amount > 0)
        experiment.record(f"{name}: computed field in pixels", field.size[0])
        experiment.record(f"{name}: measured field in pixels", height)
        agree.append((height, width) == field.size)
        axes.imshow(images[0, ..., 0], cmap="gray_r", alpha=0.5)
        shown = np.sqrt(amount / amount.max())
        axes.imshow(np.ma.masked_equal(shown, 0), cmap="cividis", alpha=0.85, vmin=0, vmax=1)
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), field.size[1], field.size[0],
                                 fill=False, edgecolor=ORANGE, linewidth=2))
        bare(axes)
        axes.set_title(f"{name}: {field.size[0]} x {field.size[1]}\nstride {field.stride[0]}")
    experiment.save(drawn, "receptive_fields", "Receptive fields on a digit of 32 x 32 pixels.")

    experiment.claim("The smallest box around the pixels with a gradient is as large as the "
                     "field that dp.summary computes.", all(agree))

    depths = experiment.pick((1, 2, 4, 8, 16), (1, 6))
    percents, sizes, widths = [], [], []
    for depth in depths:
        size = 2 * depth + 1
        x = jax.random.normal(experiment.key, (8, size, size, 1))
        amount = influence(stack(depth), x, experiment.key, draws)
        fraction = amount.sum(1) / amount.sum()
        place = np.arange(size) - depth
        sizes.append(size)
        widths.append(2 * np.sqrt((fraction * place**2).sum()))
        percents.append(central(amount))
        experiment.record(f"{depth} convolutions: percent of the field with 90 % of the influence",
                          percents[-1])
    drawn = figure(9, 3.6, "Most of a receptive field matters little")
    left, right = drawn.subplots(1, 2)
    left.plot(depths, sizes, "o", ls="-", color=BLUE, label="field: 2n + 1")
    left.plot(depths, widths, "s", ls="--", color=ORANGE, label="measured: two deviations")
    reference = widths[0] * np.sqrt(depths)
    left.plot(depths, reference, color=SKY, ls=":", label="proportional to sqrt(n)")
    left.set(xlabel="convolutions of 3 x 3, n", ylabel="width in pixels",
             title="The influence is narrower")
    left.legend()
    right.plot(depths, percents, "o", ls="-", color=BLUE)
    right.set(xlabel="convolutions of 3 x 3, n", ylabel="percent of the field's pixels",
              title="Pixels that hold 90 % of the influence", ylim=(0, 100))
    experiment.save(drawn, "effective_field", "Width of the field and of the influence, by depth.")
    experiment.claim("The deeper the stack, the smaller is the part of the field that holds 90 % "
                     "of the influence.", (np.diff(percents) < 0).all())
    growth = (widths[-1] / widths[0]) / np.sqrt(depths[-1] / depths[0])
    experiment.record("growth of the width of the influence, relative to that of sqrt(n)", growth)
    experiment.claim("The width of the influence grows like the square root of the depth, within "
                     "20 %.", abs(growth - 1) < 0.2)


if __name__ == "__main__":
    run(main)
