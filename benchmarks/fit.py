"""What `fit` costs beside the steps: CPU time of the main thread between two calls of the step.

    python benchmarks/fit.py [--steps N]

The net is small, readings are every 50 steps, and a JSON log is written. The median is what almost
every step costs; the mean holds the readings too. The goal is a median of at most 0.2 ms.

A second line compares `fit` with 10 steps in each call and with one, in CPU time of all threads;
`measuring.py` describes how.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from measuring import cpu, interleaved

import diffprog as dp


def make_step(steps_per_call: int = 1) -> dp.training.Step:
    return dp.make_step(dp.models.mlp([32], 10), dp.classification(), optax.adam(1e-3),
                        steps_per_call=steps_per_call)


def batches() -> dp.data.Batches:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(512, 16)).astype(np.float32), draw.integers(0, 10, 512)
    return dp.batches((x, y), 64, seed=0)


def between_steps(steps: int) -> np.ndarray[Any, Any]:
    """CPU time of the main thread in ms between the end of a step's call and the next call."""
    step = make_step()
    entered, left = [], []

    def timed(state: Any, batch: Any) -> Any:
        entered.append(time.thread_time())
        result = step.apply(state, batch)
        left.append(time.thread_time())
        return result

    with tempfile.TemporaryDirectory() as folder:
        dp.fit(dataclasses.replace(step, apply=timed), batches(),
               key=jax.random.key(0), steps=steps, log_every=50, progress=False,
               log=pathlib.Path(folder) / "log.jsonl")
    return 1e3 * (np.array(entered[1:]) - np.array(left[:-1]))


def by_calls(steps: int) -> dict[str, tuple[float, float]]:
    """CPU time of `fit` with one step in each call and with 10, and the ratio to the first."""
    def side(step: dp.training.Step) -> Callable[[], float]:
        def run() -> Any:
            return dp.fit(step, batches(), key=jax.random.key(0), steps=steps, progress=False)

        run()  # compiles
        return lambda: cpu(run)

    return interleaved({f"{n} per call": side(make_step(n)) for n in (1, 10)}, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description="What fit costs beside the steps.")
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    times = between_steps(steps)
    print(f"fit between two steps: median {np.median(times):.3f} ms, mean {times.mean():.3f} ms of "
          f"CPU time of the main thread, over {len(times) + 1} steps")
    for name, (seconds, ratio) in by_calls(steps).items():
        print(f"{name}: {1e3 * seconds / steps:.3f} ms of CPU time a step, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
