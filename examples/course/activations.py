"""Activation functions and their derivatives.

    python examples/course/activations.py [--short] [--seed N] [--out FOLDER]

The derivative is what a layer multiplies the gradient by. That of the sigmoid is at most 1/4, so
that a gradient through n of them shrinks by 4^-n at least; that of tanh is at most 1, and that of
ReLU is 0 or 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, run
from style import BLUE, ORANGE, figure

FUNCTIONS = {
    "ReLU": jax.nn.relu, "leaky ReLU": jax.nn.leaky_relu, "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh, "GELU": lambda x: jax.nn.gelu(x, approximate=False), "SiLU": jax.nn.silu,
    "softplus": jax.nn.softplus, "sine": jnp.sin,
}


def main(experiment: Experiment) -> None:
    """Draw each function with its derivative, and measure the slopes."""
    x = jnp.linspace(-4, 4, 801)
    drawn = figure(10, 4.6, "Activation functions y(x) and their derivatives")
    slopes = {}
    for axes, (name, f) in zip(drawn.subplots(2, 4, sharex=True).flat, FUNCTIONS.items(),
                               strict=True):
        slope = jax.vmap(jax.grad(f))(x)
        slopes[name] = float(slope.max())
        axes.plot(x, f(x), color=BLUE, ls="-", label="y(x)")
        axes.plot(x, slope, color=ORANGE, ls="--", label="dy/dx")
        axes.set(title=name, ylim=(-1.3, 2.2))
        experiment.record(f"largest slope of {name}", slopes[name])
    drawn.axes[0].legend()
    experiment.save(drawn, "activations", "Eight activation functions and their derivatives.")

    experiment.claim("The derivative of the sigmoid is at most 1/4.",
                     np.isclose(slopes["sigmoid"], 0.25))
    experiment.claim("The derivatives of GELU and SiLU exceed 1.",
                     slopes["GELU"] > 1.05 and slopes["SiLU"] > 1.05)


if __name__ == "__main__":
    run(main)
