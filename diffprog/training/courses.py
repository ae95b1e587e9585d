"""How far training has come: its state, the best one, and what was written down on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core.errors import LayerError
from diffprog.core.nets import verify
from diffprog.core.notation import listed
from diffprog.core.paths import nonfinite
from diffprog.training.averages import averages, check_numbers
from diffprog.training.evaluation import evaluate
from diffprog.training.step import Step, TrainState, resting

_SLOWER = ("lower the learning rate, look for NaN and ids out of range in the data, or ask "
           "tree.nonfinite(gradients) which leaves broke first")


class Fit(NamedTuple):
    """What `fit` gives: the last state, the one that is best on the validation data, and the log.

    Attributes:
        state: after the last step.
        best: where the validation loss was least, or the `metric` of `fit` best; None without
            `validation`, and where no metric is named loss, as in a game, and no other was chosen.
        history: the metrics of each reading, and its ``step``.
    """

    state: TrainState
    best: TrainState | None
    history: list[dict[str, float]]

    def __repr__(self) -> str:
        return f"Fit(state={self.state}, best={self.best}, history=[{len(self.history)} readings])"


class Course:
    """Training from a key, a state, or what `fit` gave; `batch` is the first one.

    The state that is `best` has the least `metric`, as the history calls it, or the highest.
    """

    def __init__(
        self, step: Step, key: jax.Array | None, start: TrainState | Fit | None, batch: Any,
        metric: str, highest: bool,
    ) -> None:
        self.step, self.metric, self.sign = step, metric, -1 if highest else 1
        before = start if isinstance(start, Fit) else Fit(start, None, []) if start else None
        x, side = step.inputs(batch)
        if before is None:
            assert key is not None
            before = Fit(step.init(key, x, **side), None, [])
        else:
            rest = resting(step.net, step.inputs, before.state.state, batch)
            verify(step.net, before.state.params, x, state=rest, **side)
            anew = jax.eval_shape(step.init, before.state.key, x, **side)
            if jax.tree.structure(anew.opt_state) != jax.tree.structure(before.state.opt_state):
                raise LayerError(
                    "the state of this optimizer", "that of another one", "begin it anew: "
                    "step.init(key, x)._replace(params=state.params, state=state.state)")
            now, best = jax.tree.map(jnp.copy, before[:2])
            before = Fit(now, best, [*before.history])
        self.now, self.best, self.history = before
        self.number = int(self.now.step)
        self.broken = set(nonfinite(self.now.params))
        self.unread: list[dict[str, jax.Array]] = []
        self.least, self.waited = math.inf, 0
        if self.best is not None:
            at = _reading(self.history, int(self.best.step))
            self.least = self.sign * self.history[at].get(metric, self.sign * math.inf)
            self.waited = len(self.history) - 1 - at

    @property
    def result(self) -> Fit:
        """What `fit` gives when it ends here."""
        return Fit(self.now, self.best, self.history)

    def take(self, batch: Any) -> None:
        """Take one step."""
        self.now, metrics = self.step.apply(self.now, batch)
        if not self.unread:
            check_numbers(metrics)
        self.unread.append(metrics)
        self.number += 1

    def read(
        self, validation: Iterable[Any] | None, patience: int | None, last: int
    ) -> dict[str, float]:
        """Write down the metrics since the last reading; raise for what is not finite."""
        seen = _of_taken(self.step.combine(averages(self.unread)))
        self._check_finite(seen)
        broken = set(nonfinite(self.now.params)) - self.broken if self.number == last else ()
        if broken:
            raise self._failed("finite parameters",
                               f"non-finite {listed(broken)} after step {last}", _SLOWER, last)
        if validation is not None:
            found = evaluate(self.step, self.now, validation)
            found = {f"validation/{name}": value for name, value in found.items()}
            self._check_finite(found)
            seen |= found
            self._judge(found, patience)
        self.unread = []
        self.history.append({"step": self.number, **seen})
        return seen

    def _judge(self, found: dict[str, float], patience: int | None) -> None:
        """Keep the state if it is the best so far."""
        name = self.metric.removeprefix("validation/")
        if self.metric not in found and (patience is not None or name != "loss"):
            names = listed(other.removeprefix("validation/") for other in found)
            what = f"a metric named {name}"
            raise LayerError(f"{what} for patience" if patience else f"{what} for best", names,
                             "let the objective give it, or name another: metric=")
        self.waited += 1
        value = self.sign * found.get(self.metric, self.sign * math.inf)
        if value < self.least:
            self.least, self.best, self.waited = value, jax.tree.map(jnp.copy, self.now), 0

    def _check_finite(self, metrics: dict[str, float]) -> None:
        """Raise for a loss that is not finite: of training, of validation, of a player of a game.
        """
        losses = {name: x for name, x in metrics.items() if name.split("/")[-1] == "loss"}
        name = next((name for name, x in losses.items() if not math.isfinite(x)), None)
        if name is None:
            return
        first = self._first(name)
        broken = nonfinite(self.now.params)
        params = f"non-finite {listed(broken)}" if broken else "finite parameters"
        since = f", at first in step {first}" if first < self.number else ""
        raise self._failed(
            f"a finite {name}", f"{metrics[name]} by step {self.number}{since}, with {params}",
            _SLOWER if broken else
            "look for NaN and for labels outside their range in the data", first)

    def _first(self, name: str) -> int:
        """The first step since the last reading whose loss is not finite; this one, if none is."""
        for i, metrics in enumerate(jax.device_get(self.unread)):
            skipped = metrics.get(name.removesuffix("loss") + "skipped", 0)
            if not skipped and not math.isfinite(metrics.get(name, 0)):
                return self.number - len(self.unread) + 1 + i
        return self.number

    def _failed(self, wants: str, got: str, remedy: str, step: int) -> LayerError:
        """The error that training broke in a step, which carries what there is of it."""
        error = LayerError(wants, got, remedy)
        vars(error).update(step=step, **self.result._asdict())
        return error


def _reading(history: list[dict[str, float]], step: int) -> int:
    """The place in the history at which that step was read."""
    for i, row in enumerate(history):
        if row["step"] == step:
            return i
    raise LayerError(f"a history with the reading of best, of step {step}",
                     f"one of steps {listed(str(row['step']) for row in history)}",
                     "pass the Fit as it was, or Fit(state, None, []) to look for the best anew")


def _of_taken(seen: dict[str, float]) -> dict[str, float]:
    """The metrics without those of which every step was skipped: nothing is known of them."""
    return {name: value for name, value in seen.items() if name.split("/")[-1] == "skipped"
            or 1 not in (seen.get("skipped"), seen.get(f"{name.split('/')[0]}/skipped"))}
