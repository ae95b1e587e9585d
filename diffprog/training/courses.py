"""The progress of `fit`: the current state, the best state and the history of metrics."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_count, held
from diffprog.core.errors import LayerError
from diffprog.core.nets import verify
from diffprog.core.notation import listed
from diffprog.core.paths import nonfinite
from diffprog.data.batches import check_ends
from diffprog.training.averages import average_batches, check_numbers
from diffprog.training.evaluation import evaluate
from diffprog.training.finite import broken_paths
from diffprog.training.step import Step, TrainState, without_stream

_DIVERGED = ("lower the learning rate, check the data for NaN and ids out of range, or name the "
           'gradients that broke by make_step(non_finite="raise")')


class Fit(NamedTuple):
    """The result of `fit`: the last state, the best state on validation data, and the history.

    Attributes:
        state: the state after the last step.
        best: the state with the lowest validation loss, or with the best `metric` of `fit`; None
            without `validation`, and in a game unless `metric` is given, as it has no ``loss``.
        history: the metrics of each log, with its ``step``.
    """

    state: TrainState
    best: TrainState | None
    history: list[dict[str, float]]

    def __repr__(self) -> str:
        return f"Fit(state={self.state}, best={self.best}, history=[{len(self.history)} readings])"


@dataclasses.dataclass(frozen=True)
class Validation:
    """Validation data for `fit`, and how it selects the best state.

    Attributes:
        data: batches, iterated once per reading; None for none.
        metric: the metric that selects ``best``; in a game ``<player>/loss``, for example.
        highest: whether the highest `metric` is best, as for accuracy, rather than the lowest.
        patience: training stops after this many readings in a row without a better `metric`; None
            never stops early.

    Example:
        >>> x, y = jnp.eye(4), jnp.arange(4)
        >>> step = dp.make_step(dp.linear(4), dp.classification(), optax.adam(0.1))
        >>> validation = dp.training.Validation(
        ...     dp.batches((x, y), 4), metric="accuracy", highest=True, patience=2)
        >>> result = dp.fit(step, dp.batches((x, y), 4, seed=0), key=jax.random.key(0), steps=1000,
        ...                 validation=validation, progress=False)
        >>> result.best.step < result.state.step < 1000
        Array(True, dtype=bool)
    """

    data: Iterable[Any] | None
    metric: str = "loss"
    highest: bool = False
    patience: int | None = None

    def check(self) -> None:
        """Raise for endless data, and for a patience without data."""
        if self.patience is not None:
            check_count("patience", self.patience)
            if self.data is None:
                raise LayerError("validation data for patience", "none",
                                 "pass Validation(batches(...), patience=...)")
        if self.data is not None:
            check_ends("validation data", self.data)


class Course:
    """Training from a key, a state, or a `Fit`; `batch` is the first batch."""

    def __init__(
        self, step: Step, key: jax.Array | None, start: TrainState | Fit | None, batch: Any,
        validation: Validation,
    ) -> None:
        self.step, self.validation = step, validation
        self.metric = f"validation/{validation.metric}"  # as the history names it
        self.sign = -1 if validation.highest else 1
        x, side = step.inputs(batch)
        if start is None:
            assert key is not None
            before = Fit(step.init(key, x, **side), None, [])
        else:
            before = start if isinstance(start, Fit) else Fit(start, None, [])
            self._check_state(before.state, batch, x, side)
            now, best = jax.tree.map(jnp.copy, before[:2])
            before = Fit(now, best, [*before.history])
        self.now, self.best, self.history = before
        self.number = int(self.now.step)
        self.broken = set(nonfinite(self.now.params))
        # The metrics of each call since the last reading: of a step, or stacked, of several.
        self.unread: list[Any] = []
        self.newest = 0  # the first of them that the last `take` added
        self._judge_history()

    def _judge_history(self) -> None:
        """How good the best state is, and for how many readings none was better."""
        self.least, self.waited = math.inf, 0
        if self.best is not None:
            at = _index_of_step(self.history, int(self.best.step))
            self.least = self.sign * self.history[at].get(self.metric, self.sign * math.inf)
            self.waited = len(self.history) - 1 - at

    def _check_state(self, state: TrainState, batch: Any, x: Any, side: dict[str, Any]) -> None:
        """Raise unless the state is of this net and this optimizer."""
        net_state = without_stream(self.step.net, self.step.inputs, state.state, batch)
        verify(self.step.net, state.params, x, state=net_state, **side)
        new = jax.eval_shape(self.step.init, state.key, x, **side)
        if jax.tree.structure(new.opt_state) != jax.tree.structure(state.opt_state):
            raise LayerError(
                "the state of this optimizer", "that of another one", "begin again: "
                "step.init(key, x)._replace(params=state.params, state=state.state)")

    @property
    def result(self) -> Fit:
        """The result of `fit` so far."""
        return Fit(self.now, self.best, self.history)

    @property
    def is_over(self) -> bool:
        """Whether `patience` readings in a row were not better than the best."""
        patience = self.validation.patience
        return patience is not None and self.waited >= patience

    @property
    def like(self) -> dict[str, Any]:
        """The structure of what `saved` returns."""
        judged = self.validation.data is not None or self.best is not None
        return {"state": self.now} | ({"best": self.now} if judged else {})

    def saved(self, position: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays and the rest of what `restore` needs, and the position in the data.

        Before a first reading with validation data, the state stands for the best one.
        """
        best = None if self.best is None else int(self.best.step)
        tree = {name: self.now for name in self.like}
        unread = [{name: float(x) for name, x in metrics.items()} for metrics in _rows(self.unread)]
        return tree | ({} if self.best is None else {"best": self.best}), {
            "best": best, "history": self.history, "unread": unread, "position": position}

    def restore(self, tree: dict[str, Any], rest: dict[str, Any]) -> None:
        """Go on from what `saved` returned."""
        self.now, self.history, self.unread = tree["state"], rest["history"], rest["unread"]
        self.best = None if rest["best"] is None else tree["best"]
        self.number = int(self.now.step)
        self._judge_history()

    def rehearse(self) -> None:
        """Evaluate the first validation batch, so that what is wrong with it raises at once."""
        data = self.validation.data
        if data is not None and (batches := iter(data)) is not data:
            evaluate(self.step, self.now, itertools.islice(batches, 1))

    def take(self, stream: Iterator[Any], last: int) -> int:
        """Take a step, or as many as a call has, but none after step `last`; return their number.

        Calls of several steps begin at multiples of their number, so that a resumed run has the
        same calls, and the same bits.
        """
        ahead = self.step.per_call
        if self.number % ahead or self.number + ahead > last:
            ahead = 1
        batches = [next(stream)] if ahead == 1 else list(itertools.islice(stream, ahead))
        self.newest = len(self.unread)
        if ahead > 1 and (stacked := _stacked(batches)) is not None:
            assert self.step.apply_many is not None
            self.now, metrics = self.step.apply_many(self.now, stacked)
            if not self.unread:
                check_numbers({name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
                               for name, x in metrics.items()})
            self.unread.append(metrics)
            self.number += ahead
            return ahead
        for batch in batches:
            self.now, metrics = self.step.apply(self.now, batch)
            if not self.unread:
                check_numbers(metrics)
            self.unread.append(metrics)
            self.number += 1
        return ahead

    def read(self, number: int, last: int) -> dict[str, float]:
        """Log the metrics between the last reading and step `number`, the current one or the one
        before the last call; raise if a loss or a parameter is not finite.
        """
        since = len(self.unread) if number == self.number else self.newest
        seen = _without_skipped(self.step.combine(average_batches(_rows(self.unread[:since]))))
        self._check_skipped(seen)
        self._check_finite(seen, number)
        if number == last and (broken := set(nonfinite(self.now.params)) - self.broken):
            raise self._failed("finite parameters",
                               f"non-finite {listed(broken)} after step {last}", _DIVERGED, last)
        if self.validation.data is not None:
            found = evaluate(self.step, self.now, self.validation.data)
            found = {f"validation/{name}": value for name, value in found.items()}
            self._check_finite(found, number)
            seen |= found
            self._keep_best(found)
        del self.unread[:since]
        self.history.append({"step": number, **seen})
        return seen

    def _keep_best(self, found: dict[str, float]) -> None:
        """Keep the state if it is the best so far."""
        name, patience = self.validation.metric, self.validation.patience
        if self.metric not in found and (patience is not None or name != "loss"):
            purpose = "patience" if patience else "best"
            raise LayerError(f"a metric named {name} for {purpose}",
                             listed(other.removeprefix("validation/") for other in found),
                             "return it from the objective, or name another: Validation(metric=)")
        self.waited += 1
        value = self.sign * found.get(self.metric, self.sign * math.inf)
        if value < self.least:
            self.least, self.best, self.waited = value, jax.tree.map(jnp.copy, self.now), 0

    def _check_finite(self, metrics: dict[str, float], number: int) -> None:
        """Raise for a loss that is not finite by step `number`, in training, validation or of a
        player.
        """
        losses = {name: x for name, x in metrics.items() if name.split("/")[-1] == "loss"}
        name = next((name for name, x in losses.items() if not math.isfinite(x)), None)
        if name is None:
            return
        first = self._first_broken(name, number)
        since = f", at first in step {first}" if first < number else ""
        if broken := nonfinite(self.now.params):
            params, remedy = f"non-finite {listed(broken)}", _DIVERGED
        else:
            params = "finite parameters"
            remedy = "look for NaN and for labels outside their range in the data"
        raise self._failed(
            f"a finite {name}", f"{metrics[name]} by step {number}{since}, with {params}",
            remedy, first)

    def _check_skipped(self, metrics: dict[str, float]) -> None:
        """Raise for steps that were skipped, if they are to raise."""
        gradients, loss = broken_paths(self.now.opt_state, self.now.params)
        if not metrics.get("skipped") or not (gradients or loss):
            return
        rows = _rows(self.unread)
        skipped = [i for i, metrics in enumerate(rows, 1) if metrics.get("skipped")]
        first, last = (self.number - len(rows) + i for i in (skipped[0], skipped[-1]))
        found = ["a non-finite loss"] * loss
        found += [f"non-finite gradients of {listed(gradients)}"] if gradients else []
        since = f", at first in step {first}" if first < last else ""
        raise self._failed(
            "a finite loss and gradient", f"{' and '.join(found)} in step {last}{since}",
            "lower the learning rate, check the data for NaN and ids out of range, or pass "
            'make_step(non_finite="skip")', first)

    def _first_broken(self, name: str, number: int) -> int:
        """The first step since the last reading with a non-finite loss; `number` if none has."""
        rows = _rows(self.unread)
        for i, metrics in enumerate(rows):
            skipped = metrics.get(name.removesuffix("loss") + "skipped", 0)
            if not skipped and not math.isfinite(metrics.get(name, 0)):
                return self.number - len(rows) + 1 + i
        return number

    def _failed(self, wants: str, got: str, remedy: str, step: int) -> LayerError:
        """An error of a step, with the attributes ``step``, ``state``, ``best`` and ``history``."""
        error = LayerError(wants, got, remedy)
        vars(error).update(step=step, **self.result._asdict())
        return error


def _stacked(batches: list[Any]) -> Any:
    """The batches on a new first axis; None if they do not have the same shapes."""
    batches = [held(batch) for batch in batches]
    kinds = {(jax.tree.structure(batch), tuple(map(np.shape, jax.tree.leaves(batch))))
             for batch in batches}
    if len(kinds) > 1:
        return None

    def stack(*leaves: Any) -> Any:
        on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
        return jnp.stack(leaves) if on_device else np.stack(leaves)

    return jax.tree.map(stack, *batches)


def _rows(calls: list[Any]) -> list[dict[str, Any]]:
    """The metrics of each step, of calls with one step or several."""
    rows = []
    for metrics in jax.device_get(calls):
        shape = np.shape(next(iter(metrics.values())))
        rows += [metrics] if not shape else [
            {name: x[i] for name, x in metrics.items()} for i in range(shape[0])]
    return rows


def _index_of_step(history: list[dict[str, float]], step: int) -> int:
    """The index of the reading of a step."""
    for i, row in enumerate(history):
        if row["step"] == step:
            return i
    raise LayerError(f"a history with the reading of best, of step {step}",
                     f"one of steps {listed(str(row['step']) for row in history)}",
                     "pass the Fit unchanged, or Fit(state, None, []) to search for the best again")


def _without_skipped(seen: dict[str, float]) -> dict[str, float]:
    """The metrics, without those of an optimizer that skipped every step, except ``skipped``."""
    def all_skipped(name: str) -> bool:
        player = name.split("/")[0]
        return 1 in (seen.get("skipped"), seen.get(f"{player}/skipped"))

    return {name: value for name, value in seen.items()
            if name.split("/")[-1] == "skipped" or not all_skipped(name)}
