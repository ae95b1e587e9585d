"""The factor 1/sqrt(d) keeps attention from looking at one key only as d grows.

    python examples/course/attention_scale.py [--short] [--seed N] [--out FOLDER]

Queries and keys with d independent features of variance 1 have scores q . k of variance d. Softmax
of scores of variance 1 is spread over the keys whatever d is; softmax of scores of variance d tends
to a single 1, and its gradient to zero. Measured is the entropy of the weights, in bits, over 64
keys, where uniform weights have 6 bits, and the gradient of the weights by the scores.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, run
from style import BLUE, ORANGE, figure

import diffprog as dp

KEYS = 64
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@functools.partial(jax.jit, static_argnums=3)
def measure(key: jax.Array, features: int, scale: float, queries: int) -> jax.Array:
    """The mean entropy in bits, and the mean norm of the Jacobian of the weights by the scores."""
    used = jnp.arange(SIZES[-1]) < features  # of the largest size, so that one program serves all
    query, keys = (used * jax.random.normal(k, (queries, n, SIZES[-1]))
                   for k, n in zip(jax.random.split(key), (1, KEYS), strict=True))
    # With the unit vectors as values, the output of attention is its weights.
    units = jnp.broadcast_to(jnp.eye(KEYS), (queries, KEYS, KEYS))
    w = dp.attention(query, keys, units, scale=scale)[:, 0]  # (queries, keys)
    entropy = -jnp.sum(w * jnp.log2(jnp.maximum(w, 1e-30)), -1)
    # The Jacobian of softmax is diag(w) - w w^T.
    slopes = w[:, :, None] * jnp.eye(KEYS) - w[:, :, None] * w[:, None]
    return jnp.stack([entropy.mean(), jnp.linalg.norm(slopes, axis=(1, 2)).mean()])


def main(experiment: Experiment) -> None:
    """Measure entropy and slope with and without the factor."""
    queries = experiment.pick(500, 200)
    found = {name: np.array([measure(jax.random.fold_in(experiment.key, d), d, scale(d), queries)
                             for d in SIZES])
             for name, scale in {"with 1/sqrt(d)": lambda d: d**-0.5,
                                 "without": lambda d: 1.0}.items()}

    drawn = figure(10, 3.8, "Attention weights of random queries over 64 keys")
    left, right = drawn.subplots(1, 2)
    for (name, rows), color, marker in zip(found.items(), (BLUE, ORANGE), "os", strict=True):
        left.plot(SIZES, rows[:, 0], color=color, marker=marker, label=name)
        right.plot(SIZES, rows[:, 1], color=color, marker=marker, label=name)
        for d, (entropy, slope) in zip(SIZES, rows, strict=True):
            if d in (1, 64, 1024):
                experiment.record(f"entropy {name}, d = {d} (bits)", entropy)
                experiment.record(f"slope of softmax {name}, d = {d}", slope)
    left.axhline(6, color="black", ls=":", label="uniform weights")
    left.set(xscale="log", xlabel="d, features of a query and a key", ylabel="bits",
             title="Entropy of the weights", ylim=(0, 6.5))
    right.set(xscale="log", xlabel="d, features of a query and a key",
              title="Size of d weights / d scores", yscale="log")
    left.legend()
    experiment.save(drawn, "entropy", "Entropy of attention weights, and the slope of softmax, "
                                      "with and without the factor 1/sqrt(d).")

    scaled, bare = found["with 1/sqrt(d)"], found["without"]
    experiment.claim("With the factor the entropy hardly depends on d, from d = 8 on.",
                     np.ptp(scaled[3:, 0]) < 0.15)
    experiment.claim("Without it a query of 1,024 features attends to one key: less than a quarter "
                     "of a bit.", bare[-1, 0] < 0.25)
    experiment.claim("Without it the slope of softmax falls with d.",
                     bare[-1, 1] < 0.5 * bare[:, 1].max())


if __name__ == "__main__":
    run(main)
