"""Similar positions have similar encodings: sinusoidal, learned and rotary.

    python examples/course/positions.py [--short] [--seed N] [--out FOLDER]

The inner product of two sinusoidal encodings, p_t . p_(t+k), is a sum of cosines of the distance k,
and the same for all t. Rotated copies of one vector have this property too. Learned positions are
random at first; a small GPT, trained on the characters of Python's help texts, makes neighbours
similar by itself.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import text
from experiment import Experiment, run
from style import COLORS, DASHES, figure

import diffprog as dp

TIME, WIDTH = 48, 48


def products(vectors: jax.Array) -> np.ndarray:
    """Inner products of all pairs of vectors (TIME, WIDTH), divided by the mean square length."""
    found = np.asarray(vectors, np.float64) @ np.asarray(vectors, np.float64).T
    return found / np.diagonal(found).mean()


def cosines(vectors: jax.Array) -> np.ndarray:
    """Cosines between all pairs of vectors (TIME, WIDTH), after subtracting their mean."""
    centred = vectors - vectors.mean(0)
    return products(centred / jnp.linalg.norm(centred, axis=1, keepdims=True))


def spread(similarity: np.ndarray) -> float:
    """The largest difference between entries at the same distance."""
    return max(np.ptp(np.diagonal(similarity, k)) for k in range(len(similarity)))


def learned(experiment: Experiment, steps: int) -> tuple[jax.Array, jax.Array]:
    """The learned positions of a GPT, before and after training on text."""
    letters, ids = np.unique(list(text()), return_inverse=True)
    starts = experiment.rng.integers(len(ids) - TIME, size=(steps, 24, 1))
    data = ids[starts + np.arange(TIME + 1)].astype(np.int32)  # (steps, 24, TIME + 1)
    net = dp.models.gpt(len(letters), length=TIME, width=WIDTH, depth=1, heads=4)
    step = dp.make_step(net, dp.text.next_token(), optax.adam(5e-3))
    state = step.init(experiment.key, data[0, :, :-1])
    before = jnp.copy(state.params["positions"]["embedding"])
    fit = dp.fit(step, data, state=state, steps=steps, progress=False)
    experiment.record("loss of the trained GPT, bits per character", fit.history[-1]["bits"])
    return before, fit.state.params["positions"]["embedding"]


def main(experiment: Experiment) -> None:
    """Compare the encodings of all pairs of positions."""
    sinusoidal = dp.sinusoidal_positions()({}, jnp.zeros((TIME, WIDTH)))
    query = jax.random.normal(experiment.key, (WIDTH,))
    rotated = dp.rotary()(jnp.tile(query, (TIME, 1)))
    before, after = learned(experiment, experiment.pick(500, 150))

    drawn = figure(10, 6.2, "Similarity of positions t and u")
    similar = {"sinusoidal, p_t . p_u": products(sinusoidal),
               "rotary, R_t q . R_u q": products(rotated),
               "learned, untrained": cosines(before), "learned, trained on text": cosines(after)}
    halves: Any = drawn.subfigures(1, 2, width_ratios=(1.25, 1))
    maps, curves = halves
    image: Any = None  # the last of them, for the colour bar
    panels = maps.subplots(2, 2, sharex=True, sharey=True)
    for axes, (name, similarity) in zip(panels.flat, similar.items(), strict=True):
        image = axes.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set(title=name)
        axes.grid(False)
    maps.supxlabel("position u", fontsize=10)
    maps.supylabel("position t", fontsize=10)
    maps.colorbar(image, ax=panels, shrink=0.6, label="similarity")

    upper, lower = curves.subplots(2, 1, sharex=True)
    for t, color, dash in zip((0, 10, 20), COLORS, DASHES, strict=False):
        for axes, name in ((upper, "sinusoidal, p_t . p_u"), (lower, "learned, trained on text")):
            axes.plot(similar[name][t, t:], color=color, ls=dash, label=f"t = {t}")
    upper.set(title="sinusoidal: one curve for all t", ylabel="p_t . p_(t+k)")
    lower.set(title="learned: neighbours alike", xlabel="distance k, steps", ylabel="cosine")
    upper.legend()
    experiment.save(drawn, "positions", "Left, all pairs of positions; right, over the distance.")

    distances = np.arange(TIME)
    speeds = 10000.0 ** (-2 * np.arange(WIDTH // 2) / WIDTH)
    formula = np.cos(distances[:, None] * speeds).sum(1) / (WIDTH // 2)  # (TIME,)
    error = abs(similar["sinusoidal, p_t . p_u"][0] - formula).max()
    experiment.record("difference of p_0 . p_k from the sum of cosines", error)
    for name in similar:
        experiment.record(f"largest difference at equal distance, {name}", spread(similar[name]))
    near = {name: np.diagonal(similarity, 1).mean() for name, similarity in similar.items()}
    far = {name: np.diagonal(similarity, 32).mean() for name, similarity in similar.items()}
    for name in similar:
        experiment.record(f"mean similarity 1 step apart, {name}", near[name])
        experiment.record(f"mean similarity 32 steps apart, {name}", far[name])

    experiment.claim("p_t . p_(t+k) of sinusoidal positions is the sum of cosines of "
                     "k / 10000^(2i/D), whatever t, within 1e-5.",
                     error < 1e-5 and spread(similar["sinusoidal, p_t . p_u"]) < 1e-5)
    experiment.claim("The product of a rotated query and a rotated key depends on their distance "
                     "alone, within 1e-5.", spread(similar["rotary, R_t q . R_u q"]) < 1e-5)
    experiment.claim("Learned positions of neighbours are unrelated before training.",
                     abs(near["learned, untrained"]) < 0.15)
    experiment.claim("Training on text makes learned positions similar to their neighbours and "
                     "dissimilar to distant ones.",
                     near["learned, trained on text"] > 0.2 > far["learned, trained on text"] + 0.2)


if __name__ == "__main__":
    run(main)
