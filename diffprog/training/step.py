"""A training step is a pair of pure functions, ``init`` and ``apply``, as a layer is.

An epoch can thus be a `jax.lax.scan`, and a sweep over seeds a `jax.vmap`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from diffprog.core.arguments import check_count, check_kept
from diffprog.core.dtypes import norm
from diffprog.core.errors import LayerError
from diffprog.core.guards import check_key
from diffprog.core.layer import Layer, as_layer
from diffprog.core.loops import convolves
from diffprog.core.nets import trainable
from diffprog.core.notation import code, listed, show
from diffprog.core.parameters import fold
from diffprog.core.plans import Params, State
from diffprog.core.streams import parted
from diffprog.data.batches import arrays
from diffprog.training.accumulation import Accumulation, check_accumulation
from diffprog.training.averages import (
    draws,
    inference_metrics,
    is_across_examples,
    with_count,
    with_skipped,
)
from diffprog.training.axes import check_examples
from diffprog.training.descent import (
    Descent,
    check_optimizer,
    descend,
    for_net,
    inference_params,
    learning_rate,
)
from diffprog.training.finite import LossScale, guarded, unguarded
from diffprog.training.finite import loss_scale as scale_of
from diffprog.training.objectives import Objective, checked, inputs

__all__ = ["Step", "TrainState", "make_step"]


class TrainState(NamedTuple):
    """The state of training, as one pytree.

    ``state._replace(params=...)``, passed to `fit` as `state`, begins from other parameters.

    Attributes:
        params, state: of the net.
        opt_state: of the optimizer; in a game, of the optimizer of each player.
        key: of all further randomness; each step folds its number into it. A checkpoint format
            without keys stores ``jax.random.key_data(key)``.
        step: number of steps taken, an int32.
    """

    params: Params
    state: State
    opt_state: Any
    key: jax.Array
    step: jax.Array

    def __repr__(self) -> str:
        return (f"TrainState(step={_number(self.step)}, params={show(self.params)}, "
                f"state={show(self.state)}, ...)")


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step; ``init, apply = step``.

    Attributes:
        init: ``(key, x, **side) -> TrainState``.
        apply: ``(state, batch) -> (state, metrics)``, jitted.
        evaluate: ``(state, batch, first=0) -> metrics``, jitted, in inference; `first` is the
            number of the batch's first example in the data, which determines the randomness.
        net: the net.
        inputs: ``batch -> (x, side)``, the inputs of the net.
        combine: ``averages -> metrics``, adds metrics computed from averages of others.
        across_examples: whether the objective compares the examples of a batch.
        eval_params: ``state -> params``, the parameters for inference: ``state.params``, except
            with optimizers that keep an average, such as `optax.lookahead`.
        per_call: number of steps that `fit` takes in one call of the device.
        apply_many: ``(state, batches) -> (state, metrics)``, jitted: a step for each batch, along a
            new first axis of batches and metrics.
    """

    init: Callable[..., TrainState]
    apply: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., dict[str, jax.Array]]
    net: Layer
    inputs: Callable[[Any], tuple[Any, dict[str, Any]]]
    combine: Callable[[dict[str, float]], dict[str, float]]
    across_examples: bool
    eval_params: Callable[[TrainState], Params]
    per_call: int = 1
    apply_many: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.init, self.apply))


def make_step(
    net: Layer, objective: Objective, optimizer: optax.GradientTransformation, *,
    accumulate: int = 1, steps_per_call: int = 1, report: Sequence[str] = (), donate: bool = True,
    check_axes: bool = True, eval_params: Callable[[Any, Params], Params] = inference_params,
    non_finite: Literal["raise", "skip"] | None = None, loss_scale: LossScale | None = None,
) -> Step:
    """One step of gradient descent as a pair of pure functions.

    Args:
        net: the layer to train.
        objective: ``(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``.
            Metrics are means by name. ``count`` is the number of entries they are over, by which
            `fit` and `evaluate` weight batches; the number of examples by default. ``loss`` is the
            metric that is checked for NaN and selects the best state; the loss by default. Further
            properties are optional attributes of the objective. ``inputs``: ``(net, batch) -> (x,
            side)``, the inputs of the net, if not the x of a batch. ``draws = True``: it draws in
            inference too, so that `evaluate` calls it with one example at a time, and a key from
            the number of that example in the data. ``across_examples = True``: it compares the
            examples of a batch, which is then not cut. ``combine``: ``averages -> metrics``, adds
            metrics computed from averages, such as a sum of means over different counts.
        optimizer: an optax transformation of the `trainable` parameters. It gets those of
            ``value``, ``grad`` and ``value_fn`` that it takes; the last is the loss as a function
            of the parameters on this batch, with key and state of this step (`optax.lbfgs`,
            ``reduce_on_plateau``). A step that it skips, as `optax.apply_if_finite` does, changes
            no statistics and counts in no metric except ``skipped``, the fraction of such steps. If
            it accumulates the gradients of several batches, as `optax.MultiSteps` does, `ema`
            counts the steps of the optimizer.
        accumulate: number of equal parts in which a batch is computed, one after the other, to fit
            into memory. Loss, gradient and metrics are those of the whole batch: parts are weighted
            by the counts of their valid entries. Each part has a key of its own. Statistics of
            `batch_norm` are those of each part, and move once a part; averages of `ema`, clipping,
            schedules and skipped steps see whole batches alone. On CPU the loop over the parts is
            unrolled around convolutions.
        steps_per_call: number of steps that `fit` takes in one call of the device, by a scan: for
            small nets, whose step takes less time than its call. `log_every` of `fit` must be a
            multiple. Steps that fill no call, as the last ones may, are taken one by one, also
            where shapes differ from batch to batch. With convolutions it is refused on CPU, where
            their gradients are many times slower in a scan.
        report: further metrics: ``gradient_norm``, the Euclidean norm of the gradient by all
            trainable parameters, before the optimizer clips it; ``learning_rate``, which needs an
            optimizer of `optax.inject_hyperparams`; ``total_loss``, the loss with penalties;
            ``loss_scale``, that of the next step.
        donate: let `apply` reuse the memory of its state argument, which is deleted. Pass False in
            notebooks, and to differentiate through training steps (with ``eps_root=1e-8`` for Adam,
            whose square root has no derivative where a gradient is zero).
        check_axes: raise, when a step is traced, if the net mixes examples along axis 0 of x in
            inference, as a convolution does on grey images without a channel axis, or if images
            seem to have channels first. Pass False if axis 0 is no batch axis, as for the nodes of
            a graph.
        eval_params: ``(opt_state, params) -> params``, the parameters for `evaluate`. By default
            the slow ones of `optax.lookahead`, and ``schedule_free_eval_params`` for
            ``optax.contrib.schedule_free``.
        non_finite: what becomes of a step whose loss, or whose gradient by trainable parameters, is
            not finite. Both "raise" and "skip" skip it: parameters, statistics, averages and the
            state of the optimizer stay as they are, only the step number moves. It counts in no
            metric except ``skipped``. With "raise", `fit` raises at the next reading, and names the
            gradients by their paths. With None nothing is checked in the step, and `fit` raises
            for the loss or the parameters at a reading.
        loss_scale: a `dp.training.LossScale`, for gradients in float16. Steps with an overflow are
            skipped as above. Gradients that the optimizer and `report` see are not scaled.

    A streaming net continues from batch to batch if ``state.state`` comes from its ``start``. This
    is truncated back-propagation: no gradient reaches the batch before. `evaluate` does not stream.

    The step is jitted: JAX takes 64-bit ids from NumPy modulo 2**32. `fit` and `evaluate` check
    first, and such ids give NaN.

    Example:
        >>> step = dp.make_step(dp.linear(3), dp.classification(), optax.sgd(0.1))
        >>> x, y = jnp.ones((2, 4)), jnp.array([0, 2])
        >>> state = step.init(jax.random.key(0), x)
        >>> state, metrics = step.apply(state, (x, y))
        >>> int(state.step)
        1

    Raises:
        LayerError: net, objective or optimizer is something else; in ``init``, an optimizer that
            takes more than one gradient per step (``sam``) or one per example (``dpsgd``; see
            docs/second_order.md for such steps); `loss_scale` with ``non_finite="raise"``; in
            ``apply``, updates whose shapes differ from those of the parameters; in ``apply`` and
            ``evaluate``, a failure of `check_axes`, or a donated state; in `fit`, `steps_per_call`
            with convolutions on CPU.
    """
    net = as_layer(net)
    check_optimizer(optimizer)
    check_objective(net, objective)
    check_count("accumulate", accumulate)
    check_count("steps_per_call", steps_per_call)
    _check_report(report)
    descent = guarded(net, for_net(net, optimizer), non_finite, loss_scale)
    training = _Training(net, checked(objective), descent, eval_params, check_axes, accumulate,
                         tuple(report))
    donated = 0 if donate else ()
    return Step(training.init, Compiled(training.apply, donate_argnums=donated),
                Compiled(training.evaluate), net, training.inputs, training.combine,
                is_across_examples(training.objective), training.eval_params, steps_per_call,
                Compiled(training.apply_many, donate_argnums=donated))


@dataclasses.dataclass(frozen=True, eq=False)
class _Training:
    """The functions of a step of `make_step`."""

    net: Layer
    objective: Any
    optimizer: Any
    params_for_inference: Callable[[Any, Params], Params]
    check_axes: bool
    accumulate: int
    report: tuple[str, ...]

    def init(self, key: jax.Array, x: Any, **side: Any) -> TrainState:
        check_key(key)
        net_key, later = jax.random.split(key)
        params, state = self.net.init(net_key, arrays(x), **arrays(side))
        if params and not any(jax.tree.leaves(trainable(self.net, params))):
            raise LayerError("a net with something to train", f"{self.net!r}, which is frozen",
                             "freeze less of it: name what trains by exclude=")
        opt_state = self.optimizer.init(params)
        if "learning_rate" in self.report:
            learning_rate(opt_state)
        if "loss_scale" in self.report and scale_of(opt_state) is None:
            raise LayerError("a scale of the loss, to report it", "a step without one",
                             "pass loss_scale=dp.training.LossScale()")
        return fresh_state(params, state, opt_state, later)

    def apply(self, now: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        self._check(batch)
        key = jax.random.fold_in(now.key, now.step)

        def loss(params: Params) -> Any:
            return self.objective(self.net, params, now.state, batch, key=key, train=True)

        gradient = None
        if self.accumulate > 1:
            self._check_parts(now, batch)
            parts = Accumulation(self.objective, self.net, now.state, batch, key, self.accumulate)
            loss, gradient = parts.loss, parts.gradient
        done = descend(self.optimizer, loss, now.params, now.opt_state, now.state, gradient)
        after = now._replace(params=done.params, state=done.state, opt_state=done.opt_state,
                             step=now.step + 1)
        done = done._replace(metrics={**done.metrics, **self._reported(done)})
        return after, step_metrics(done, batch)

    def apply_many(self, now: TrainState, batches: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        first = jax.tree.map(lambda a: a[0], batches)
        if jax.default_backend() == "cpu" and convolves(self.apply, now, first):
            raise LayerError(
                "steps_per_call=1 for a net with convolutions on CPU", "more",
                "leave it out: XLA's gradient of a convolution is many times slower in a loop")
        return jax.lax.scan(self.apply, now, batches)

    def _reported(self, done: Descent) -> dict[str, jax.Array]:
        """The metrics of `report`."""
        found: dict[str, Callable[[], Any]] = {
            "gradient_norm": lambda: norm(self._trained(done.gradient)),
            "learning_rate": lambda: learning_rate(done.opt_state),
            "total_loss": lambda: done.loss,
            "loss_scale": lambda: scale_of(done.opt_state),
        }
        return {name: found[name]() for name in self.report}

    def _trained(self, gradient: Any) -> list[Any]:
        """The leaves of a gradient that are trained: a penalty may have one of frozen leaves."""
        kept = jax.tree.leaves(trainable(self.net, gradient))
        return [leaf for leaf, is_kept in zip(jax.tree.leaves(gradient), kept, strict=True)
                if is_kept]

    def _check_parts(self, now: TrainState, batch: Any) -> None:
        check_accumulation(self.objective, batch, self.accumulate)
        if without_stream(self.net, self.inputs, now.state, batch) is not now.state:
            raise LayerError("a state without a stream for accumulate", show(now.state),
                             "leave accumulate out: a stream is of the rows of the whole batch")

    def evaluate(self, now: TrainState, batch: Any, first: Any = 0) -> dict[str, jax.Array]:
        self._check(batch)
        key = fold(jax.random.key(0), "evaluate") if draws(self.objective) else None
        state = without_stream(self.net, self.inputs, now.state, batch)
        return inference_metrics(self.objective, self.net, self.eval_params(now), state, batch,
                                 key=key, first=first)

    def eval_params(self, now: TrainState) -> Params:
        return self.params_for_inference(unguarded(now.opt_state), now.params)

    def inputs(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        return self.objective.inputs(self.net, batch)

    def combine(self, found: dict[str, float]) -> dict[str, float]:
        return found | getattr(self.objective, "combine", dict)(found)

    def _check(self, batch: Any) -> None:
        if self.check_axes:
            check_batch(self.net, self.inputs, batch)


def fresh_state(params: Params, state: State, opt_state: Any, key: jax.Array) -> TrainState:
    """The state of training before the first step, in buffers of its own.

    An array can be donated only once: some optimizers keep the initial parameters, and an ``init``
    may return an array that it does not own, such as a pretrained table.
    """
    params, state, opt_state = jax.tree.map(jnp.copy, (params, state, opt_state))
    return TrainState(params, state, opt_state, key, jnp.zeros((), jnp.int32))


def step_metrics(done: Descent, batch: Any) -> dict[str, jax.Array]:
    """The metrics of a step, with their count, and ``skipped`` if the optimizer may skip steps."""
    metrics = with_count(done.metrics, batch)
    return metrics if done.skipped is None else with_skipped(done.skipped, metrics)


class Compiled:
    """A jitted function of a `TrainState` and a batch that raises for a donated state."""

    def __init__(self, f: Callable[..., Any], **options: Any) -> None:
        self.jitted = jax.jit(f, **options)
        self.lower, self.trace = self.jitted.lower, self.jitted.trace

    def __call__(self, state: TrainState, batch: Any, *more: Any, **named: Any) -> Any:
        check_state(state)
        check_kept(state.step)  # donated with all other leaves
        try:
            return self.jitted(state, arrays(batch), *more, **named)
        except Exception:
            check_kept(state)
            raise


def without_stream(net: Layer, inputs: Callable[[Any], Any], state: State, batch: Any) -> State:
    """The state of the net without that of its streams: evaluation does not continue them."""
    try:
        x, side = inputs(batch)
    except (TypeError, ValueError):
        return state  # a custom objective may not call the net on the x of a batch
    rest, carried = parted(net, state, lambda: net._shaped(x, side)[1])
    return rest if carried else state


def check_batch(net: Layer, inputs: Callable[[Any], Any], batch: Any) -> None:
    """Apply `check_examples` to the inputs of the net in a batch."""
    try:
        x, side = inputs(batch)
    except LayerError:
        return  # a custom objective may call the net on anything
    check_examples(net, x, side)


def check_step(step: Any) -> None:
    """Raise unless `step` is a `Step`."""
    if not isinstance(step, Step):
        raise LayerError("a Step", code(step), "pass make_step(net, objective, optimizer)")


def check_state(state: Any) -> None:
    """Raise unless `state` is a `TrainState`."""
    if not isinstance(state, TrainState):
        raise LayerError("a TrainState", show(state), "pass fit.state, or the result of step.init")


def _check_report(report: Any) -> None:
    """Raise unless `report` lists known metrics."""
    names = "gradient_norm", "learning_rate", "loss_scale", "total_loss"
    if isinstance(report, str) or not set(report) <= set(names):
        raise LayerError(f"report as a list of names among {listed(names)}", code(report),
                         'write report=["gradient_norm"], for example')


def check_objective(net: Layer, objective: Any) -> None:
    """Raise unless `objective` and its `inputs` take the arguments of an objective."""
    try:
        inspect.signature(objective).bind(net, {}, {}, None, key=None, train=True)
    except TypeError as error:
        raise LayerError("an objective (net, params, state, batch, *, key, train)", code(objective),
                         "pass dp.classification(), for example") from error
    own_inputs = getattr(objective, "inputs", inputs)
    try:
        inspect.signature(own_inputs).bind(net, None)
    except TypeError as error:
        raise LayerError("objective.inputs as a function (net, batch)", code(own_inputs),
                         "write lambda net, batch: (x, {}), with the input x of the net, and its "
                         "side inputs in the dict") from error


def _number(step: Any) -> str:
    """The number of steps, or dtype and shape if it is traced, deleted or several."""
    concrete = isinstance(step, jax.Array) and not isinstance(step, Tracer)
    if concrete and step.ndim == 0 and not step.is_deleted():
        return str(int(step))
    return show(step)
