"""Training is a pair too: a step has ``init`` and ``apply``, and `fit` is a loop around it.

The step is pure, so that an epoch may be a `jax.lax.scan` and a sweep over seeds a `jax.vmap`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffprog import tree
from diffprog.arguments import check_count
from diffprog.computed import freezes, trainable
from diffprog.errors import LayerError
from diffprog.layer import Layer, as_layer
from diffprog.notation import code, listed, show
from diffprog.objectives import Objective, parts
from diffprog.plans import Params, State

__all__ = ["Fit", "Step", "TrainState", "evaluate", "fit", "make_step", "predict"]

Log = str | pathlib.Path | Callable[[int, dict[str, float]], None]


class TrainState(NamedTuple):
    """All that changes in training, as one pytree.

    ``state._replace(params=...)`` begins from other parameters, which `fit` then takes as `state`.

    Attributes:
        params, state: of the net.
        opt_state: of the optimizer; in a game, of each player's.
        key: of all randomness to come; each step folds its number into it.
        step: how many steps were taken, an int32.
    """

    params: Params
    state: State
    opt_state: Any
    key: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step; ``init, apply = step``.

    Attributes:
        init: ``(key, x, **side) -> TrainState``.
        apply: ``(state, batch) -> (state, metrics)``, jitted.
        evaluate: ``(state, batch) -> metrics``, jitted, at rest.
        net: what is trained.
        inputs: ``batch -> (x, side)``, what the net is shown of a batch.
    """

    init: Callable[..., TrainState]
    apply: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[TrainState, Any], dict[str, jax.Array]]
    net: Layer
    inputs: Callable[[Any], tuple[Any, dict[str, Any]]]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.init, self.apply))


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


def make_step(
    net: Layer, objective: Objective, optimizer: optax.GradientTransformation, *,
    donate: bool = True,
) -> Step:
    """One step of gradient descent as a pair of pure functions.

    Args:
        net: the layer to train.
        objective: ``(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``. One
            that shows the net something else than the x of a batch has an attribute ``inputs``,
            ``(net, batch) -> (x, side)``, by which `fit` makes parameters.
        optimizer: any optax transformation; it sees what is `trainable` alone.
        donate: let `apply` reuse the memory of the state it is given, which is gone afterwards;
            False keeps it, for notebooks, and for `jax.grad` through training steps (with Adam give
            that ``eps_root=1e-8``: its root has no derivative where a gradient is zero).

    Example:
        >>> step = dp.make_step(dp.linear(3), dp.classification(), optax.sgd(0.1))
        >>> x, y = jnp.ones((2, 4)), jnp.array([0, 2])
        >>> state = step.init(jax.random.key(0), x)
        >>> state, metrics = step.apply(state, (x, y))
        >>> int(state.step)
        1

    Raises:
        LayerError: one of the three is something else.
    """
    net = as_layer(net)
    check_optimizer(optimizer)
    check_objective(net, objective)
    optimizer = of_trainable(net, optimizer)

    def init(key: jax.Array, x: Any, **side: Any) -> TrainState:
        first, later = jax.random.split(key)
        params, state = net.init(first, x, **side)
        if params and not any(jax.tree.leaves(trainable(net, params))):
            raise LayerError("a net with something to train", f"{net!r}, which is frozen",
                             "freeze less of it: name what trains by but=")
        # Some optimizers keep the initial parameters; a buffer can be donated only once.
        opt = jax.tree.map(jnp.copy, optimizer.init(params))
        return TrainState(params, state, opt, later, jnp.zeros((), jnp.int32))

    def apply(now: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(now.key, now.step)

        def loss(params: Params) -> Any:
            return objective(net, params, now.state, batch, key=key, train=True)

        grads, (state, metrics) = jax.grad(loss, has_aux=True)(now.params)
        updates, opt = optimizer.update(grads, now.opt_state, now.params)
        params: Any = optax.apply_updates(now.params, updates)
        return TrainState(params, state, opt, now.key, now.step + 1), metrics

    def rest(now: TrainState, batch: Any) -> dict[str, jax.Array]:
        return objective(net, now.params, now.state, batch, key=None, train=False)[1][1]

    def shown(batch: Any) -> tuple[Any, dict[str, Any]]:
        if inputs := getattr(objective, "inputs", None):
            return inputs(net, batch)
        x, _, side = parts(net, batch)
        return x, side

    return Step(init, jax.jit(apply, donate_argnums=0 if donate else ()), jax.jit(rest), net, shown)


def check_optimizer(optimizer: Any) -> None:
    """Raise unless it is an optax transformation."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise LayerError("an optax transformation as optimizer", code(optimizer),
                         "pass optax.adam(1e-3), for example")


def of_trainable(
    net: Layer, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The optimizer, which is shown what no `freeze` keeps from it, if there is one in the net.

    What is frozen is given no update at all: a penalty may speak of it and have a gradient there.
    """
    if not freezes(net):
        return optimizer
    sides: dict[Any, Any] = {True: optimizer, False: optax.set_to_zero()}
    return optax.multi_transform(sides, functools.partial(trainable, net))


def check_objective(net: Layer, objective: Any) -> None:
    """Raise unless it can be called as an objective is."""
    try:
        inspect.signature(objective).bind(net, {}, {}, None, key=None, train=True)
    except TypeError as error:
        raise LayerError("an objective (net, params, state, batch, *, key, train)", code(objective),
                         "pass dp.classification(), for example") from error


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
        data: batches; begun anew when it ends, unless it is a generator, which must not end.
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
                seen, unread = _averages(unread), []
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


def evaluate(step: Step, state: TrainState, data: Iterable[Any]) -> dict[str, float]:
    """The metrics of the objective at rest, averaged over all entries of all batches.

    Args:
        step: what `make_step` gives.
        state: what `fit` or ``step.init`` gives.
        data: batches, gone through once.

    Raises:
        LayerError: there is no batch; `state` is none of training.

    Example:
        >>> step = dp.make_step(dp.linear(3), dp.classification(), optax.sgd(0.1))
        >>> x, y = jnp.ones((5, 4)), jnp.zeros(5, jnp.int32)
        >>> state = step.init(jax.random.key(0), x)
        >>> sorted(dp.evaluate(step, state, dp.batches((x, y), 2)))
        ['accuracy', 'loss']
    """
    if not isinstance(state, TrainState):
        raise LayerError("a TrainState", show(state), "pass fit.state, or what step.init gives")
    metrics = [step.evaluate(state, batch) for batch in data]
    if not metrics:
        raise LayerError("at least one batch", "none",
                         "pass an iterable that can be begun anew, such as batches(...)")
    return _averages(metrics)


def predict(
    net: Layer, params: Params, x: Any, *, state: State | None = None, batch_size: int = 256,
    **side: Any,
) -> Any:
    """The output of a net at rest on any number of examples, `batch_size` at a time.

    The last part is filled up with copies of its last example, so that one program is compiled.

    Args:
        net: any layer.
        params, state: of the net.
        x: a pytree of arrays with one first axis of examples.
        batch_size: examples at a time; positive.
        side: side inputs, with that first axis too.

    Raises:
        LayerError: as the net does.

    Example:
        >>> net = dp.linear(3)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> dp.predict(net, params, jnp.ones((1000, 4)), batch_size=64).shape
        (1000, 3)
    """
    check_count("batch_size", batch_size)
    side = {name: value for name, value in side.items() if value is not None}
    length = jax.tree.leaves(x)[0].shape[0]
    apply = jax.jit(net.apply)  # the same function each time, so that its programs are kept
    if length == 0:
        return apply(params, state or {}, x, **side)[0]
    size = min(batch_size, length)
    outputs = []
    for start in range(0, length, size):
        missing = max(start + size - length, 0)

        def cut(a: Any, start: int = start, missing: int = missing) -> Any:
            part = a[start : start + size]
            return jnp.concatenate([part, *[part[-1:]] * missing]) if missing else part

        part, beside = jax.tree.map(cut, (x, side))
        outputs.append(apply(params, state or {}, part, **beside)[0])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:length], *outputs)


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        stream = iter(data)
        count = 0
        for batch in stream:
            count += 1
            yield batch
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


def _averages(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over entries: ``count/<name>``, or else ``count``, weighs each part and is left out."""
    read: list[Mapping[str, Any]] = jax.device_get(metrics)

    def average(name: str) -> float:
        weights = [float(part.get(f"count/{name}", part.get("count", 1))) for part in read]
        total = sum(w * part[name] for w, part in zip(weights, read, strict=True))
        return float(total / (sum(weights) or 1.0))

    return {name: average(name) for name in read[0] if name.split("/")[0] != "count"}


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
