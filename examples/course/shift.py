"""A phrase that moves: which encodings of position carry over to places never trained.

    python examples/course/shift.py [--short] [--seed N] [--out FOLDER]

"I walk my dog right after" and "my dog right after I walk": who walks is the word before "walk",
wherever the phrase stands. A Transformer block must name that word, among random words. First it
is trained with the phrase in the first half of 16 steps and tried in the second; then trained
everywhere in 16 steps and tried in sequences up to four times as long.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from style import COLORS, DASHES, figure

import diffprog as dp

WORDS, WIDTH, BATCH, T = 12, 32, 32, 16
WALK = WORDS  # the id of "walk"


@dp.program(join=dp.linear(WIDTH))
def append_time(layers: Any, x: jax.Array) -> jax.Array:
    """``(x_t, t / T) @ W + b``."""
    t = jnp.broadcast_to(jnp.arange(x.shape[-2])[:, None] / T, (*x.shape[:-1], 1))
    return layers.join(jnp.concatenate([x, t], -1))


def block(positions: Any, rotary: Any = None) -> dp.Layer:
    """Words (batch, time) to logits of a word at each step."""
    return (dp.embedding(WORDS + 1, WIDTH, embedding_init=1.0) >> positions
            >> dp.pre_norm(dp.self_attention(4, rotary=rotary)) >> dp.pre_norm(dp.ffn(2 * WIDTH))
            >> dp.layer_norm() >> dp.linear(WORDS))


NETS = {
    "none": block(lambda x: x),
    "t appended": block(append_time),
    "sinusoidal": block(dp.sinusoidal_positions()),
    "learned": block(dp.learned_positions(4 * T, embedding_init=0.7)),
    "rotary": block(lambda x: x, dp.rotary()),
}


def draw(
    rng: np.random.Generator, shape: tuple[int, ...], time: int, places: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Random words (*shape, time) with "walk" at a place in this range, and the word before it."""
    x = rng.integers(WORDS, size=(*shape, time)).astype(np.int32)
    walk = rng.integers(*places, size=shape)[..., None] == np.arange(time)  # (*shape, time)
    y = np.roll(x, 1, -1)
    return {"x": np.where(walk, WALK, x).astype(np.int32), "y": y, "target_mask": walk}


def main(experiment: Experiment) -> None:
    """Train each net on both tasks, and try it at other places."""
    rng, steps = experiment.rng, experiment.pick(500, 250)
    keys = jax.random.split(experiment.key, experiment.pick(2, 1))
    kinds = experiment.pick(list(NETS), ["learned", "rotary"])
    early, late, anywhere = (1, T // 2), (T // 2, T), (1, T)
    both = jax.tree.map(lambda *parts: np.stack(parts), *(
        draw(rng, (steps, BATCH), T, places) for places in (early, anywhere)))
    lengths = experiment.pick([T, 2 * T, 4 * T], [T, 4 * T])
    tests = [draw(rng, (512,), T, places) for places in (early, late)]
    longer = [draw(rng, (512,), length, (1, length)) for length in lengths]

    found, over = {}, {}
    for kind in kinds:
        step = dp.make_step(NETS[kind], dp.classification(), optax.adam(3e-3), donate=False)

        def trained(key: jax.Array, batches: Any, step: Any = step) -> Any:
            state = step.init(key, batches["x"][0])
            return jax.lax.scan(
                lambda state, batch: (step.apply(state, batch)[0], None), state, batches)[0]

        over_seeds = jax.vmap(trained, (0, None))
        states = jax.jit(jax.vmap(over_seeds, (None, 0)))(keys, both)  # (tasks, seeds, ...)
        evaluate = jax.jit(jax.vmap(step.evaluate, (0, None)))
        halves, everywhere = (jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in (0, 1))
        found[kind] = [100 * float(evaluate(halves, test)["accuracy"].mean()) for test in tests]
        over[kind] = [100 * float(evaluate(everywhere, test)["accuracy"].mean())
                      for test in longer]
        experiment.record(f"{kind}: accuracy at trained positions, percent", found[kind][0])
        experiment.record(f"{kind}: accuracy at shifted positions, percent", found[kind][1])
        for length, accuracy in zip(lengths, over[kind], strict=True):
            experiment.record(f"{kind}: accuracy at length {length}, trained at {T}, percent",
                              accuracy)

    drawn = figure(10, 4.2, 'Naming the word before "walk", by encoding of positions')
    left, right = drawn.subplots(1, 2)
    rows = np.arange(len(kinds))
    for i, (name, hatch) in enumerate([("first half, as trained", ""), ("second half", "///")]):
        left.bar(rows + 0.4 * i - 0.2, [found[kind][i] for kind in kinds], 0.38, color=COLORS[i],
                 hatch=hatch, edgecolor="white", label=name)
    left.axhline(100 / WORDS, color="gray", lw=1, ls=":")
    left.set(xticks=rows, xticklabels=kinds, ylabel="accuracy on new sequences, percent",
             ylim=(0, 120), title="Trained in the first half")
    left.legend(ncols=2)
    for kind, color, dash in zip(kinds, COLORS, DASHES, strict=False):
        right.plot(lengths, over[kind], color=color, ls=dash, marker="o", label=kind)
    right.axhline(100 / WORDS, color="gray", lw=1, ls=":")
    right.set(xticks=lengths, xlabel="length of the sequences tried, steps", ylim=(0, 120),
              ylabel="accuracy, percent", title=f"Trained at length {T}")
    right.legend(ncols=3, fontsize=8)
    experiment.save(drawn, "shift", "Left, a phrase at shifted positions; right, longer "
                    "sequences. Dotted: chance.")

    experiment.claim("Learned positions fail where the phrase was never trained.",
                     found["learned"][1] < found["learned"][0] - 25)
    experiment.claim("Rotary positions carry over to shifted ones, at least 20 points better than "
                     "learned positions.", found["rotary"][1] > found["learned"][1] + 20)
    experiment.claim("At four times the trained length rotary positions lose less than learned "
                     "ones.", over["rotary"][-1] > over["learned"][-1] + 15)
    if "none" in kinds:
        experiment.claim("Without positions the word before cannot be found.",
                         found["none"][0] < 40)


if __name__ == "__main__":
    run(main)
