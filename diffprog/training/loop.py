"""The training loop: it takes steps, logs metrics, and keeps the best state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from diffprog.core.arguments import check_count, check_kept, donated
from diffprog.core.errors import LayerError
from diffprog.core.notation import code
from diffprog.data.batches import Batches, as_batch, check_batches, check_ends
from diffprog.runtime.interrupts import deferred_interrupt
from diffprog.runtime.logs import Log, Write, bar, writer
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

    Every `log_every` steps, and after the last, the metrics are averaged over the steps since the
    last reading and logged, `validation` is evaluated, and the state with the lowest validation
    loss is kept as ``best``. Between readings nothing waits for the device. Ctrl-C stops early and
    returns the result after the last finished step.

    Args:
        step: a step of `make_step` or `make_game`.
        data: batches of arrays, lists of labels, tables and tensors of other libraries; iterated
            again when they end. A generator must not end, since it cannot be. NumPy ints that do
            not fit the int dtype of JAX count as out of range.
        steps: number of steps; positive.
        state: a state to continue from, instead of a key; it is copied, so that the argument stays
            valid. A `Fit` also continues best, patience and history. The state of a stream,
            ``state._replace(state=net.start(...))``, is carried from batch to batch.
        key: of the initial parameters and of all randomness in training.
        validation: batches, iterated once per reading; adds metrics ``validation/...``.
        log_every: steps between two readings.
        log: a path, to which one line of JSON per reading is appended, or ``log(step, metrics)``.
        callback: ``callback(step, state, metrics)``, called at each reading. The state is valid
            until it returns, as the next step reuses its memory: keep ``jax.tree.map(jnp.copy,
            state)``.
        patience: stop after this many readings in a row without a better validation loss, or
            `metric`; None never stops early.
        metric: the validation metric that selects ``best``; in a game ``<player>/loss``, for
            example.
        highest: whether the highest `metric` is best, as for accuracy, rather than the lowest.
        data_from: the number of the first batch, for data of `batches`. None is the number of steps
            in the state, so that two calls equal one; 0 begins again. Other data always begins with
            its first batch.
        progress: show a progress bar (needs tqdm, in the extra ``train``).

    Raises:
        LayerError: both `key` and `state` are given, or neither; `state` is of another net, or was
            donated; the data ends, or the validation data does not; `patience` or `metric` without
            the metric; a metric is no number; a loss is not finite, in a step that the optimizer
            did not skip, or the last step made parameters non-finite. The latter error has the
            attributes ``step``, the first broken one, and ``state``, ``best`` and ``history``, as
            a `Fit` has.

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

    stream = _endless(data, _first_batch(data, data_from, state))
    first = next(stream)
    course = Course(step, key, state, first, f"validation/{metric}", highest)
    last = course.number + steps

    def read(write: Write, shown: Any) -> None:
        metrics = course.read(validation, patience, last)
        write(course.number, metrics)
        if callback:
            callback(course.number, course.now, metrics)
        shown.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})

    try:
        with bar(steps, progress) as shown, writer(log) as write:
            for batch in itertools.chain([first], stream):
                with deferred_interrupt():
                    course.take(batch)
                shown.update(1)
                if course.number % log_every == 0 or course.number == last:
                    read(write, shown)
                if course.number == last or course.is_over(patience):
                    break
    except KeyboardInterrupt:
        if donated(course.now):
            raise  # the second Ctrl-C in one step: its state is lost
    return course.result


def _first_batch(data: Any, data_from: int | None, state: TrainState | Fit | None) -> int:
    """The number of the first batch."""
    if data_from is None:
        state = state.state if isinstance(state, Fit) else state
        return 0 if state is None else int(state.step)
    check_count("data_from", data_from, 0)
    if data_from and not isinstance(data, Batches):
        raise LayerError("data of batches(...) to begin within", code(data),
                         "leave data_from out: other data begins with its first batch")
    return data_from


def _endless(data: Iterable[Any], first: int) -> Iterator[Any]:
    """The batches from number `first` on, again and again."""
    stream = data.begun(first) if isinstance(data, Batches) else iter(data)
    while True:
        count = 0
        for batch in stream:
            count += 1
            yield as_batch(batch)
        if count == 0:
            raise LayerError("a batch for every step", "data that ended",
                             "pass an iterable that can be iterated again, such as batches(...)")
        stream = iter(data)
