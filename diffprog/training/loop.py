"""The loop around a step: it reads metrics now and then, writes them down, and keeps the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from diffprog.core.arguments import check_count, check_kept, donated
from diffprog.core.errors import LayerError
from diffprog.core.notation import code
from diffprog.data.batches import Batches, as_batch, check_batches, check_ends
from diffprog.runtime.interrupts import uncut
from diffprog.runtime.logs import Log, bar, writer
from diffprog.training.courses import Course, Fit
from diffprog.training.step import Step, TrainState, check_state, check_step

__all__ = ["Fit", "fit"]

Callback = Callable[[int, TrainState, dict[str, float]], None]


def fit(
    step: Step, data: Iterable[Any], *, steps: int, state: TrainState | Fit | None = None,
    key: jax.Array | None = None, validation: Iterable[Any] | None = None, log_every: int = 50,
    log: Log | None = None, callback: Callback | None = None, patience: int | None = None,
    metric: str = "loss", highest: bool = False, data_from: int | None = None,
    progress: bool = True,
) -> Fit:
    """Take `steps` training steps over the batches of `data`.

    Every `log_every` steps, and after the last, metrics are read, averaged over the steps since,
    and written down; `validation` is evaluated then, and the state with the least loss on it is
    kept as ``best``. Between, nothing waits for the device. Ctrl-C ends it early: what is returned
    holds the state after the last finished step.

    Args:
        step: what `make_step` gives.
        data: batches of arrays, lists of labels, tables and tensors of other libraries; begun anew
            when they end, unless it is a generator, which must not end. NumPy ints that JAX would
            hold as others, for lack of bits, are none in range.
        steps: how many; positive.
        state: where to go on from, in place of a key, for it has its own; it is copied, so the
            caller keeps it. Of a `Fit` best, patience and history go on too. The state of a stream,
            ``state._replace(state=net.start(...))``, is carried from batch to batch.
        key: of the initial parameters and of all randomness in training.
        validation: batches, gone through once each time; gives metrics ``validation/...``.
        log_every: steps between two readings.
        log: a path, to which one JSON object a line is appended, or ``log(step, metrics)``.
        callback: ``callback(step, state, metrics)`` at each reading. The state is valid until it
            returns, as the next step takes its memory: keep ``jax.tree.map(jnp.copy, state)``.
        patience: stop once this many readings in a row have brought the validation loss, or the
            `metric`, no further than before; None never stops early.
        metric: the metric of the validation data by which ``best`` is chosen; in a game
            ``<player>/loss``, for example.
        highest: choose where it is highest, as of an accuracy, not lowest.
        data_from: the batch to begin with, for data of `batches`, which knows its place; None is
            the number of steps in the state, so that two calls are as one, and 0 begins anew. Any
            other data is taken as it comes: the first batch of each call is its first.
        progress: show a bar (needs tqdm, in the extra ``train``).

    Raises:
        LayerError: both `key` and `state` are given, or neither; `state` is of another net, or was
            donated; the data ends, or that of `validation` does not; `patience` or `metric` without
            what it reads; a metric is no number; a loss is not finite, of a step that the optimizer
            did not skip, or the last step broke the parameters. This error has the attributes
            ``step``, which went wrong, and ``state``, ``best`` and ``history``, as a `Fit` has.

    Example:
        >>> x, y = jnp.eye(4), jnp.arange(4)
        >>> step = dp.make_step(dp.linear(4), dp.classification(), optax.adam(0.1))
        >>> result = dp.fit(step, dp.batches((x, y), 4, seed=0), key=jax.random.key(0),
        ...                 steps=100, progress=False)
        >>> result.history[-1]["accuracy"]
        1.0
    """
    check_step(step)
    check_count("steps", steps)
    check_count("log_every", log_every)
    if (key is None) == (state is None):
        raise LayerError("a key to begin with or a state to go on from",
                         "neither" if state is None else "both", "pass one of them")
    if patience is not None:
        check_count("patience", patience)
        if validation is None:
            raise LayerError("validation data for patience", "none", "pass validation=batches(...)")
    check_batches("data", data)
    if validation is not None:
        check_ends("validation data", validation)
    if state is not None and not isinstance(state, Fit):
        check_state(state)
    check_kept(state)
    stream = _endless(data, _place(data, data_from, state))
    batch = next(stream)
    course = Course(step, key, state, batch, f"validation/{metric}", highest)
    last = course.number + steps
    try:
        with bar(steps, progress) as shown, writer(log) as write:
            while True:
                with uncut():
                    course.take(batch)
                shown.update(1)
                if course.number % log_every == 0 or course.number == last:
                    seen = course.read(validation, patience, last)
                    write(course.number, seen)
                    if callback:
                        callback(course.number, course.now, seen)
                    shown.set_postfix({name: f"{value:.4g}" for name, value in seen.items()})
                patient = patience is None or course.waited < patience
                if course.number == last or not patient:
                    break
                batch = next(stream)
    except KeyboardInterrupt:
        if donated(course.now):
            raise  # it came twice, in the midst of a step
    return course.result


def _place(data: Any, data_from: int | None, state: TrainState | Fit | None) -> int:
    """The number of the batch to begin with."""
    if data_from is None:
        state = state.state if isinstance(state, Fit) else state
        return 0 if state is None else int(state.step)
    check_count("data_from", data_from, 0)
    if data_from and not isinstance(data, Batches):
        raise LayerError("data of batches(...) to begin within", code(data),
                         "leave data_from out: other data is taken as it comes")
    return data_from


def _endless(data: Iterable[Any], place: int) -> Iterator[Any]:
    stream = data.begun(place) if isinstance(data, Batches) else iter(data)
    while True:
        count = 0
        for batch in stream:
            count += 1
            yield as_batch(batch)
        if count == 0:
            raise LayerError("a batch for every step", "data that ended",
                             "pass an iterable that can be begun anew, such as batches(...)")
        stream = iter(data)
