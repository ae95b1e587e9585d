"""Logs of a run: lines of JSON, TensorBoard, and progress in the terminal.

Each is an observer ``(step, state, metrics)``, so that a loop is

    log, show = dp.runtime.jsonl("log.jsonl"), dp.runtime.progress(1000)
    for number, batch in zip(range(1, 1001), data):
        state, metrics = step.apply(state, batch)
        if number % 50 == 0:
            for observe in (log, show):
                observe(number, state, metrics)

A tracker of another package is a function ``log(step, metrics)`` of one line, for `fit` or a loop:

    run = wandb.init(project="digits")         # Weights & Biases
    log = lambda step, metrics: run.log(metrics, step=step)

    trackio.init(project="digits")             # trackio
    log = lambda step, metrics: trackio.log(metrics, step=step)

    mlflow.start_run()                         # MLflow
    log = lambda step, metrics: mlflow.log_metrics(metrics, step=step)
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffprog.core.errors import LayerError
from diffprog.core.notation import code, show
from diffprog.runtime.watching import Histogram, Observer

__all__ = ["jsonl", "progress", "tensorboard"]

Write = Callable[[int, dict[str, float]], None]
Log = str | pathlib.Path | Write | Observer


def jsonl(path: str | pathlib.Path) -> Observer:
    """An observer that appends a line of JSON to a file at each reading.

    A line is on disk when the call returns, so that a killed run keeps its log. ``[json.loads(line)
    for line in open(path)]`` is the history of a run.

    Args:
        path: of the file; its folder must exist. A file that exists is continued.

    Returns:
        ``(step, state, metrics)``; the state is not used, and metrics of JAX become numbers.

    Raises:
        LayerError: at a reading, if a metric is neither a number nor a `Histogram`.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> log = dp.runtime.jsonl(path)
        >>> log(50, None, {"loss": jnp.array(0.5)})
        >>> print(path.read_text(), end="")
        {"step": 50, "loss": 0.5}
    """
    file = pathlib.Path(path).absolute()
    file.open("a").close()  # a path that cannot be written raises before training

    def log(step: int, state: Any, metrics: dict[str, Any]) -> None:
        line = json.dumps({"step": step, **plain(metrics)})
        with file.open("a") as opened:
            opened.write(line + "\n")

    return log


def tensorboard(folder: str | pathlib.Path) -> TensorBoard:
    """An observer that writes scalars and histograms for TensorBoard; needs tensorboardX.

    A thread writes readings to disk, about once a second; ``close()``, or a ``with`` block, writes
    the last ones.

    Args:
        folder: of the event files; it is made if it does not exist.

    Returns:
        ``(step, state, metrics)``; the state is not used, and metrics of JAX become numbers.

    Raises:
        ImportError: tensorboardX is not installed.
        LayerError: at a reading, if a metric is neither a number nor a `Histogram`.

    Example:
        >>> import os, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with dp.runtime.tensorboard(folder) as log:
        ...     log(50, None, {"loss": jnp.array(0.5)})
        >>> len(os.listdir(folder))
        1
    """
    return TensorBoard(folder)


class TensorBoard(contextlib.ExitStack):
    """The observer of `tensorboard`."""

    def __init__(self, folder: str | pathlib.Path) -> None:
        super().__init__()
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError("a log for TensorBoard needs tensorboardX: "
                              "pip install 'diffprog[logs]'") from error
        self._writer = SummaryWriter(str(folder), flush_secs=1)
        self.callback(self._writer.close)

    def __call__(self, step: int, state: Any, metrics: dict[str, Any]) -> None:
        for name, value in plain(metrics).items():
            if isinstance(value, Histogram):
                self._writer.add_histogram_raw(name, **_raw(value), global_step=step)
            else:
                self._writer.add_scalar(name, value, step)


def progress(steps: int, *, taken: int = 0) -> Progress:
    """An observer that shows steps, losses, steps per second and the time left.

    On a terminal it is one bar of tqdm; elsewhere, as in a file or a batch system, each reading is
    a line. Both are written to the standard error. A call with empty metrics moves the bar only.
    ``close()``, or a ``with`` block, ends the bar.

    Args:
        steps: number of steps to take; positive.
        taken: number of steps taken before, in a run that is resumed.

    Returns:
        ``(step, state, metrics)``; metrics named ``loss`` or ``.../loss`` are shown.

    Raises:
        ImportError: tqdm is not installed, and there is a terminal.

    Example:
        >>> with dp.runtime.progress(1000) as show:
        ...     show(50, None, {"loss": 0.5})  # step 50/1000, loss 0.5, 98.1 steps/s, 0:00:10 left
    """
    return Progress(steps, taken)


class Progress(contextlib.ExitStack):
    """The observer of `progress`."""

    def __init__(self, steps: int, taken: int) -> None:
        super().__init__()
        self._bar, self._taken = self.enter_context(bar(steps, True)), taken

    def __call__(self, step: int, state: Any, metrics: dict[str, Any]) -> None:
        self._bar.update(step - self._taken)
        self._taken = step
        losses = {name: value for name, value in metrics.items() if name.split("/")[-1] == "loss"}
        if losses:
            self._bar.set_postfix({name: f"{x:.4g}" for name, x in plain(losses).items()})


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics as numbers of Python, and histograms."""
    return {name: value if isinstance(value, Histogram) else _number(name, value)
            for name, value in metrics.items()}


def _number(name: str, value: Any) -> float | int:
    number = np.asarray(value)
    if number.shape == () and jnp.issubdtype(number.dtype, jnp.floating):
        return float(number)
    if number.shape == () and number.dtype.kind in "iub":
        return int(number)
    raise LayerError(f"a number as the metric {name}", show(value),
                     "take its mean, or leave it out")


def _raw(histogram: Histogram) -> dict[str, Any]:
    """A histogram in the fields of TensorBoard, with moments as if entries were mid-bin."""
    counts, edges = np.array(histogram.counts), np.array(histogram.edges)
    middles = (edges[1:] + edges[:-1]) / 2
    return {"min": edges[0], "max": edges[-1], "num": counts.sum(), "sum": counts @ middles,
            "sum_squares": counts @ middles**2, "bucket_limits": edges[1:].tolist(),
            "bucket_counts": counts.tolist()}


def observers(log: Log | Sequence[Log] | None) -> list[Observer]:
    """The observers of a log or a list of them: each is told of every reading."""
    if log is None:
        return []
    return [_observer(one) for one in (log if isinstance(log, (list, tuple)) else [log])]


def _observer(log: Any) -> Observer:
    """The observer of a log: a path gets lines of JSON, a function of two arguments no state."""
    if isinstance(log, (str, pathlib.Path)):
        return jsonl(log)
    for given in ((0, None, {}), (0, {})):
        with contextlib.suppress(TypeError, ValueError):
            inspect.signature(log).bind(*given)
            return log if len(given) == 3 else lambda step, state, metrics: log(step, metrics)
    raise LayerError("a log as a path, log(step, metrics) or an observer (step, state, metrics)",
                     code(log), 'pass log="run.jsonl", or a list of such')


def bar(steps: int, progress: bool) -> Any:
    """A bar of `steps` steps on a terminal, lines elsewhere; nothing if `progress` is False."""
    if not progress:
        return _NoBar()
    if not sys.stderr.isatty():
        return _Lines(steps)
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'diffprog[train]', or "
                          "pass progress=False") from error
    return tqdm(total=steps, unit="step")


class _NoBar(contextlib.nullcontext):
    """The bar that shows nothing."""

    def update(self, steps: int) -> None:
        pass

    def set_postfix(self, metrics: Any) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self


class _Lines(_NoBar):
    """One line a reading, where there is no terminal."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps, self._taken, self._began = steps, 0, time.perf_counter()

    def update(self, steps: int) -> None:
        self._taken += steps

    def set_postfix(self, metrics: Any) -> None:
        seconds = max(time.perf_counter() - self._began, 1e-9)
        left = datetime.timedelta(
            seconds=round(seconds * (self._steps - self._taken) / max(self._taken, 1)))
        shown = [f"{name} {value}" for name, value in metrics.items()]
        print(", ".join([f"step {self._taken}/{self._steps}", *shown,
                         f"{self._taken / seconds:.3g} steps/s", f"{left} left"]),
              file=sys.stderr, flush=True)
