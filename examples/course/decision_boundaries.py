"""Decision boundaries as they are learned: a linear model, features by hand, an MLP and a ResNet.

    python examples/course/decision_boundaries.py [--short] [--seed N] [--out FOLDER]

Two rings and two spirals are no two half-planes. Features by hand separate what their author had in
mind, here the rings; layers learn features for the rings and for the spirals.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from matplotlib.animation import FuncAnimation
from style import BLUE, DIVERGING, ORANGE, bare, figure

import diffprog as dp


def by_hand(x: jax.Array) -> jax.Array:
    """The features x1, x2, x1^2, x2^2, x1 x2, sin(pi x1), sin(pi x2)."""
    products = x[..., :1] * x[..., 1:]
    return jnp.concatenate([x, x ** 2, products, jnp.sin(jnp.pi * x)], -1)


def classifier(features: dp.Layer | Any) -> dp.Layer:
    """Features, and the logit of class 1 from them."""
    return dp.serial(features=features, head=dp.linear(1) >> (lambda y: y[..., 0]))


NETS = {
    "linear model": classifier(lambda x: x),
    "features by hand": classifier(by_hand),
    "MLP": classifier(dp.linear(32) >> jnp.tanh >> dp.linear(32) >> jnp.tanh),
    "ResNet": classifier(dp.linear(16) >> dp.repeat(
        6, dp.residual(dp.linear(16) >> jax.nn.relu >> dp.linear(16)))),
}
SIDE = np.linspace(-1.3, 1.3, 52, dtype=np.float32)
GRID = np.stack(np.meshgrid(SIDE, SIDE), -1).reshape(-1, 2)


def rings(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (count, 2) on a ring of radius 0.4, class 0, and on one of radius 1, class 1."""
    y = np.arange(count) % 2
    angle = rng.uniform(0, 2 * np.pi, count)
    return _points(rng, 0.4 + 0.6 * y, angle), y


def spirals(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (count, 2) on two arms of a spiral, each of one and a half turns."""
    y = np.arange(count) % 2
    along = np.sqrt(rng.uniform(0.02, 1, count))
    return _points(rng, 0.1 + along, 3 * np.pi * along + np.pi * y), y


def _points(rng: np.random.Generator, radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Points with noise from polar coordinates."""
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return (x + rng.normal(0, 0.04, x.shape)).astype(np.float32)


def learn(net: dp.Layer, data: Any, readings: list[int], key: jax.Array) -> jax.Array:
    """The logits of the grid and of the points held out, at each reading."""
    (x, y), (x_held_out, _) = data
    seen = jnp.concatenate([GRID, x_held_out])
    step = dp.make_step(net, dp.training.binary_classification(), optax.adam(5e-3), donate=False)

    def advance(state: Any, steps: Any) -> Any:
        state = jax.lax.fori_loop(0, steps, lambda _, now: step.apply(now, (x, y))[0], state)
        return state, net(state.params, seen)

    return jax.lax.scan(advance, step.init(key, x), jnp.diff(jnp.array(readings), prepend=0))[1]


def main(experiment: Experiment) -> None:
    """Train four classifiers on rings and spirals, and draw what they say of the plane."""
    names, makers = ("rings", "spirals"), (rings, spirals)
    rng = experiment.rng
    sets = [(make(rng, 240), make(rng, 600)) for make in makers]
    data = jax.tree.map(lambda *each: np.stack(each), *sets)  # an axis of data sets first
    readings = experiment.pick([0, 5, 10, 20, 40, 70, 100, 150, 200, 300, 500, 800, 1500],
                               [0, 20, 600])
    logits, accuracy = {}, {}
    for net_name, net in NETS.items():
        learned = jax.jit(jax.vmap(lambda data, net=net: learn(net, data, readings,
                                                               experiment.key)))(data)
        logits[net_name], held_out = np.split(np.asarray(learned), [len(GRID)], axis=-1)
        right = (held_out > 0) == data[1][1][:, None]                    # (sets, readings, points)
        accuracy[net_name] = 100 * right.mean(-1)
        for i, name in enumerate(names):
            experiment.record(f"{net_name} on {name}, accuracy held out in %",
                              accuracy[net_name][i, -1])

    def show(axes: Any, net_name: str, i: int, reading: int) -> None:
        (x, y), _ = sets[i]
        shown = np.tanh(logits[net_name][i, reading].reshape(len(SIDE), -1) / 2)
        axes.clear()
        bare(axes)
        axes.contourf(SIDE, SIDE, shown, np.linspace(-1, 1, 8), cmap=DIVERGING, vmin=-2.6, vmax=2.6)
        axes.set_aspect("equal")
        if shown.min() < 0 < shown.max():
            axes.contour(SIDE, SIDE, shown, [0], colors="black", linewidths=1.2)
        for label, (color, marker) in enumerate([(BLUE, "o"), (ORANGE, "^")]):
            axes.scatter(*x[y == label].T, s=4, color=color, marker=marker, linewidths=0)

    stills = [int(np.searchsorted(readings, step)) for step in experiment.pick(
        [10, 100, 1500], [20, 600])]
    strip = figure(8.6, 5.9,
                   "Blue circles, orange triangles, and the boundary (black) that each model draws")
    grid = strip.subplots(len(NETS), 2 * len(stills))
    for row, net_name in enumerate(NETS):
        for column, (i, reading) in enumerate((i, reading) for i in (0, 1) for reading in stills):
            axes = grid[row, column]
            show(axes, net_name, i, reading)
            axes.set_title(f"{names[i]}, step {readings[reading]}" if row == 0 else "", fontsize=8)
            axes.set_xlabel(f"{accuracy[net_name][i, reading]:.0f} % held out", fontsize=8)
        grid[row, 0].set_ylabel(net_name, fontweight="bold")
    experiment.save(strip, "stills", "Decision boundaries on rings and spirals during training.")

    film = figure(7, 4)
    frames = film.subplots(2, len(NETS))
    film.suptitle(" ")

    def frame(reading: int) -> None:
        film.suptitle(f"Step {readings[reading]}")
        for row in (0, 1):
            for axes, net_name in zip(frames[row], NETS, strict=True):
                show(axes, net_name, row, reading)
                axes.set_title(net_name if row == 0 else "", fontsize=9)
                axes.set_xlabel(f"{accuracy[net_name][row, reading]:.0f} % held out", fontsize=8)

    shown = [*range(len(readings)), *[len(readings) - 1] * experiment.pick(5, 0)]
    experiment.save(FuncAnimation(film, frame, frames=shown), "learning",
                    "The same boundaries as they are learned, rings above and spirals below.")

    last = {name: dict(zip(names, each[:, -1], strict=True)) for name, each in accuracy.items()}
    experiment.claim("The linear model classifies less than 75 % of the rings and of the spirals.",
                     max(last["linear model"].values()) < 75)
    experiment.claim("Features by hand classify over 98 % of the rings, less than 90 % of the "
                     "spirals.", last["features by hand"]["rings"] > 98
                     and last["features by hand"]["spirals"] < 90)
    experiment.claim("MLP and ResNet classify over 95 % of both, without features by hand.",
                     min(*last["MLP"].values(), *last["ResNet"].values()) > 95)


if __name__ == "__main__":
    run(main)
