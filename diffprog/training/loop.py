"""The training loop: it takes steps, logs metrics, keeps the best state, saves and resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from diffprog.core.arguments import check_count, check_kept, donated
from diffprog.core.errors import LayerError
from diffprog.core.notation import code
from diffprog.data.batches import Batches, check_batches
from diffprog.data.streams import Stream
from diffprog.runtime.checkpoints import Checkpoints
from diffprog.runtime.interrupts import deferred_interrupt, terminable
from diffprog.runtime.logs import Log, Observer, bar, observers
from diffprog.training.courses import Course, Fit, Validation
from diffprog.training.step import Step, TrainState, check_state, check_step

__all__ = ["Fit", "Validation", "fit"]


def fit(
    step: Step, data: Iterable[Any], *, steps: int | None = None, epochs: int | None = None,
    state: TrainState | Fit | None = None, key: jax.Array | None = None,
    validation: Iterable[Any] | Validation | None = None, log_every: int = 50,
    log: Log | Sequence[Log] | None = None, checkpoints: str | pathlib.Path | Checkpoints | None =
    None, resume: bool = False, progress: bool = True,
) -> Fit:
    """Take `steps` training steps over the batches of `data`.

    Every `log_every` steps, and after the last, the metrics are averaged over the steps since the
    last reading and logged, `validation` is evaluated, and the state with the lowest validation
    loss is kept as ``best``. Ctrl-C stops early and returns the result after the last finished
    step; with `checkpoints` it is saved, also if the system asks the process to end (SIGTERM).

    Between readings nothing waits for the device. The metrics are fetched after the next step has
    begun, so that the device does not wait for the host either. It does where a reading needs the
    state, whose memory the next step reuses: with `validation`, with an observer of the state, if a
    checkpoint is due, and after the last step.

    Args:
        step: a step of `make_step` or `make_game`.
        data: batches of arrays, lists of labels, tables and tensors of other libraries; iterated
            again when they end. A generator must not end, since it cannot be. NumPy ints that do
            not fit the int dtype of JAX count as out of range. Data of `batches` and `pipeline`
            begins at the batch of the state's step, so that two calls equal one; other data begins
            with its first batch.
        steps: number of steps; positive. A resumed run takes those that are left of them.
        epochs: passes over the data, which needs a length, instead of `steps`; positive.
        state: a state to continue from, instead of a key; it is copied, so that the argument stays
            valid. A `Fit` also continues best, patience and history. The state of a stream,
            ``state._replace(state=net.start(...))``, is carried from batch to batch.
        key: of the initial parameters and of all randomness in training.
        validation: batches, iterated once per reading; adds metrics ``validation/...``. A
            `dp.training.Validation` selects the best state by another metric, and stops early. The
            first batch is tried before the first step.
        log_every: steps between two readings; a multiple of `steps_per_call` of the step.
        log: what is told of each reading, one or a list: a path, to which a line of JSON is
            appended; a function ``log(step, metrics)``; an observer ``(step, state, metrics)``,
            such as those of `dp.runtime`. The state is valid until it returns, as the next step
            reuses its memory: keep ``jax.tree.map(jnp.copy, state)``.
        checkpoints: a folder, or `dp.runtime.Checkpoints` for it, in which the whole run is saved
            at readings: state, best, history and the position in the data. All of it is complete
            when `fit` returns. Needs orbax, in the extra ``checkpoints``.
        resume: go on from the newest complete checkpoint in the folder, if there is one. The result
            is bit for bit that of a run without an interruption, on the same devices. Data other
            than of `batches` and `pipeline` must have ``get_state`` and ``set_state`` on its
            iterator, or ``state_dict`` and ``load_state_dict``.
        progress: show a bar on a terminal (needs tqdm, in the extra ``train``), and elsewhere a
            line per reading.

    Raises:
        LayerError: both `key` and `state` are given, or neither, and likewise `steps` and `epochs`;
            `state` or the checkpoint is of another net, or `state` was donated; the data ends, or
            the validation data does not; a metric of `Validation` is missing; a metric is no
            number; `resume` without checkpoints, or with data whose position is unknown; without
            `resume`, a folder with checkpoints of later steps; `log_every` is no multiple of
            `steps_per_call`; a loss is not finite, in a step that the optimizer did not skip, or
            the last step made parameters non-finite. The latter error has the attributes ``step``,
            the first broken one, and ``state``, ``best`` and ``history``, as a `Fit` has; ``state``
            is that after the last step that has begun.

    Example:
        >>> x, y = jnp.eye(4), jnp.arange(4)
        >>> step = dp.make_step(dp.linear(4), dp.classification(), optax.adam(0.1))
        >>> result = dp.fit(step, dp.batches((x, y), 4, seed=0), key=jax.random.key(0),
        ...                 steps=100, progress=False)
        >>> result.history[-1]["accuracy"]
        1.0
    """
    check_step(step)
    check_count("log_every", log_every)
    if log_every % step.per_call:
        raise LayerError(f"log_every as a multiple of {step.per_call} steps per call",
                         str(log_every), f"pass log_every={50 * step.per_call}, for example")
    check_batches("data", data)
    steps = _number_of_steps(steps, epochs, data)
    _check_start(key, state)
    judged = validation if isinstance(validation, Validation) else Validation(validation)
    judged.check()

    stream = Stream(data, _steps_of(state))
    _check_resumable(checkpoints, resume, stream)

    with _opened(checkpoints) as saved:
        course = Course(step, key, state, stream.peek(), judged)
        told = observers(log)
        run = _Run(course, stream, told, _take_state(told, log), saved)
        last = course.number + steps
        if resume:
            run.resume()
        run.check_folder()
        course.rehearse()
        if course.unread and (course.number % log_every == 0 or course.number == last):
            run.read(course.number, last)  # which the interrupted run did not
        late = None  # the number of a step whose reading waits for the begin of the next one
        try:
            with bar(last - course.number, progress) as shown, terminable(saved is not None):
                while course.number < last and not course.is_over:
                    with deferred_interrupt():
                        try:
                            taken = course.take(stream, last)
                        finally:
                            if late is not None:
                                run.show(shown, late, last)
                            late = None
                    shown.update(taken)
                    if course.number % log_every == 0 or course.number == last:
                        if run.needs_state(last):
                            run.show(shown, course.number, last)
                        else:
                            late = course.number
        except KeyboardInterrupt:
            if donated(course.now):
                raise  # the second Ctrl-C in one step: its state is lost
            if late is not None:
                run.read(late, last)
        run.save()
    return course.result


@dataclasses.dataclass(frozen=True)
class _Run:
    """A course with its data, and who is told of it."""

    course: Course
    stream: Stream
    observers: Sequence[Observer]
    take_state: bool
    checkpoints: Checkpoints | None

    def resume(self) -> None:
        """Put course and stream where the newest checkpoint was saved."""
        assert self.checkpoints is not None
        found = self.checkpoints.restore(self.course.like)
        if found is not None:
            number, tree, rest = found
            self.course.restore(tree, rest)
            self.stream.move(number, rest["position"])

    def check_folder(self) -> None:
        """Raise for checkpoints of later steps, before which none can be saved."""
        later = self.checkpoints.steps[-1:] if self.checkpoints else []
        if later and later[0] > self.course.number:
            raise LayerError(f"checkpoints up to step {self.course.number}", f"one of step "
                             f"{later[0]} in {self.checkpoints.folder}",  # type: ignore[union-attr]
                             "pass resume=True to go on from it, or another folder")

    def needs_state(self, last: int) -> bool:
        """Whether a reading after this step needs its state, which the next step donates."""
        number = self.course.number
        return (number == last or self.take_state or self.course.validation.data is not None
                or (self.checkpoints is not None and self.checkpoints.due(number)))

    def read(self, number: int, last: int) -> dict[str, float]:
        """Read the metrics up to step `number`, tell the observers, and save if it is due."""
        metrics = self.course.read(number, last)
        told: dict[str, Any] = {**metrics}  # to which an observer may add for those after it
        for observe in self.observers:
            observe(number, self.course.now, told)
        if number == self.course.number and self.checkpoints and self.checkpoints.due(number):
            self.save()
        return metrics

    def show(self, shown: Any, number: int, last: int) -> None:
        """`read`, and show the metrics beside the bar."""
        shown.set_postfix({name: f"{x:.4g}" for name, x in self.read(number, last).items()})

    def save(self) -> None:
        """Save the run, unless the data is ahead of it: a batch without its step would be lost."""
        number, history = self.course.number, self.course.history
        if self.checkpoints and self.stream.number == number and not self.stream.is_ahead:
            tree, rest = self.course.saved(self.stream.position)
            read = history and history[-1]["step"] == number  # between readings there are none
            self.checkpoints.save(number, tree, data=rest, metrics=history[-1] if read else None)


def _take_state(told: Sequence[Observer], log: Any) -> bool:
    """Whether an observer is one of the user's, not one made of a path or ``log(step, metrics)``.

    Only these get the state.
    """
    given = log if isinstance(log, (list, tuple)) else [log]
    return any(observe is one for observe, one in zip(told, given, strict=False))


def _number_of_steps(steps: int | None, epochs: int | None, data: Any) -> int:
    """The number of steps, also of epochs."""
    if (steps is None) == (epochs is None):
        raise LayerError("a number of steps or of epochs", "neither" if steps is None else "both",
                         "pass one of them")
    if steps is not None:
        check_count("steps", steps)
        return steps
    check_count("epochs", epochs)
    assert epochs is not None
    if isinstance(data, Batches) and data.count is None:
        data, epochs = dataclasses.replace(data, epochs=epochs), 1
    try:
        return epochs * len(data)
    except TypeError as error:
        raise LayerError("data with a length, for epochs", code(data),
                         "pass steps=, or batches(...)") from error


def _steps_of(state: TrainState | Fit | None) -> int:
    """The number of steps that a state has taken."""
    state = state.state if isinstance(state, Fit) else state
    return 0 if state is None else int(state.step)


def _check_start(key: Any, state: Any) -> None:
    """Raise unless training begins from either a key or a state."""
    if (key is None) == (state is None):
        raise LayerError("a key to begin with or a state to go on from",
                         "neither" if state is None else "both", "pass one of them")
    if state is not None and not isinstance(state, Fit):
        check_state(state)
    check_kept(state)


def _check_resumable(checkpoints: Any, resume: bool, stream: Stream) -> None:
    """Raise unless `checkpoints` are such, and a run with this data can be resumed if asked."""
    if not isinstance(checkpoints, (str, pathlib.Path, Checkpoints, type(None))):
        raise LayerError("checkpoints as a folder or dp.runtime.Checkpoints", code(checkpoints),
                         'write checkpoints="run", for example')
    if resume and checkpoints is None:
        raise LayerError("checkpoints to resume from", "none",
                         'name their folder: checkpoints="run"')
    if resume and not stream.resumable:
        raise LayerError(
            "data whose position can be saved, to resume", code(stream.data),
            "pass batches(...), or data with get_state and set_state on its iterator")


@contextlib.contextmanager
def _opened(checkpoints: str | pathlib.Path | Checkpoints | None) -> Iterator[Checkpoints | None]:
    """The checkpoints of a run; a folder is closed at the end."""
    if isinstance(checkpoints, (str, pathlib.Path)):
        with Checkpoints(checkpoints) as opened:
            yield opened
    else:
        yield checkpoints
        if checkpoints is not None:
            checkpoints.wait()
