"""Five optimizers at many learning rates: each has its range, and beyond it diverges.

    python examples/course/step_sizes.py [--short] [--seed N] [--out FOLDER]

An MLP on 8 x 8 digits. GD takes all training images in each step, the others 64. All rates of an
optimizer train at once: a step is a pure function, so `jax.vmap` runs it for each rate, and a
schedule is an array of rates, one for each step.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import digits
from experiment import Experiment, run
from style import COLORS, DASHES, figure

import diffprog as dp

NET = dp.flatten() >> dp.models.mlp([64, 64], 10)
INPUT = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
OBJECTIVE = dp.classification()
OPTIMIZERS = {  # name -> optimizer of a rate
    "GD": lambda rate: optax.sgd(rate),
    "SGD": lambda rate: optax.sgd(rate),
    "momentum 0.9": lambda rate: optax.sgd(rate, 0.9),
    "Adam": lambda rate: optax.adam(rate),
    "Muon": lambda rate: dp.training.muon(rate, NET, INPUT),
}
STEPS = {name: dp.make_step(NET, OBJECTIVE, optax.inject_hyperparams(optimizer)(rate=0.0),
                            donate=False) for name, optimizer in OPTIMIZERS.items()}
WORST = 10.0  # losses beyond are drawn here


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, None, 0))
def train(name: str, state: Any, batches: Any, rates: Any) -> Any:
    """The last state and the losses, with a rate for each step; `batches` are stacked."""
    def take(state: Any, given: Any) -> Any:
        batch, rate = given
        hyperparams = state.opt_state.hyperparams | {"rate": rate}
        state = state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))
        state, metrics = STEPS[name].apply(state, batch)
        return state, metrics["loss"]

    return jax.lax.scan(take, state, (batches, rates))


def main(experiment: Experiment) -> None:
    """Sweep the rates of all optimizers, then schedules of two of them."""
    steps = experiment.pick(150, 30)
    x, y = digits(seed=experiment.seed)[:2]
    count = experiment.pick(len(x), 256)
    whole = x[:count], y[:count]
    small = [np.stack(each) for each in zip(*itertools.islice(
        dp.batches(whole, 64, seed=experiment.seed), steps), strict=True)]
    large = [np.broadcast_to(each, (steps, *each.shape)) for each in whole]
    rates = np.geomspace(1e-4, 30, experiment.pick(23, 12)).astype(np.float32)
    begin = {name: step.init(experiment.key, x[:1]) for name, step in STEPS.items()}

    @jax.jit
    @jax.vmap
    def loss(params: Any) -> jax.Array:
        """The cross-entropy of all training images, in nats."""
        return OBJECTIVE(NET, params, {}, whole, key=None, train=False)[0]

    drawn = figure(11, 4.2, f"Five optimizers on digits, {steps} steps each")
    left, right = drawn.subplots(1, 2)
    best, least, limit = {}, {}, {}
    for name, color, dashes in zip(STEPS, COLORS, DASHES, strict=False):
        states, curves = train(name, begin[name], large if name == "GD" else small,
                               np.repeat(rates[:, None], steps, 1))
        last = np.nan_to_num(np.asarray(loss(states.params)), nan=np.inf)
        best[name], least[name] = rates[last.argmin()], last.min()
        limit[name] = rates[last < np.log(10)].max()  # the loss of a guess
        experiment.record(f"loss at the best rate, {name}", least[name])
        experiment.record(f"best rate, {name}", best[name])
        experiment.record(f"largest rate that learns, {name}", limit[name])
        left.plot(rates, np.minimum(last, WORST), color=color, ls=dashes, label=name)
        right.plot(np.asarray(curves)[last.argmin()], color=color, ls=dashes, lw=1.2,
                   label=f"{name}, rate {best[name]:.2g}")
    left.axhline(np.log(10), color="0.6", lw=1)
    left.set(xscale="log", yscale="log", xlabel="learning rate",
             ylabel="cross-entropy of all training images (nats)",
             title="After the last step; grey: a guess")
    right.set(yscale="log", xlabel="step", ylabel="cross-entropy of the batch (nats)",
              title="The best rate of each")
    for axes in (left, right):
        axes.legend(fontsize=8)
    experiment.save(drawn, "rates", "Loss against the learning rate, and curves of the best rates.")

    warmup = steps // 10
    shapes = {
        "constant": np.ones(steps),
        "cosine decay": np.asarray(optax.cosine_decay_schedule(1.0, steps)(np.arange(steps))),
        "warmup, stable, decay": np.asarray(dp.training.warmup_stable_decay(
            1.0, warmup, steps // 2 - warmup, steps - steps // 2)(np.arange(steps))),
    }
    drawn = figure(11, 3.8, "Schedules of Adam's rate")
    left, right = drawn.subplots(1, 2)
    for (name, shape), color, dashes in zip(shapes.items(), COLORS, DASHES, strict=False):
        states, _ = train("Adam", begin["Adam"], small, np.float32(rates[:, None] * shape))
        last = np.nan_to_num(np.asarray(loss(states.params)), nan=np.inf)
        experiment.record(f"loss at the best rate, Adam, {name}", last.min())
        left.plot(shape, color=color, ls=dashes, label=name)
        right.plot(rates, np.minimum(last, WORST), color=color, ls=dashes, label=name)
    left.set(xlabel="step", ylabel="factor of the rate", title="Schedules")
    right.set(xscale="log", yscale="log", xlabel="largest rate",
              ylabel="cross-entropy of all training images (nats)", title="After the last step")
    left.legend()
    experiment.save(drawn, "schedules", "Three schedules, and the loss by their largest rate.")

    experiment.claim("The largest rate at which Adam learns is less than half of that of SGD.",
                     limit["Adam"] < limit["SGD"] / 2)
    experiment.claim("Momentum, Adam and Muon come further than GD and SGD, each at its best rate.",
                     max(least["momentum 0.9"], least["Adam"], least["Muon"])
                     < min(least["GD"], least["SGD"]))


if __name__ == "__main__":
    run(main)
