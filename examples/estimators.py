"""Bias and standard deviation of gradient estimators for expectations over random samples.

    python examples/estimators.py [--estimates N] [--seed N] [--out estimators.png]

Estimated is the gradient of E[f] with respect to the parameters of the distribution. The first
distribution is categorical: y is the one-hot vector of one of four classes, f(y) = |y - target|**2,
and the true gradient is computed as a sum over the classes. The second is Gaussian: z is a vector
of n independent entries of variance 1, f(z) = |z|**2, and the true gradient with respect to the
means is twice the means. Each estimate is the mean over 8 samples. Bias and standard deviation are
norms of vectors, in percent of the norm of the true gradient; the number in brackets is the
standard error of the bias.

Takes under a minute on two cores (25 s of CPU time). Expected: the score function has no bias, and
a standard deviation of 286 %, or 106 % with a leave-one-out baseline. Gumbel-softmax has a bias of
41 % at temperature 0.5 and of 10 % at 0.1, while its standard deviation rises from 124 % to 320 %;
both are larger for straight-through samples. (The bias at high temperatures has the opposite
direction, so it is small at a temperature in between.) For Gaussian samples, the standard deviation
of the reparametrized estimator is 35 % in all dimensions, that of the score function 78 % in one
dimension and 740 % in 256.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from style import plt

import diffprog as dp

SAMPLES = 8
LOGITS, TARGET = jnp.array([0.4, -0.6, 1.0, 0.0]), jnp.array([0.1, 0.7, 0.1, 0.1])
TEMPERATURES = (0.1, 0.2, 0.35, 0.5, 1.0, 2.0)
DIMENSIONS = (1, 4, 16, 64, 256)
Estimator = Callable[[Any, jax.Array], jax.Array]  # (parameters, key) -> value to differentiate


class Quality(NamedTuple):
    """In percent of the true gradient: bias, its standard error, std of an estimate."""

    bias: float
    error: float
    std: float


def squared_distance(y: jax.Array) -> jax.Array:
    """f of each (relaxed) one-hot vector y."""
    return jnp.square(y - TARGET).sum(-1)


# The categorical estimators, each a mean over SAMPLES samples.

def score_function(baseline: Any) -> Estimator:
    """The score function; f need not be differentiable."""

    def mean(logits: jax.Array, key: jax.Array) -> jax.Array:
        classes = jax.random.categorical(key, logits, shape=(SAMPLES,))
        values = squared_distance(jax.nn.one_hot(classes, 4))
        log_p = jax.nn.log_softmax(logits)[classes]
        return dp.estimators.score_function(values, log_p, baseline=baseline).mean()

    return mean


def gumbel(temperature: float, hard: bool) -> Estimator:
    """A relaxed sample, or a hard one with the gradient of the relaxed one; f is differentiated."""
    net = dp.estimators.gumbel_softmax(temperature=temperature, hard=hard)

    def mean(logits: jax.Array, key: jax.Array) -> jax.Array:
        return squared_distance(net({}, jnp.tile(logits, (SAMPLES, 1)), key=key)).mean()

    return mean


def straight_through(logits: jax.Array, key: jax.Array) -> jax.Array:
    """A one-hot sample with the gradient of the probabilities."""
    hard = jax.nn.one_hot(jax.random.categorical(key, logits, shape=(SAMPLES,)), 4)
    soft = jnp.broadcast_to(jax.nn.softmax(logits), hard.shape)
    return squared_distance(dp.estimators.straight_through(hard, soft)).mean()


# The two Gaussian estimators, of variance 1.

def reparametrized(means: jax.Array, key: jax.Array) -> jax.Array:
    """Reparametrization: z is the mean plus noise, and f is differentiated."""
    tiled = jnp.broadcast_to(means, (SAMPLES, *means.shape))
    z = dp.estimators.gaussian_sample()({}, (tiled, jnp.zeros_like(tiled)), key=key)
    return jnp.square(z).sum(-1).mean()


def gaussian_score_function(means: jax.Array, key: jax.Array) -> jax.Array:
    """The score function, with the mean of f over the other samples as baseline."""
    z = jax.lax.stop_gradient(means) + jax.random.normal(key, (SAMPLES, *means.shape))
    log_p = -jnp.square(z - means).sum(-1) / 2
    values = jnp.square(z).sum(-1)
    return dp.estimators.score_function(values, log_p, baseline="leave_one_out").mean()


@functools.partial(jax.jit, static_argnums=0)
def estimate_moments(estimator: Estimator, parameters: jax.Array, keys: jax.Array) -> Any:
    """Mean and variance of the estimates, one for each key."""
    gradients = jax.vmap(jax.grad(estimator), (None, 0))(parameters, keys)
    return gradients.mean(0), gradients.var(0)


def quality(
    estimator: Estimator, parameters: jax.Array, true_gradient: Any, estimates: int, seed: int
) -> Quality:
    """Bias and std of an estimator, measured over a number of estimates."""
    mean, variance = estimate_moments(
        estimator, parameters, jax.random.split(jax.random.key(seed), estimates))
    norm, std = np.linalg.norm(true_gradient), float(jnp.sqrt(variance.sum()))
    bias = np.linalg.norm(np.asarray(mean) - np.asarray(true_gradient))
    return Quality(*(100 * float(length / norm) for length in (
        bias, std / np.sqrt(estimates), std)))


def measure_categorical(estimates: int, seed: int) -> dict[str, Quality]:
    """Every categorical estimator; the true gradient is a sum over the classes."""
    expected = lambda logits: jax.nn.softmax(logits) @ squared_distance(jnp.eye(4))  # noqa: E731
    true_gradient = jax.grad(expected)(LOGITS)
    estimators = {"score function": score_function(None),
                  "score function, leave-one-out": score_function("leave_one_out"),
                  "straight-through softmax": straight_through}
    for hard, name in ((False, "Gumbel-softmax"), (True, "straight-through Gumbel")):
        estimators |= {f"{name} {t:g}": gumbel(t, hard) for t in TEMPERATURES}
    return {name: quality(estimator, LOGITS, true_gradient, estimates, seed)
            for name, estimator in estimators.items()}


def measure_gaussian(estimates: int, seed: int) -> dict[str, list[Quality]]:
    """Both Gaussian estimators, for means that are all 1, by dimension."""
    estimators = {"reparametrized": reparametrized,
                  "score function, leave-one-out": gaussian_score_function}
    return {name: [quality(estimator, jnp.ones(n), np.full(n, 2.0), estimates, seed)
                   for n in DIMENSIONS] for name, estimator in estimators.items()}


def draw(path: pathlib.Path, categorical: dict[str, Quality], gaussian: dict[str, Any]) -> None:
    """Standard deviation by bias (categorical) and by dimension (Gaussian)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
    for name, color in (("Gumbel-softmax", "C0"), ("straight-through Gumbel", "C1")):
        bias, _, std = zip(*(categorical[f"{name} {t:g}"] for t in TEMPERATURES), strict=True)
        left.plot(bias, std, "o-", color=color, label=f"{name}, by temperature")
        for t, x, y in zip(TEMPERATURES, bias, std, strict=True):
            left.annotate(f"{t:g}", (x, y), xytext=(5, 4), textcoords="offset points", size=8)
    for (name, quality), marker, color in zip(
            list(categorical.items())[:3], "sD^", ("C3", "C2", "C4"), strict=True):
        left.scatter(quality.bias, quality.std, marker=marker, s=70, color=color, label=name,
                     zorder=3)
    left.set(title=f"Categorical: estimates from {SAMPLES} samples", yscale="log",
             xlabel="bias, percent of the true gradient",
             ylabel="standard deviation, percent of the true gradient",
             yticks=(25, 50, 100, 200, 400), yticklabels=(25, 50, 100, 200, 400))
    for (name, quality), style in zip(gaussian.items(), ("o-", "D-"), strict=True):
        right.plot(DIMENSIONS, [q.std for q in quality], style, label=name,
                   color="C0" if style == "o-" else "C2")
    right.set(title=f"Gaussian: estimates from {SAMPLES} samples; both are unbiased",
              xscale="log", yscale="log", xlabel="dimension",
              ylabel="standard deviation, percent of the true gradient",
              xticks=DIMENSIONS, xticklabels=DIMENSIONS, yticks=(25, 50, 100, 200, 400, 800),
              yticklabels=(25, 50, 100, 200, 400, 800))
    for axes in (left, right):
        axes.minorticks_off()
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--estimates", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("estimators.png"))
    args = parser.parse_args()

    categorical = measure_categorical(args.estimates, args.seed)
    gaussian = measure_gaussian(args.estimates // 4, args.seed)
    print(f"{'categorical':<34}bias %    standard deviation %")
    for name, (bias, error, std) in categorical.items():
        print(f"{name:<34}{bias:6.2f} ({error:.2f})   {std:10.1f}")
    print(f"\n{'Gaussian, standard deviation %':<34}" + "".join(f"{n:>9}" for n in DIMENSIONS))
    for name, quality in gaussian.items():
        print(f"{name:<34}" + "".join(f"{q.std:9.1f}" for q in quality))
    draw(args.out, categorical, gaussian)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
