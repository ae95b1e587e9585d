"""Attention computes its weights from the input; a linear map over time has fixed ones.

    python examples/course/attention_or_linear.py [--short] [--seed N] [--out FOLDER]

Both mix the 16 positions of a sequence by a 16 x 16 matrix. Two tasks: "reverse" writes the
sequence backwards, where the matrix is the same for all inputs; "look up" answers with the value
that stands beside the same key, wherever that is, so that the matrix depends on the input.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from style import bare, figure

import diffprog as dp

LENGTH, SYMBOLS, WIDTH = 16, 16, 32


def reverse(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random symbols, as pairs with an unused second symbol, and the same backwards."""
    x = rng.integers(SYMBOLS, size=(count, LENGTH))
    return np.stack([x, np.zeros_like(x)], -1), x[:, ::-1]


def look_up(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (key, value): eight keys in random order with their values, then the keys alone."""
    order = rng.permuted(np.tile(np.arange(SYMBOLS), (count, 1)), axis=1)[:, :8]
    values = rng.integers(1, SYMBOLS, size=(count, 8))
    asked = rng.permuted(np.tile(np.arange(8), (count, 1)), axis=1)
    keys = np.concatenate([order, np.take_along_axis(order, asked, 1)], 1)
    x = np.stack([keys, np.concatenate([values, np.zeros_like(values)], 1)], -1)
    y = np.concatenate([values, np.take_along_axis(values, asked, 1)], 1)
    return x, y


def net(mixing: Any) -> dp.Layer:
    """Embedded pairs (batch, time, 2), two layers that mix positions, and logits."""
    block = dp.pre_norm(mixing) >> dp.pre_norm(dp.ffn(2 * WIDTH))
    return dp.serial(
        dp.embedding(SYMBOLS, WIDTH // 2), dp.flatten(keep=2), dp.learned_positions(LENGTH),
        first=block, second=block, head=dp.layer_norm() >> dp.linear(SYMBOLS))


def over_time(x: jax.Array) -> jax.Array:
    """(batch, time, features) -> (batch, features, time)."""
    return x.swapaxes(1, 2)


MIXING = {"attention": dp.self_attention(4),
          "linear map over time": dp.serial(over_time, dp.linear(LENGTH), over_time)}
TASKS = {"reverse": reverse, "look up": look_up}


def main(experiment: Experiment) -> None:
    """Train both on both tasks, and draw how positions are mixed."""
    accuracy, drawn = {}, figure(10, 5.4, "How an output position (row) depends on an input "
                                          "position (column), for two inputs")
    grid = drawn.subplots(2, 4)
    for row, (task, make) in enumerate(TASKS.items()):
        for column, (name, mixing) in enumerate(MIXING.items()):
            layer, rng = net(mixing), experiment.rng
            steps = experiment.pick(1500, 450)
            step = dp.make_step(layer, dp.classification(), optax.adamw(
                optax.cosine_onecycle_schedule(steps, 3e-3)))
            data = (make(rng, 32) for _ in iter(int, 1))
            params = dp.fit(step, data, key=experiment.key, steps=steps,
                            progress=False).state.params
            x, y = make(np.random.default_rng(experiment.seed + 1), 500)
            correct = np.asarray(dp.predict(layer, params, x)).argmax(-1) == y
            asked = correct[:, 8:] if task == "look up" else correct
            accuracy[task, name] = 100 * asked.mean()
            experiment.record(f"{task}, {name} (percent)", accuracy[task, name])
            for i in range(2):
                axes = grid[row, 2 * column + i]
                axes.imshow(dependence(layer, params, x[i]))
                bare(axes)
                axes.set_title(f"{task}\n{name}\n{accuracy[task, name]:.0f} %, input {i + 1}")
    experiment.save(drawn, "mixing", "The size of the derivative of an output by an embedded "
                                     "input, by position. A linear map mixes every input alike.")

    experiment.claim("The linear map reverses a sequence.",
                     accuracy["reverse", "linear map over time"] > 90)
    experiment.claim("Only attention looks up: the linear map is right in less than half of the "
                     "cases.", accuracy["look up", "attention"]
                     > 90 > 50 > accuracy["look up", "linear map over time"])


def dependence(layer: dp.Layer, params: Any, x: np.ndarray) -> np.ndarray:
    """||d logits_i / d embedding_j|| of one input: (output position, input position)."""
    embed, *rest = layer.children.items()
    inner = dp.serial(**{name.replace("~", "_"): child for name, child in rest})
    renamed = {name.replace("~", "_"): params.get(name, {}) for name, _ in rest}
    own = {name: part for name, part in renamed.items() if part}
    embedded = embed[1](params[embed[0]], x[None])
    jacobian = jax.jacrev(lambda e: inner(own, e)[0])(embedded)  # (T, symbols, 1, T, 2, F)
    return np.asarray(jnp.sqrt((jacobian**2).sum((1, 2, 4, 5))))


if __name__ == "__main__":
    run(main)
