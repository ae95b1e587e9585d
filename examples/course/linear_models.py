"""Linear models are nets of one layer: trained to convergence, they are what statistics computes.

    python examples/course/linear_models.py [--short] [--seed N] [--out FOLDER]

A convex loss has one minimum, so the way there does not matter: gradient descent and L-BFGS end in
the solution of scikit-learn, for logistic regression on the wines, and in the closed form
`(X^T X)^-1 X^T y`, for least squares on the diabetes data.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression
from style import figure

import diffprog as dp

jax.config.update("jax_enable_x64", True)  # so that 1e-4 is far above rounding


def standardized(x: np.ndarray) -> np.ndarray:
    """Features of mean 0 and variance 1."""
    return (x - x.mean(0)) / x.std(0)


def distances(
    net: dp.Layer, objective: Any, optimizer: Any, data: Any, wanted: Any, readings: list[int],
    key: jax.Array,
) -> np.ndarray:
    """The largest distance of a parameter from the wanted ones, at each reading."""
    step = dp.make_step(net, objective, optimizer, donate=False)

    def away(params: Any) -> jax.Array:
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, wanted)
        return jnp.stack(jax.tree.leaves(gaps)).max()

    def advance(state: Any, steps: Any) -> Any:
        state = jax.lax.fori_loop(0, steps, lambda _, now: step.apply(now, data)[0], state)
        return state, away(state.params)

    counts = np.diff(readings, prepend=0)
    return np.asarray(jax.jit(lambda state: jax.lax.scan(advance, state, counts)[1])(
        step.init(key, data[0])))


def main(experiment: Experiment) -> None:
    """Train both linear models with two optimizers, and measure the distance to the solution."""
    readings = sorted({0, *np.geomspace(1, experiment.pick(15_000, 9_000), 40).astype(int)})

    # Logistic regression: the mean cross-entropy, and |kernel|^2 / 2n as in scikit-learn (C = 1).
    loaded: Any = load_wine()
    x, y = standardized(loaded.data), loaded.target
    other = LogisticRegression(solver="newton-cg", tol=1e-10).fit(x, y)
    shrunk = dp.training.penalized(
        dp.classification(), lambda params: dp.losses.l2(params, "**/kernel") / (2 * len(x)))
    curves = {}
    wanted = {"kernel": other.coef_.T, "bias": other.intercept_ - other.intercept_.mean()}
    for name, optimizer in {"gradient descent": optax.sgd(0.5), "L-BFGS": optax.lbfgs()}.items():
        curves["wine", name] = distances(
            dp.linear(3), shrunk, optimizer, (x, y), wanted, readings, experiment.key)

    # Least squares: the mean of (y - x w - b)^2, and its closed form by the normal equations.
    loaded = load_diabetes()
    x, y = standardized(loaded.data), standardized(loaded.target[:, None])
    design = np.concatenate([x, np.ones_like(y)], 1)
    solved = np.linalg.solve(design.T @ design, design.T @ y)
    wanted = {"kernel": solved[:-1], "bias": solved[-1]}
    for name, optimizer in {"gradient descent": optax.sgd(0.2), "L-BFGS": optax.lbfgs()}.items():
        curves["diabetes", name] = distances(
            dp.linear(1), dp.regression(), optimizer, (x, y), wanted, readings, experiment.key)

    drawn = figure(9, 3.8, "Two ways to the one minimum of a convex loss")
    titles = {"wine": "Logistic regression on wine",
              "diabetes": "Least squares on diabetes"}
    for axes, (data, title) in zip(drawn.subplots(1, 2), titles.items(), strict=True):
        for (of, name), curve in curves.items():
            if of == data:
                axes.loglog(readings[1:], curve[1:], label=name)
                experiment.record(f"{data}, {name}: distance after {readings[-1]} steps", curve[-1])
        axes.axhline(1e-4, color="0.5", lw=1, ls=":")
        axes.set(title=title, xlabel="steps", ylabel="largest distance of a parameter\nfrom " + (
            "scikit-learn's" if data == "wine" else "the closed form"))
        axes.legend(loc="lower left")
    experiment.save(drawn, "distances", "The distance from the exact solution, by steps.")

    experiment.claim("Logistic regression trained to convergence equals scikit-learn's to 1e-4.",
                     max(curves["wine", name][-1] for _, name in curves) < 1e-4)
    experiment.claim("Least squares by training equals the closed form to 1e-4.",
                     max(curves["diabetes", name][-1] for _, name in curves) < 1e-4)
    within = {key: readings[int(np.argmax(curve < 1e-4))] for key, curve in curves.items()}
    for (data, name), steps in within.items():
        experiment.record(f"{data}, {name}: first reading within 1e-4, in steps", steps)
    experiment.claim("L-BFGS takes less than a tenth of the steps of gradient descent to 1e-4.",
                     all(10 * within[data, "L-BFGS"] < within[data, "gradient descent"]
                         for data in titles))


if __name__ == "__main__":
    run(main)
