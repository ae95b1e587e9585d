"""The loop around a step: it reads metrics now and then, writes them down, and keeps the best."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog import tree
from diffprog.arguments import check_count, held
from diffprog.averages import averages
from diffprog.errors import LayerError
from diffprog.evaluation import evaluate
from diffprog.notation import listed
from diffprog.training import Step, TrainState

__all__ = ["Fit", "fit"]

Log = str | pathlib.Path | Callable[[int, dict[str, float]], None]


class Fit(NamedTuple):
    """What `fit` gives: the last state, the one with the least validation loss, and the log.

    Attributes:
        state: after the last step.
        best: where the validation loss was least; None without `validation`.
        history: the metrics of each reading, and its ``step``.
    """

    state: TrainState
    best: TrainState | None
    history: list[dict[str, float]]


def fit(
    step: Step, data: Iterable[Any], *, steps: int, state: TrainState | None = None,
    key: jax.Array | None = None, validation: Iterable[Any] | None = None, every: int = 50,
    log: Log | None = None, patience: int | None = None, progress: bool = True,
) -> Fit:
    """Take `steps` training steps over the batches of `data`.

    Every `every` steps, and after the last, metrics are read, averaged over the steps since, and
    written down; `validation` is evaluated then, and the state with the least loss on it is kept as
    ``best``. Between, nothing waits for the device.

    Args:
        step: what `make_step` gives.
        data: batches; begun anew when it ends, unless it is a generator, which must not end. NumPy
            ints that JAX would hold as others, for lack of bits, are none in range.
        steps: how many; positive.
        state: where to go on from, in place of a key, for it has its own; it is copied, so the
            caller keeps it.
        key: of the initial parameters and of all randomness in training.
        validation: batches, gone through once each time; gives metrics ``validation/...``.
        every: steps between two readings.
        log: a path, to which one JSON object a line is appended, or ``log(step, metrics)``.
        patience: stop once this many readings in a row have brought the validation loss no lower
            than before; None never stops early.
        progress: show a bar (needs tqdm, in the extra ``train``).

    Raises:
        LayerError: both `key` and `state` are given, or neither; `state` is of another net; the
            data ends; `patience` without `validation`; a loss is not finite, naming the parameters
            that are not.

    Example:
        >>> x, y = jnp.eye(4), jnp.arange(4)
        >>> step = dp.make_step(dp.linear(4), dp.classification(), optax.adam(0.1))
        >>> result = dp.fit(step, dp.batches((x, y), 4, seed=0), key=jax.random.key(0),
        ...                 steps=100, progress=False)
        >>> result.history[-1]["accuracy"]
        1.0
    """
    check_count("steps", steps)
    check_count("every", every)
    if (key is None) == (state is None):
        raise LayerError("a key to begin with or a state to go on from",
                         "neither" if state is None else "both", "pass one of them")
    if patience is not None:
        check_count("patience", patience)
        if validation is None:
            raise LayerError("validation data for patience", "none", "pass validation=batches(...)")
    stream = _endless(data)
    batch = next(stream)
    x, side = step.inputs(batch)
    if state is None:
        assert key is not None
        now = step.init(key, x, **side)
    else:
        tree.verify(step.net, state.params, x, state=state.state, **side)
        now = jax.tree.map(jnp.copy, state)

    last = int(now.step) + steps
    best, least, waited, history, unread = None, float("inf"), 0, [], []
    with _bar(steps, progress) as bar, _writer(log) as write:
        for number in range(last - steps + 1, last + 1):
            now, metrics = step.apply(now, batch)
            unread.append(metrics)
            bar.update(1)
            if number % every == 0 or number == last:
                seen, unread = step.combine(averages(unread)), []
                _check_finite(seen, number, now)
                if validation is not None:
                    found = evaluate(step, now, validation)
                    seen |= {f"validation/{name}": value for name, value in found.items()}
                    _check_finite(seen, number, now)
                    if patience is not None and "loss" not in found:
                        raise LayerError("a metric named loss for patience", listed(found),
                                         "let the objective give it")
                    waited += 1
                    if found.get("loss", float("inf")) < least:
                        least, best, waited = found["loss"], jax.tree.map(jnp.copy, now), 0
                history.append({"step": number, **seen})
                write(number, seen)
                bar.set_postfix({name: f"{value:.4g}" for name, value in seen.items()})
                if waited == patience:
                    break
            if number < last:
                batch = next(stream)
    return Fit(now, best, history)


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        stream = iter(data)
        count = 0
        for batch in stream:
            count += 1
            yield held(batch)
        if count == 0 or stream is data:
            raise LayerError("a batch for every step", "data that ended",
                             "pass an iterable that can be begun anew, such as batches(...)")


def _check_finite(metrics: dict[str, float], number: int, now: TrainState) -> None:
    """Raise for a loss that is not finite: of training, of validation, of a player of a game."""
    losses = {name: x for name, x in metrics.items() if name.split("/")[-1] == "loss"}
    name = next((name for name, x in losses.items() if not math.isfinite(x)), None)
    if name is None:
        return
    broken = tree.nonfinite(now.params)
    params = f"non-finite {listed(broken)}" if broken else "finite parameters"
    raise LayerError(f"a finite {name}", f"{metrics[name]} by step {number}, with {params}",
                     "lower the learning rate, look for NaN and ids out of range in the data, or "
                     "ask tree.nonfinite(gradients) which leaves broke first" if broken else
                     "look for NaN and for labels outside their range in the data")


@contextlib.contextmanager
def _writer(log: Log | None) -> Iterator[Callable[[int, dict[str, float]], None]]:
    if isinstance(log, (str, pathlib.Path)):
        with open(log, "a") as file:

            def write(step: int, metrics: dict[str, float]) -> None:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
                file.flush()  # a killed run keeps what it learned

            yield write
    else:
        yield log or (lambda step, metrics: None)


def _bar(steps: int, progress: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError("the progress bar needs tqdm: pip install 'diffprog[train]', or "
                              "pass progress=False") from error
        return _NoBar()
    return tqdm(total=steps, disable=not progress, unit="step")


class _NoBar(contextlib.nullcontext):
    def update(self, steps: int) -> None:
        pass

    def set_postfix(self, metrics: Any) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self
