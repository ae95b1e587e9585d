"""Tokens until a small GPT reaches a validation loss, with `muon` and with `adamw`.

    python benchmarks/optimizers.py [--steps N]

Three layers of width 64, 4 heads, windows of 64 bytes, batch 16, on the help texts of the standard
library (`pydoc_data.topics`). Each optimizer trains at four learning rates around its best, from
the same initial parameters, on the same batches, with the same schedule; its other options are the
defaults. The rate that reaches the target first is trained from two more seeds. The validation loss
is that of windows spread over the last 10 % of the text, the same in each reading. `measuring.py`
describes how the time of a step is measured.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import cpu, interleaved

import diffprog as dp

LENGTH, WIDTH, DEPTH, HEADS, BATCH = 64, 64, 3, 4, 16
STEPS, EVERY, SEEDS = 400, 20, 3
TARGET = 2.2  # nats per byte
NET = dp.models.gpt(256, length=LENGTH, width=WIDTH, depth=DEPTH, heads=HEADS)
INPUT = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

OPTIMIZERS: dict[str, Callable[[optax.Schedule], Any]] = {
    "adamw": dp.training.adamw,
    "muon": lambda schedule: dp.training.muon(schedule, NET, INPUT),
}
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3), "muon": (4e-3, 8e-3, 16e-3, 32e-3)}


class Trained(NamedTuple):
    """What a run is compared by."""

    tokens: float  # until the first reading below the target; infinite if there is none
    loss: float  # on validation data, after the last step


def windows() -> tuple[np.ndarray, np.ndarray]:
    """The windows of the training part, (count, length + 1), and those of the held-out part."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    cut = len(ids) * 9 // 10
    training, held_out = (np.lib.stride_tricks.sliding_window_view(part, LENGTH + 1)
                          for part in (ids[:cut], ids[cut:]))
    return training, held_out[:: 4 * LENGTH]


def make_step(optimizer: Callable[[optax.Schedule], Any], steps: int) -> dp.training.Step:
    """A step whose learning rate is in the state, so that all rates share one program."""
    warmup, decay = steps // 10, steps - steps // 10 * 7

    def at_rate(rate: Any) -> Any:
        shape = dp.training.warmup_stable_decay(1.0, warmup, steps - warmup - decay, decay)
        return optimizer(lambda count: rate * shape(count))

    return dp.make_step(NET, dp.text.next_token(), optax.inject_hyperparams(at_rate)(rate=0.0))


def begin(step: dp.training.Step, rate: float, seed: int) -> dp.training.TrainState:
    state = step.init(jax.random.key(seed), INPUT)
    hyperparams = state.opt_state.hyperparams | {"rate": jnp.float32(rate)}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))


def train(step: dp.training.Step, rate: float, seed: int, steps: int, data: Any) -> Trained:
    training, held_out = data
    result = dp.fit(step, dp.batches(training, BATCH, seed=seed), state=begin(step, rate, seed),
                    steps=steps, validation=dp.batches(held_out, BATCH, remainder="drop"),
                    log_every=EVERY, progress=False)
    losses = {reading["step"]: reading["validation/loss"] for reading in result.history}
    below = [number for number, loss in losses.items() if loss < TARGET]
    tokens = min(below) * BATCH * LENGTH if below else np.inf
    return Trained(tokens, losses[steps])


def print_row(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def show(tokens: float) -> str:
    return "not reached" if tokens == np.inf else f"{tokens:,}"


def step_times(steps: dict[str, dp.training.Step], data: Any, rounds: int) -> dict[str, Any]:
    """CPU time of a step in ms, and its ratio to that of the first optimizer."""
    now = {name: begin(step, 1e-3, 0) for name, step in steps.items()}
    batch = next(iter(dp.batches(data[0], BATCH, seed=0)))

    def call(name: str) -> None:
        now[name], _ = steps[name].apply(now[name], batch)
        jax.block_until_ready(now[name])

    times = interleaved({name: lambda name=name: cpu(lambda: call(name)) for name in steps}, rounds)
    return {name: (1e3 * seconds, ratio) for name, (seconds, ratio) in times.items()}


def main() -> None:
    """Print a table of all rates, and one of the best of each optimizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    count = parser.parse_args().steps
    data = windows()
    print(f"jax {jax.__version__} on {jax.default_backend()}, optax {optax.__version__}, "
          f"diffprog {dp.__version__}, {count} steps of {BATCH * LENGTH:,} tokens\n")
    steps = {name: make_step(optimizer, count) for name, optimizer in OPTIMIZERS.items()}
    found: dict[str, dict[float, Trained]] = {name: {} for name in steps}
    print_row("Optimizer", "Rate", f"Tokens to {TARGET}", "Last loss")
    print("|---|---|---|---|")
    for name, step in steps.items():
        for rate in RATES[name]:
            found[name][rate] = run = train(step, rate, 0, count, data)
            print_row(f"`{name}`", rate, show(run.tokens), f"{run.loss:.3f}")

    times = step_times(steps, data, max(1, min(100, count)))
    print()
    print_row("Optimizer", "Best rate", f"Tokens to {TARGET}, seeds 0 to {SEEDS - 1}",
              "Last losses", "Step, CPU ms", "Ratio")
    print("|---|---|---|---|---|---|")
    for name, step in steps.items():
        best = min(found[name], key=lambda rate: found[name][rate])
        runs = [found[name][best],
                *(train(step, best, seed, count, data) for seed in range(1, SEEDS))]
        print_row(f"`{name}`", best, "; ".join(show(run.tokens) for run in runs),
                  "; ".join(f"{run.loss:.3f}" for run in runs),
                  f"{times[name][0]:.0f}", f"{times[name][1]:.2f}")


if __name__ == "__main__":
    main()
