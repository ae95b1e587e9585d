"""Training is a pair too: a step has ``init`` and ``apply``.

The step is pure, so that an epoch may be a `jax.lax.scan` and a sweep over seeds a `jax.vmap`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from diffprog.core.arguments import check_kept
from diffprog.core.errors import LayerError
from diffprog.core.guards import check_key
from diffprog.core.layer import Layer, as_layer
from diffprog.core.nets import trainable
from diffprog.core.notation import code, show
from diffprog.core.parameters import fold
from diffprog.core.plans import Params, State
from diffprog.core.streams import parted
from diffprog.data.batches import arrays
from diffprog.training.averages import across, at_rest, counted, draws, unless
from diffprog.training.axes import check_examples
from diffprog.training.objectives import Objective, explained, inputs
from diffprog.training.optimizers import check_optimizer, descend, looked_at, of_net

__all__ = ["Step", "TrainState", "make_step"]


class TrainState(NamedTuple):
    """All that changes in training, as one pytree.

    ``state._replace(params=...)`` begins from other parameters, which `fit` then takes as `state`.

    Attributes:
        params, state: of the net.
        opt_state: of the optimizer; in a game, of each player's.
        key: of all randomness to come; each step folds its number into it. What saves arrays of
            numbers alone is given ``jax.random.key_data(key)``.
        step: how many steps were taken, an int32.
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
        evaluate: ``(state, batch, first=0) -> metrics``, jitted, at rest; `first` is the number of
            the batch's first example in the data, by which is drawn.
        net: what is trained.
        inputs: ``batch -> (x, side)``, what the net is shown of a batch.
        combine: ``averages -> metrics``, what is no mean over a batch but is made of such means.
        across_examples: are examples of a batch compared?
        eval_params: ``state -> params``, at which the net is looked at. They are ``state.params``,
            but for optimizers that train at another point, such as those of a slow average.
    """

    init: Callable[..., TrainState]
    apply: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., dict[str, jax.Array]]
    net: Layer
    inputs: Callable[[Any], tuple[Any, dict[str, Any]]]
    combine: Callable[[dict[str, float]], dict[str, float]]
    across_examples: bool
    eval_params: Callable[[TrainState], Params]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.init, self.apply))


def make_step(
    net: Layer, objective: Objective, optimizer: optax.GradientTransformation, *,
    donate: bool = True, check_axes: bool = True,
    eval_params: Callable[[Any, Params], Params] = looked_at,
) -> Step:
    """One step of gradient descent as a pair of pure functions.

    Args:
        net: the layer to train.
        objective: ``(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``. Its
            metrics are means by name; ``count`` says over how many entries, so that `fit` and
            `evaluate` can weigh batches (the number of examples if it is left out), and ``loss`` is
            the loss, if they name no other: it is looked at for NaN, and for the best state. What
            it does besides stands in its attributes, all of which may be left out. ``inputs``,
            ``(net, batch) -> (x, side)``, is what it shows the net, if not the x of a batch.
            ``draws = True``: it draws at rest too; `evaluate` gives it one example at a time, with
            a key of that example's number in the data. ``across_examples = True``: it compares the
            examples of a batch, which are not cut then. ``combine``, ``averages -> metrics``, makes
            metrics of the averages of others, such as a sum of means over unlike counts.
        optimizer: an optax transformation; it sees what is `trainable` alone. It is handed what it
            takes of ``value``, ``grad`` and ``value_fn``, the loss as a function of the parameters
            on this batch, with key and state of this step: `optax.lbfgs`, ``reduce_on_plateau``.
            A step that it skips, as `optax.apply_if_finite` does, moves no statistics either, and
            counts in no metric but ``skipped``, the share of such steps. Where it gathers the
            gradients of several batches, as `optax.MultiSteps` does, `ema` counts its own steps.
        donate: let `apply` reuse the memory of the state it is given, which is gone afterwards;
            False keeps it, for notebooks, and for `jax.grad` through training steps (with Adam give
            that ``eps_root=1e-8``: its root has no derivative where a gradient is zero).
        check_axes: refuse, when a step is traced, a net that mixes examples, which lie along axis 0
            of x, at rest: convolutions on grey images without an axis of channels do. And refuse
            images that seem to have channels first. False says that x is as it is meant, such as a
            graph whose nodes are axis 0.
        eval_params: ``(opt_state, params) -> params``, at which `evaluate` looks at the net. Of
            `optax.lookahead` these are the slow ones, of ``optax.contrib.schedule_free`` those of
            its ``schedule_free_eval_params``, if nothing else is said.

    A net that streams goes on from batch to batch if ``state.state`` is what its ``start`` gives:
    truncated back-propagation, as no gradient reaches the batch before. It is at rest in
    `evaluate`.

    The step is jitted, so it is handed ids of 64 bits as JAX takes them from NumPy, modulo 2**32;
    `fit` and `evaluate` look before, and give NaN.

    Example:
        >>> step = dp.make_step(dp.linear(3), dp.classification(), optax.sgd(0.1))
        >>> x, y = jnp.ones((2, 4)), jnp.array([0, 2])
        >>> state = step.init(jax.random.key(0), x)
        >>> state, metrics = step.apply(state, (x, y))
        >>> int(state.step)
        1

    Raises:
        LayerError: one of the three is something else; in ``init``, an optimizer that takes more
            than one gradient a step (``sam``) or one of each example (``dpsgd``; how to take such a
            step is said in docs/second_order.md); in ``apply``, updates of other shapes than the
            parameters; in ``apply`` and ``evaluate``, what `check_axes` finds, or a state that
            was donated.
    """
    net = as_layer(net)
    check_optimizer(optimizer)
    check_objective(net, objective)
    asked = explained(objective)
    own = of_net(net, optimizer)

    def init(key: jax.Array, x: Any, **side: Any) -> TrainState:
        check_key(key)
        first, later = jax.random.split(key)
        params, state = net.init(first, arrays(x), **arrays(side))
        if params and not any(jax.tree.leaves(trainable(net, params))):
            raise LayerError("a net with something to train", f"{net!r}, which is frozen",
                             "freeze less of it: name what trains by exclude=")
        # Some optimizers keep the initial parameters, and an init may give an array that is not its
        # own, such as a pretrained table; a buffer can be donated only once.
        params, state, opt = jax.tree.map(jnp.copy, (params, state, own.init(params)))
        return TrainState(params, state, opt, later, jnp.zeros((), jnp.int32))

    def apply(now: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        check(batch)
        key = jax.random.fold_in(now.key, now.step)

        def loss(params: Params) -> Any:
            return asked(net, params, now.state, batch, key=key, train=True)

        done = descend(own, loss, now.params, now.opt_state, now.state)
        metrics = counted(done.metrics, batch)
        if done.skipped is not None:
            metrics = unless(done.skipped, metrics)
        return now._replace(params=done.params, state=done.state, opt_state=done.opt_state,
                            step=now.step + 1), metrics

    def rest(now: TrainState, batch: Any, first: Any = 0) -> dict[str, jax.Array]:
        check(batch)
        key = fold(jax.random.key(0), "evaluate") if draws(asked) else None
        return at_rest(asked, net, looked(now), resting(net, shown, now.state, batch), batch,
                       key=key, first=first)

    def looked(now: TrainState) -> Params:
        return eval_params(now.opt_state, now.params)

    def shown(batch: Any) -> tuple[Any, dict[str, Any]]:
        return asked.inputs(net, batch)

    def check(batch: Any) -> None:
        if check_axes:
            check_batch(net, shown, batch)

    def combine(found: dict[str, float]) -> dict[str, float]:
        return found | getattr(asked, "combine", dict)(found)

    return Step(init, Compiled(apply, donate_argnums=0 if donate else ()), Compiled(rest), net,
                shown, combine, across(asked), looked)


class Compiled:
    """A jitted function of a `TrainState` and a batch, which knows a state that was donated."""

    def __init__(self, f: Callable[..., Any], **options: Any) -> None:
        self.jitted = jax.jit(f, **options)
        self.lower, self.trace = self.jitted.lower, self.jitted.trace

    def __call__(self, state: TrainState, batch: Any, *more: Any, **named: Any) -> Any:
        check_state(state)
        check_kept(state.step)  # which is donated with all else
        try:
            return self.jitted(state, arrays(batch), *more, **named)
        except Exception:
            check_kept(state)
            raise


def resting(net: Layer, shown: Callable[[Any], Any], state: State, batch: Any) -> State:
    """The state without what a stream carries: examples that are looked at begin anew."""
    try:
        x, side = shown(batch)
    except (TypeError, ValueError):
        return state  # an objective of one's own does not show the net x as it is
    rest, carried = parted(net, state, lambda: net._shaped(x, side)[1])
    return rest if carried else state


def check_batch(net: Layer, shown: Callable[[Any], Any], batch: Any) -> None:
    """Raise what `check_examples` finds in what the net is shown of a batch."""
    try:
        x, side = shown(batch)
    except LayerError:
        return  # it is not to be known of an objective of one's own
    check_examples(net, x, side)


def check_step(step: Any) -> None:
    """Raise unless it is a step."""
    if not isinstance(step, Step):
        raise LayerError("a Step", code(step), "pass make_step(net, objective, optimizer)")


def check_state(state: Any) -> None:
    """Raise unless it is a state of training."""
    if not isinstance(state, TrainState):
        raise LayerError("a TrainState", show(state), "pass fit.state, or what step.init gives")


def check_objective(net: Layer, objective: Any) -> None:
    """Raise unless it can be called as an objective is."""
    try:
        inspect.signature(objective).bind(net, {}, {}, None, key=None, train=True)
    except TypeError as error:
        raise LayerError("an objective (net, params, state, batch, *, key, train)", code(objective),
                         "pass dp.classification(), for example") from error
    shown = getattr(objective, "inputs", inputs)
    try:
        inspect.signature(shown).bind(net, None)
    except TypeError as error:
        raise LayerError("objective.inputs as a function (net, batch)", code(shown),
                         "write lambda net, batch: (x, {}), with the x that the net is shown, and "
                         "side inputs in the dict") from error


def _number(step: Any) -> str:
    """How many steps, if it is one number that is there."""
    known = isinstance(step, jax.Array) and not isinstance(step, Tracer)
    return str(int(step)) if known and step.ndim == 0 and not step.is_deleted() else show(step)
