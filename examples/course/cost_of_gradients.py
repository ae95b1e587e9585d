"""A gradient by reverse mode costs a few evaluations, by differences one for each parameter.

    python examples/course/cost_of_gradients.py [--short] [--seed N] [--out FOLDER]

The loss is that of an MLP with one hidden layer, whose width sets the number M of parameters.
Differences evaluate the loss M + 1 times; a directional derivative by forward mode costs a
constant, as reverse mode does, but gives one number of the M (Baydin, Pearlmutter, Radul, Siskind
2018, arXiv:1502.05767). The second picture is the accuracy of differences against the step size:
large steps leave the line, small ones drown in rounding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from data import digits
from experiment import Experiment, run
from jax.flatten_util import ravel_pytree
from style import BLUE, GREEN, ORANGE, PINK, figure

import diffprog as dp


def seconds(f: Callable[[], Any], rounds: int) -> float:
    """CPU time of a call: the median over rounds."""
    f()  # compiles
    found = []
    for _ in range(rounds):
        began = time.process_time()
        jax.block_until_ready(f())
        found.append(time.process_time() - began)
    return statistics.median(found)


def problem(width: int, experiment: Experiment) -> tuple[Callable[[Any], Any], Any]:
    """A loss of parameters, and the parameters."""
    x, y = (a[:64] for a in digits(seed=experiment.seed)[:2])
    net, objective = dp.flatten() >> dp.models.mlp([width], 10), dp.classification()

    def loss(params: Any) -> jax.Array:
        return objective(net, params, {}, (x, y), key=None, train=True)[0]

    return loss, net.init(experiment.key, x)[0]


def differences(loss: Callable[[Any], Any], params: Any, step: Any) -> jax.Array:
    """Forward differences by each entry of the parameters, one after the other."""
    vector, tree = ravel_pytree(params)
    here = loss(params)
    return jax.lax.map(lambda i: (loss(tree(vector.at[i].add(step))) - here) / step,
                       jnp.arange(vector.size))


def main(experiment: Experiment) -> None:
    """Measure costs by the number of parameters, then errors by the step."""
    widths = experiment.pick((1, 4, 14, 133, 1333, 13333, 133333), (1, 14, 133))
    costs: dict[str, list[float]] = {"loss": [], "reverse mode": [], "forward mode": [],
                                     "differences": []}
    counts = []
    for width in widths:
        loss, params = problem(width, experiment)
        counts.append(dp.tree.count(params))
        rounds = 7 if counts[-1] > 1e6 else 15
        evaluate, reverse = jax.jit(loss), jax.jit(jax.grad(loss))
        forward = jax.jit(lambda params, loss=loss: jax.jvp(loss, (params,), (params,))[1])
        for name, f in (("loss", evaluate), ("reverse mode", reverse), ("forward mode", forward)):
            costs[name].append(seconds(lambda f=f, params=params: f(params), rounds))
        if counts[-1] < 1.2e4:
            differ = jax.jit(lambda params, loss=loss: differences(loss, params, 1e-2))
            costs["differences"].append(seconds(lambda f=differ, params=params: f(params), 1))

    drawn = figure(11, 4, "Gradients of a loss with M parameters")
    left, right = drawn.subplots(1, 2)
    measured = np.array(counts[: len(costs["differences"])])
    for (name, values), color, mark in zip(costs.items(), (BLUE, GREEN, PINK, ORANGE), "osd^",
                                           strict=True):
        left.plot(counts[: len(values)], values, color=color, marker=mark, ls="-", label=name)
    beyond = slice(len(measured) - 1, None)  # M evaluations at the cost of one
    per_parameter = costs["differences"][-1] / measured[-1] / costs["loss"][len(measured) - 1]
    left.plot(counts[beyond], per_parameter * np.array(counts[beyond]) * costs["loss"][beyond],
              color=ORANGE, ls="--", label="differences, extrapolated")
    left.set(xscale="log", yscale="log", xlabel="parameters M", ylabel="CPU time (s)", title="Cost")
    left.legend(fontsize=8)

    ratios = {name: [value / loss for value, loss in zip(values, costs["loss"], strict=False)]
              for name, values in costs.items()}
    for count, ratio in zip(counts, ratios["reverse mode"], strict=True):
        experiment.record(f"cost of reverse mode over the loss, {count:,} parameters", ratio)
    for count, ratio in zip(counts, ratios["differences"], strict=False):
        experiment.record(f"cost of differences over the loss, {count:,} parameters", ratio)

    steps = np.float32(10.0) ** np.arange(-7, 1, 0.5)
    loss, params = problem(14, experiment)
    exact = ravel_pytree(jax.jit(jax.grad(loss))(params))[0]
    one_sided = jax.jit(lambda step: differences(loss, params, step))
    two_sided = jax.jit(lambda step: (differences(loss, params, step)
                                      + differences(loss, params, -step)) / 2)
    for name, f, color, mark in (("one-sided", one_sided, ORANGE, "^"),
                                 ("central", two_sided, BLUE, "o")):
        errors = [float(jnp.linalg.norm(f(step) - exact) / jnp.linalg.norm(exact))
                  for step in steps]
        right.plot(steps, errors, color=color, marker=mark, ls="-", label=name)
        experiment.record(f"least error of {name} differences, relative", min(errors))
        experiment.record(f"step at the least error, {name}", steps[int(np.argmin(errors))])
        experiment.record(f"error at a step of 1e-7, {name}", errors[0])
    right.set(xscale="log", yscale="log", xlabel="step", ylabel="error, relative to the gradient",
              title="Accuracy of differences in float32")
    right.legend()
    experiment.save(drawn, "cost", "Cost by the number of parameters, and error by the step.")

    figures = experiment.figures
    experiment.claim("Reverse mode costs less than 8 evaluations of the loss at any size.",
                     max(ratios["reverse mode"]) < 8)
    experiment.claim("Differences cost more than a tenth of M evaluations, at the most parameters "
                     "that were tried.", ratios["differences"][-1] > measured[-1] / 10)
    experiment.claim("Differences have at best an error above 0.001, in float32.",
                     min(figures[f"least error of {name} differences, relative"]
                         for name in ("one-sided", "central")) > 1e-3)
    experiment.claim("Central differences are more accurate than one-sided ones.",
                     figures["least error of central differences, relative"]
                     < figures["least error of one-sided differences, relative"])
    experiment.claim("A step of 1e-7 gives an error of more than 10 percent.",
                     figures["error at a step of 1e-7, central"] > 0.1)


if __name__ == "__main__":
    run(main)
