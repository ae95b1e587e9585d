"""Gradient descent in a narrow valley: too large a step diverges, and theory says from where on.

    python examples/course/valley.py [--short] [--seed N] [--out FOLDER]

The valley is f(w) = (w1^2 + 25 w2^2) / 2. A step of gradient descent multiplies w1 by 1 - rate and
w2 by 1 - 25 rate, so it converges below a rate of 2 / 25. Momentum b moves this bound to
2 (1 + b) / 25 (Polyak 1964), and Adam has none: its steps have the size of the rate, at any slope.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from style import COLORS, DASHES, figure

CURVATURES = jnp.array([1.0, 25.0])
START = jnp.array([-8.0, 1.0])
MOMENTUM = 0.9
BOUND = 2 / 25
PATHS = {  # title -> optimizer
    "GD, rate 0.02": optax.sgd(0.02),
    "GD, rate 0.076": optax.sgd(0.076),
    "GD, rate 0.082": optax.sgd(0.082),
    "momentum 0.9, rate 0.02": optax.sgd(0.02, MOMENTUM),
    "Nesterov 0.9, rate 0.02": optax.sgd(0.02, MOMENTUM, nesterov=True),
    "Adam, rate 0.5": optax.adam(0.5),
}


def valley(w: jax.Array) -> jax.Array:
    """The height at w."""
    return 0.5 * jnp.sum(CURVATURES * w**2)


def path(optimizer: optax.GradientTransformation, steps: int) -> jax.Array:
    """The points of a descent, (steps + 1, 2)."""
    def step(now: Any, _: None) -> tuple[Any, Any]:
        w, state = now
        updates, state = optimizer.update(jax.grad(valley)(w), state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    _, points = jax.lax.scan(step, (START, optimizer.init(START)), length=steps)
    return jnp.concatenate([START[None], points])


def main(experiment: Experiment) -> None:
    """Draw six paths, then the height after many steps against the rate."""
    drawn = figure(11, 5, "40 steps in the valley f(w) = (w1² + 25 w2²) / 2, from the dot")
    across, along = np.meshgrid(np.linspace(-9.5, 4, 200), np.linspace(-2.6, 2.6, 200))
    heights = (across**2 + 25 * along**2) / 2
    for i, ((title, optimizer), color) in enumerate(zip(PATHS.items(), COLORS, strict=False), 1):
        points = np.asarray(path(optimizer, 40))
        axes = drawn.add_subplot(2, 3, i)
        axes.contour(across, along, heights, levels=np.geomspace(0.2, 120, 9), colors="0.75",
                     linewidths=0.8)
        axes.plot(*points.T, "-o", color=color, ms=2.5, lw=1)
        axes.plot(*START, "o", color="black", ms=6)
        axes.set(title=title, xlim=(-9.5, 4), ylim=(-2.6, 2.6), xlabel="w1", ylabel="w2")
        experiment.record(f"height after 40 steps, {title}", valley(points[-1]))
    experiment.save(drawn, "paths", "Paths of six optimizers from the same point.")

    rates = np.geomspace(1e-3, 1, experiment.pick(241, 61)).astype(np.float32)
    families = {
        "GD": optax.sgd,
        f"momentum {MOMENTUM}": functools.partial(optax.sgd, momentum=MOMENTUM),
        "Adam": optax.adam,
    }
    drawn = figure(8, 4, "Height after 100 steps against the learning rate")
    axes, last = drawn.subplots(), {}
    for (name, family), color, dashes in zip(families.items(), COLORS, DASHES, strict=False):
        last[name] = np.asarray(jax.vmap(lambda rate, family=family: valley(
            path(family(rate), 100)[-1]))(rates))
        axes.plot(rates, np.clip(last[name], 1e-20, 1e20), color=color, ls=dashes, label=name)
    for bound, color in ((BOUND, COLORS[0]), (BOUND * (1 + MOMENTUM), COLORS[1])):
        axes.axvline(bound, color=color, ls=":")
        axes.annotate(f" {bound:g}", (bound, 1e16), color=color)
    axes.axhline(float(valley(START)), color="0.6", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="learning rate; dotted: the bounds of theory",
             ylabel="height; grey: at the start")
    axes.legend(loc="upper left")
    experiment.save(drawn, "rates", "Height after 100 steps by rate, with the bounds of theory.")

    def largest(name: str) -> float:
        """The largest rate of a family from which it ended lower than it began."""
        return experiment.record(f"largest rate that descends, {name}",
                                 rates[last[name] < valley(START)].max())

    apart = rates[1] / rates[0] - 1  # of two rates that were tried
    experiment.claim("Gradient descent diverges from a rate of 2/25 on, as theory says.",
                     abs(largest("GD") / BOUND - 1) < 0.03 + apart)
    experiment.claim("Momentum 0.9 moves the bound by a factor of 1.9.",
                     abs(largest(f"momentum {MOMENTUM}") / (1.9 * BOUND) - 1) < 0.03 + apart)
    experiment.claim("Adam diverges at none of these rates.", largest("Adam") == rates.max())
    height = experiment.figures
    experiment.claim("At a rate of 0.02 momentum comes lower than gradient descent.",
                     height["height after 40 steps, momentum 0.9, rate 0.02"]
                     < height["height after 40 steps, GD, rate 0.02"])


if __name__ == "__main__":
    run(main)
