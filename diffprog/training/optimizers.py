"""What is known of optimizers: what a step hands them, where their net is looked at, what fails.

An optimizer is asked in one place. Besides gradients and parameters it is handed what optax calls
extra arguments: the loss, its gradient, and the loss as a function of the parameters, in which key
and state of the step are held fixed.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffprog.core.dtypes import standard_promotion
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.nets import freezes, trainable
from diffprog.core.notation import code, show
from diffprog.core.paths import paths
from diffprog.core.plans import Params, State

Updates = tuple[Any, Any]

# What cannot be a step of `make_step`: the state by which it is known, and how it is done.
_OTHER_STEPS = {
    optax.contrib.SAMState: (
        "optax.contrib.sam, whose steps in between lead away from the net",
        "take a step of your own, of two gradients: the second at params moved by the first"),
    optax.contrib.DifferentiallyPrivateAggregateState: (
        "optax.contrib.differentially_private_aggregate, which wants one of each example",
        "take a step of your own: "
        "optimizer.update(dp.gradients.per_example_gradients(...), opt_state)"),
}


class Ahead(NamedTuple):
    """The state of `optax.lookahead`, with the slow parameters, at which the net is looked at."""

    inner: Any
    slow: Params


class Descent(NamedTuple):
    """What a step has made of parameters, of the states of optimizer and net, and its metrics.

    `skipped` says whether the optimizer left the step out; None of one that never does.
    """

    params: Params
    opt_state: Any
    state: State
    metrics: dict[str, jax.Array]
    skipped: jax.Array | None


def check_optimizer(optimizer: Any) -> None:
    """Raise unless it is an optax transformation."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise LayerError("an optax transformation as optimizer", code(optimizer),
                         "pass optax.adam(1e-3), for example")


def of_net(net: Layer, optimizer: Any) -> Any:
    """The optimizer as a step calls it, shown what no `freeze` keeps from it.

    What is frozen is given no update at all: a penalty may speak of it and have a gradient there.
    """
    begin: Any = functools.partial(_begin, optimizer)
    update: Any = functools.partial(_update, optimizer)
    own = optax.GradientTransformationExtraArgs(begin, update)
    if not freezes(net):
        return own
    sides: dict[Any, Any] = {True: own, False: optax.set_to_zero()}
    return optax.multi_transform(sides, functools.partial(trainable, net))


def descend(
    optimizer: Any, loss: Callable[[Params], Any], params: Params, opt_state: Any, state: State,
) -> Descent:
    """One update by a loss, ``params -> (value, (state, metrics))``, from the `state` of the net.

    A step that the optimizer skipped leaves the state of the net as it was, and one whose gradient
    it has only gathered leaves the averages of `ema` so: they count its steps.
    """
    (value, (after, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    grads = jax.tree.map(jnp.conj, grads)  # JAX gives of a complex leaf the conjugate of optax's

    def value_fn(given: Params, *, obj_fn: Any = None) -> jax.Array:
        # A line search demands that its function takes what is meant for another in the chain.
        return loss(jax.tree.map(_shown, params, given))[0]

    with standard_promotion():  # the code of optax needs it
        updates, opt = optimizer.update(grads, opt_state, params, value=value,
                                        value_fn=value_fn, obj_fn=value_fn)
        moved: Any = optax.apply_updates(params, updates)
    skipped = _skipped(opt_state, opt, updates)
    if skipped is not None:
        after = jax.tree.map(functools.partial(jnp.where, skipped), state, after)
    if gathered := [part.mini_step if isinstance(part, optax.MultiStepsState) else part.count
                    for part in _parts(opt, optax.MultiStepsState, optax.ApplyEvery)]:
        after = _averaging(state, after, jnp.any(jnp.stack(gathered) == 0))
    return Descent(moved, opt, after, metrics, skipped)


@standard_promotion()
def looked_at(opt_state: Any, params: Params) -> Params:
    """The parameters at which the net is to be looked at: those themselves, for most optimizers.

    Of `optax.lookahead` they are the slow ones, and of `optax.contrib.schedule_free` its average.
    """
    for part in _parts(opt_state, Ahead, optax.contrib.ScheduleFreeState):
        if isinstance(part, Ahead):
            params = jax.tree.map(_shown, params, part.slow)
        else:
            def average(y: Any, z: Any, part: Any = part) -> Any:
                if isinstance(z, optax.MaskedNode):
                    return y
                return optax.contrib.schedule_free_eval_params(part._replace(z=z), y)

            params = jax.tree.map(average, params, part.z)
    return params


@standard_promotion()
def _begin(optimizer: Any, params: Params) -> Any:
    """The first state of the optimizer; raise if it is one that no step here can be of."""
    ours = lambda record: "attribute `fast`" not in record.getMessage()  # noqa: E731
    logger = logging.getLogger("absl")
    logger.addFilter(ours)  # lookahead is given fast and slow parameters below
    try:
        state = optimizer.init(params)
    finally:
        logger.removeFilter(ours)
    for part in _parts(state, *_OTHER_STEPS):
        raise LayerError("an optimizer of one gradient a step", *_OTHER_STEPS[type(part)])
    if next(_parts(state, optax.LookaheadState), None) is None:
        return state
    if next(_parts(state, optax.contrib.ScheduleFreeState), None) is not None:
        raise LayerError("one slow average", "those of lookahead and of schedule_free",
                         "leave out one of them: the net is looked at in one place")
    return Ahead(optimizer.init(optax.LookaheadParams.init_synced(params)), params)


def _update(optimizer: Any, grads: Any, state: Any, params: Params, **extra: Any) -> Updates:
    """The updates of the parameters, and the next state of the optimizer."""
    extra |= {"grad": grads}  # without what is frozen, as they are here
    if not isinstance(state, Ahead):
        updates, state = _asked(optimizer, grads, state, params, extra)
    else:
        both = optax.LookaheadParams(params, state.slow)
        try:
            both, inner = _asked(optimizer, grads, state.inner, both, extra)
        except LayerError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise LayerError("lookahead around all other optimizers", "one around it or beside it",
                             "write optax.lookahead(optax.chain(...), ...), with what gathers, "
                             "skips or decays inside") from error
        slow: Any = optax.apply_updates(state.slow, both.slow)
        updates, state = both.fast, Ahead(inner, slow)
    _check_updates(updates, params)
    return updates, state


def _asked(optimizer: Any, grads: Any, state: Any, params: Any, extra: dict[str, Any]) -> Updates:
    """What the optimizer answers, handed what it takes."""
    taken = inspect.signature(optimizer.update).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        extra = {name: value for name, value in extra.items() if name in taken}
    try:
        return optimizer.update(grads, state, params, **extra)
    except ValueError as error:
        if "MaskedNode" not in str(error):
            raise
        raise LayerError("a gradient masked as the updates are",
                         "masked or partition around a line search, which compares the two",
                         "pass mask_compatible_extra_args=True to it") from error
    except TypeError as error:
        if "keyword" not in str(error):
            raise
        if isinstance(state, optax.LookaheadState):
            raise LayerError("in lookahead what asks for the gradient alone",
                             f"an optimizer that answers {str(error)!r}",
                             "leave out lookahead: optax hands what is in it nothing more"
                             ) from error
        raise LayerError("an optimizer that takes value, grad and value_fn beside the gradient",
                         f"one that answers {str(error)!r}",
                         "take a step of your own: jax.grad of the objective, optimizer.update, "
                         "optax.apply_updates") from error


def _check_updates(updates: Any, params: Params) -> None:
    """Raise unless the updates are of the parameters' shapes: other ones would broadcast."""
    wanted, found = paths(params), paths(updates)
    for path, leaf in wanted.items():
        if path in found and jnp.shape(found[path]) != jnp.shape(leaf):
            raise LayerError(f"an update of {path} of its shape, {show(leaf)}", show(found[path]),
                             "take a step of your own by per_example_gradients, if the optimizer "
                             "reads axis 0 as that of examples")


def _shown(own: Any, given: Any) -> Any:
    """What an optimizer is shown of a leaf, or the leaf itself where it is shown none."""
    return own if isinstance(given, optax.MaskedNode) else given


def _parts(opt_state: Any, *kinds: type) -> Iterator[Any]:
    """The parts of an optimizer's state that are of some kinds, wherever they stand."""
    for part in jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, kinds)):
        if isinstance(part, kinds):
            yield part
            yield from _parts(tuple(part), *kinds)


def _skipped(before: Any, after: Any, updates: Any) -> jax.Array | None:
    """Did the optimizer leave the step out? None, if it is none that may.

    What stands inside of one that gathers is not asked at every step, so it must have counted one.
    """
    found = []
    kinds = optax.ApplyIfFiniteState, optax.MultiStepsState
    for old, part in zip(_parts(before, *kinds), _parts(after, *kinds), strict=True):
        if isinstance(part, optax.ApplyIfFiniteState):
            finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]
            refused = part.total_notfinite != old.total_notfinite
            found.append(refused & jnp.stack(finite).all())  # else it gave up
        elif isinstance(part.skip_state, dict) and "should_skip" in part.skip_state:
            found.append(part.skip_state["should_skip"])
    return jnp.stack(found).any() if found else None


def _averaging(before: State, after: State, taken: jax.Array) -> State:
    """The state after a step, in which averages have only taken in the parameters if `taken`."""
    return {name: jax.tree.map(functools.partial(jnp.where, taken), part, before[name])
            if name.startswith("#ema") else
            _averaging(before[name], part, taken) if isinstance(part, dict) else part
            for name, part in after.items()}
