"""Training is a pair too: a step has ``init`` and ``apply``.

The step is pure, so that an epoch may be a `jax.lax.scan` and a sweep over seeds a `jax.vmap`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffprog.averages import across, at_rest, counted, draws
from diffprog.axes import check_examples
from diffprog.computed import freezes, trainable
from diffprog.dtypes import standard_promotion
from diffprog.errors import LayerError
from diffprog.layer import Layer, as_layer
from diffprog.notation import code
from diffprog.objectives import Objective, parts
from diffprog.parameters import fold
from diffprog.plans import Params, State

__all__ = ["Step", "TrainState", "make_step"]


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
        evaluate: ``(state, batch, first=0) -> metrics``, jitted, at rest; `first` is the number of
            the batch's first example in the data, by which is drawn.
        net: what is trained.
        inputs: ``batch -> (x, side)``, what the net is shown of a batch.
        combine: ``averages -> metrics``, what is no mean over a batch but is made of such means.
        across_examples: are examples of a batch compared?
    """

    init: Callable[..., TrainState]
    apply: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., dict[str, jax.Array]]
    net: Layer
    inputs: Callable[[Any], tuple[Any, dict[str, Any]]]
    combine: Callable[[dict[str, float]], dict[str, float]]
    across_examples: bool

    def __iter__(self) -> Iterator[Any]:
        return iter((self.init, self.apply))


def make_step(
    net: Layer, objective: Objective, optimizer: optax.GradientTransformation, *,
    donate: bool = True, check_axes: bool = True,
) -> Step:
    """One step of gradient descent as a pair of pure functions.

    Args:
        net: the layer to train.
        objective: ``(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``. What
            it does besides stands in its attributes, all of which may be left out. ``inputs``,
            ``(net, batch) -> (x, side)``, is what it shows the net, if not the x of a batch.
            ``draws = True``: it draws at rest too; `evaluate` gives it one example at a time, with
            a key of that example's number in the data. ``across_examples = True``: it compares the
            examples of a batch, which are not cut then. ``combine``, ``averages -> metrics``, makes
            metrics of the averages of others, such as a sum of means over unlike counts.
        optimizer: any optax transformation; it sees what is `trainable` alone.
        donate: let `apply` reuse the memory of the state it is given, which is gone afterwards;
            False keeps it, for notebooks, and for `jax.grad` through training steps (with Adam give
            that ``eps_root=1e-8``: its root has no derivative where a gradient is zero).
        check_axes: refuse, when a step is traced, a net that mixes examples, which lie along axis 0
            of x, at rest: convolutions on grey images without an axis of channels do. And refuse
            images that seem to have channels first. False says that x is as it is meant, such as a
            graph whose nodes are axis 0.

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
        LayerError: one of the three is something else; in ``apply`` and ``evaluate``, what
            `check_axes` finds.
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
        with standard_promotion():
            opt = jax.tree.map(jnp.copy, optimizer.init(params))
        return TrainState(params, state, opt, later, jnp.zeros((), jnp.int32))

    def apply(now: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        check(batch)
        key = jax.random.fold_in(now.key, now.step)

        def loss(params: Params) -> Any:
            return objective(net, params, now.state, batch, key=key, train=True)

        grads, (state, metrics) = jax.grad(loss, has_aux=True)(now.params)
        with standard_promotion():
            updates, opt = optimizer.update(downhill(grads), now.opt_state, now.params)
            params: Any = optax.apply_updates(now.params, updates)
        return TrainState(params, state, opt, now.key, now.step + 1), counted(metrics, batch)

    def rest(now: TrainState, batch: Any, first: Any = 0) -> dict[str, jax.Array]:
        check(batch)
        key = fold(jax.random.key(0), "evaluate") if draws(objective) else None
        return at_rest(objective, net, now.params, now.state, batch, key=key, first=first)

    def shown(batch: Any) -> tuple[Any, dict[str, Any]]:
        if inputs := getattr(objective, "inputs", None):
            return inputs(net, batch)
        x, _, side = parts(net, batch)
        return x, side

    def check(batch: Any) -> None:
        if check_axes:
            check_batch(net, shown, batch)

    def combine(found: dict[str, float]) -> dict[str, float]:
        return found | getattr(objective, "combine", dict)(found)

    return Step(init, jax.jit(apply, donate_argnums=0 if donate else ()), jax.jit(rest), net, shown,
                combine, across(objective))


def check_batch(net: Layer, shown: Callable[[Any], Any], batch: Any) -> None:
    """Raise what `check_examples` finds in what the net is shown of a batch."""
    try:
        x, side = shown(batch)
    except LayerError:
        return  # it is not to be known of an objective of one's own
    check_examples(net, x, side)


def downhill(gradients: Any) -> Any:
    """Gradients as optimizers take them: JAX gives of a complex leaf the conjugate of its own."""
    return jax.tree.map(jnp.conj, gradients)


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


