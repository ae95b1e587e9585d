"""The gradient shrinks or grows by a constant factor per layer, which theory predicts.

    python examples/course/gradient_norms.py [--short] [--seed N] [--out FOLDER]

A layer y = f(W x) multiplies the mean square of the gradient by chi = v E[f'(z)^2], where v is the
variance of an entry of W times the number of inputs, and z is Gaussian with the variance at which
the layer keeps it (Schoenholz, Gilmer, Ganguli, Sohl-Dickstein 2017, arXiv:1611.01232, eq. 5). With
a residual sum the factor is 1 + chi or more; with a norm before each branch, or branches that begin
at zero, the gradient keeps its size. `dp.inspection.gradient_flow` measures all layers in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from data import digits
from experiment import Experiment, run
from style import COLORS, DASHES, figure

import diffprog as dp

WIDTH = 64
Init = jax.nn.initializers.Initializer

# name -> activation, v
PLAIN: dict[str, tuple[Callable[[Any], Any], float]] = {
    "sigmoid, v = 1": (jax.nn.sigmoid, 1.0),
    "tanh, v = 1": (jnp.tanh, 1.0),
    "tanh, v = 2": (jnp.tanh, 2.0),
    "ReLU, v = 1": (jax.nn.relu, 1.0),
    "ReLU, v = 2 (He)": (jax.nn.relu, 2.0),
    "ReLU, v = 3": (jax.nn.relu, 3.0),
}


def scaled(v: float) -> Init:
    """Normal entries of variance v / inputs."""
    return jax.nn.initializers.variance_scaling(v, "fan_in", "normal")


def block_of(kind: str) -> dp.Layer:
    """A block of one kind."""
    relu = dp.linear(WIDTH, kernel_init=scaled(2.0)) >> jax.nn.relu
    zero = dp.linear(WIDTH, kernel_init=scaled(2.0)) >> jax.nn.relu >> dp.linear(
        WIDTH, kernel_init="zeros")
    return {
        "plain": relu,
        "residual": dp.residual(relu),
        "residual, norm first": dp.pre_norm(relu),
        "norm after the sum": dp.add_norm(relu),
        "branch begins at zero": dp.residual(zero),
    }[kind]


def predicted(f: Callable[[Any], Any], v: float) -> float:
    """chi of a layer without bias, by Gauss-Hermite quadrature at its fixed point."""
    points, weights = np.polynomial.hermite_e.hermegauss(100)
    weights = weights / weights.sum()
    slope = jax.vmap(jax.grad(f))
    variance = 1.0
    if f is not jax.nn.relu:  # whose slopes do not depend on the size of z
        for _ in range(1000):
            variance = v * float(weights @ np.asarray(f(jnp.sqrt(variance) * points)) ** 2)
    z = jnp.asarray(np.sqrt(variance) * points, jnp.float32)
    return v * float(weights @ np.asarray(slope(z)) ** 2)


def flow(block: dp.Layer, depth: int, experiment: Experiment) -> np.ndarray:
    """The RMS of the gradient at the output of each block, by depth from the input."""
    x, y = (a[:128] for a in digits(seed=experiment.seed)[:2])
    net = dp.flatten() >> dp.linear(WIDTH) >> dp.repeat(depth, block) >> dp.linear(10)
    params, _ = net.init(experiment.key, x)
    rows = dp.inspection.gradient_flow(net, dp.classification(), params, (x, y)).rows
    return np.array([row.gradient for row in rows if row.path.endswith("]")])


def per_layer(sizes: np.ndarray) -> float:
    """The factor of the gradient for each layer on its way back, a fit over the last half."""
    late = np.log(np.maximum(sizes[len(sizes) // 2 :], 1e-38))
    return float(np.exp(-np.polyfit(np.arange(len(late)), late, 1)[0]))


def main(experiment: Experiment) -> None:
    """Measure plain nets against theory, then residual ones."""
    depth = experiment.pick(100, 40)
    drawn = figure(11, 4.4, f"The gradient on its way back through {depth} blocks")
    left, right = drawn.subplots(1, 2)
    back = np.arange(depth)[::-1]

    errors = {}
    for (name, (f, v)), color in zip(PLAIN.items(), COLORS, strict=False):
        block = dp.linear(WIDTH, bias=False, kernel_init=scaled(v)) >> f
        sizes, chi = flow(block, depth, experiment), predicted(f, v)
        factor = experiment.record(f"factor per layer, {name}", per_layer(sizes))
        errors[name] = abs(np.log(factor) - np.log(chi) / 2)
        experiment.record(f"factor by theory, {name}", np.sqrt(chi))
        left.plot(back, sizes / sizes[-1], color=color, ls="-", label=name)
        left.plot(back, chi ** (back / 2), color=color, ls=":", lw=1.2)
    left.set(yscale="log", ylim=(1e-30, 1e14), xlabel="layers back from the last",
             ylabel="RMS of the gradient, over that at the last layer",
             title="Plain layers; dotted: theory")

    found = {}
    for kind, color, dashes in zip(("plain", "residual", "residual, norm first",
                                    "norm after the sum", "branch begins at zero"), COLORS, DASHES,
                                   strict=False):
        found[kind] = flow(block_of(kind), depth, experiment)
        experiment.record(f"gradient at the first block over the last, {kind}",
                          found[kind][0] / found[kind][-1])
        right.plot(back, found[kind] / found[kind][-1], color=color, ls=dashes, label=kind)
    right.set(yscale="log", xlabel="layers back from the last", title="ReLU, v = 2, in blocks")
    for axes in (left, right):
        axes.legend(fontsize=8)
    experiment.save(drawn, "gradients", "Size of the gradient by depth, measured and predicted.")

    experiment.claim("Theory predicts the factor of each plain net within 10 percent.",
                     max(errors.values()) < 0.1)
    experiment.claim("Through sigmoids the gradient falls to less than a third in each layer.",
                     experiment.figures["factor per layer, sigmoid, v = 1"] < 1 / 3)
    experiment.claim("With a residual sum and no norm the gradient explodes, by more than a third "
                     "in each block.", per_layer(found["residual"]) > 4 / 3)
    experiment.claim("With a norm before each branch it grows by less than the number of blocks, "
                     "over all of them; with branches that begin at zero it does not change.",
                     found["residual, norm first"][0] < depth * found["residual, norm first"][-1]
                     and np.allclose(found["branch begins at zero"],
                                     found["branch begins at zero"][-1], rtol=1e-3))


if __name__ == "__main__":
    run(main)
