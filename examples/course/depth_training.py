"""Deeper plain nets train worse; residual nets of 300 layers train.

    python examples/course/depth_training.py [--short] [--seed N] [--out FOLDER]

Nets of 20, 56, 110 and 300 layers, 6 n + 2 as in He, Zhang, Ren, Sun 2015 (arXiv:1512.03385), on
8 x 8 digits: a first and a last linear map, and 3 n blocks of two layers each, which `dp.repeat`
runs as one loop. The layers are dense: in a loop the gradient of a convolution is slow on CPU. Both
kinds have a norm behind each linear map, as the paper has, and He's initial values; they differ in
the sum alone. What is compared is the error on the training images: a deeper plain net could copy a
shallower one, and does not find it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import digits
from experiment import Experiment, run
from style import BLUE, ORANGE, figure

import diffprog as dp

WIDTH = 32


def branch() -> dp.Layer:
    """Two layers: linear map, norm, ReLU."""
    return dp.serial(*[dp.linear(WIDTH, bias=False, kernel_init="he_normal"), dp.layer_norm(),
                       jax.nn.relu] * 2)


def net(layers: int, residual: bool) -> dp.Layer:
    """6 n + 2 layers on digits."""
    block = dp.residual(branch()) if residual else branch()
    return dp.serial(
        stem=dp.flatten() >> dp.linear(WIDTH) >> jax.nn.relu,
        blocks=dp.repeat((layers - 2) // 2, block),
        head=dp.layer_norm() >> dp.linear(10))


def main(experiment: Experiment) -> None:
    """Train all nets, and measure the branches of the deepest residual one."""
    depths = experiment.pick((20, 56, 110, 300), (20, 110))
    steps = experiment.pick(240, 60)
    x, y = digits(seed=experiment.seed)[:2]
    errors: dict[bool, list[float]] = {False: [], True: []}
    drawn = figure(11, 3.8, "Plain and residual nets of the same layers on digits")
    left, middle, right = drawn.subplots(1, 3)
    params: dict[str, Any] = {}
    for layers in depths:
        for residual in (False, True):
            layer = net(layers, residual)
            step = dp.make_step(layer, dp.classification(), optax.adamw(
                optax.cosine_onecycle_schedule(steps, 2e-3)))
            data = dp.batches((x, y), 128, seed=experiment.seed)
            found = dp.fit(step, data, key=experiment.key, steps=steps, log_every=steps // 12,
                           progress=False)
            params = found.state.params
            name = f"{'residual' if residual else 'plain'}, {layers} layers"
            logits = dp.predict(layer, params, x)
            errors[residual].append(100 * float((np.asarray(logits).argmax(-1) != y).mean()))
            experiment.record(f"training error, {name} (percent)", errors[residual][-1])
            shade = 0.35 + 0.65 * depths.index(layers) / (len(depths) - 1)
            left.plot([row["step"] for row in found.history],
                      [row["loss"] for row in found.history], alpha=shade,
                      color=BLUE if residual else ORANGE, ls="-" if residual else "--",
                      label=name if layers in (depths[0], depths[-1]) else None)
    left.set(xlabel="training step", ylabel="cross-entropy (nats)", yscale="log",
             title="Training loss; darker is deeper")
    left.legend(fontsize=8)
    for residual, color, marker in ((False, ORANGE, "s"), (True, BLUE, "o")):
        middle.plot(depths, errors[residual], color=color, marker=marker,
                    label="residual" if residual else "plain")
    middle.set(xscale="log", xlabel="layers", ylabel="percent", title="Error on training images",
               xticks=depths, xticklabels=depths)
    middle.minorticks_off()
    middle.legend()

    sizes = branch_sizes(net(depths[-1], True), params, x[:128])
    right.plot(np.arange(1, len(sizes) + 1), sizes, color=BLUE)
    right.set(xlabel="block", ylabel="RMS of F(x) over RMS of x", yscale="log",
              title=f"Branches of {depths[-1]} layers, trained")
    experiment.record("F(x) over x in the first block", sizes[0])
    experiment.record("F(x) over x, median of the last ten blocks", np.median(sizes[-10:]))
    experiment.save(drawn, "depth", "Training loss, training error by depth, and the size of the "
                                    "branches F(x) beside x.")

    plain, summed = errors[False], errors[True]
    experiment.claim("The training error of plain nets rises with depth: the deepest is wrong at "
                     "least 20 points more often than the one of 20 layers.",
                     plain[-1] > plain[0] + 20)
    experiment.claim("That of residual nets does not rise by more than 3 points.",
                     summed[-1] < summed[0] + 3)
    experiment.claim("Deep in a residual net a branch changes x by less than a fifth of its size.",
                     np.median(sizes[-10:]) < 0.2)


def branch_sizes(layer: dp.Layer, params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """The RMS of F(x) over that of x in each residual block."""
    tapped = dp.tap(layer, "blocks/body")
    _, seen = tapped(params, jnp.asarray(x))
    added = seen["blocks/body"]  # (blocks, batch, width)
    stem = layer.children["stem"](params["stem"], jnp.asarray(x))
    inputs = stem + jnp.cumsum(added, 0) - added
    size = lambda a: jnp.sqrt((a**2).mean((1, 2)))  # noqa: E731
    return np.asarray(size(added) / size(inputs))


if __name__ == "__main__":
    run(main)
