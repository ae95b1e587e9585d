"""One descent step: extra arguments of optimizers, parameters for inference, skipped steps.

Besides gradients and parameters an optimizer gets the extra arguments of optax: the loss, its
gradient, and the loss as a function of the parameters, with key and state of the step fixed.
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
from diffprog.training.finite import Guarded, loss_scale, unscaled

Updates = tuple[Any, Any]

# Optimizers that `make_step` cannot use, by their state: a description, and the remedy.
_UNSUPPORTED = {
    optax.contrib.SAMState: (
        "optax.contrib.sam, whose intermediate steps leave the parameters",
        "write your own step with two gradients: the second at params moved by the first"),
    optax.contrib.DifferentiallyPrivateAggregateState: (
        "optax.contrib.differentially_private_aggregate, which takes one per example",
        "write your own step: "
        "optimizer.update(dp.gradients.per_example_gradients(...), opt_state)"),
}


class Ahead(NamedTuple):
    """The state of `optax.lookahead`, with the slow parameters, which are those for inference."""

    inner: Any
    slow: Params


class Descent(NamedTuple):
    """The parameters, states and metrics after a step.

    `skipped` is whether the optimizer skipped the step; None if it never does. `loss` includes
    penalties.
    """

    params: Params
    opt_state: Any
    state: State
    metrics: dict[str, jax.Array]
    skipped: jax.Array | None
    loss: jax.Array
    gradient: Any


def check_optimizer(optimizer: Any) -> None:
    """Raise unless `optimizer` is an optax transformation."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise LayerError("an optax transformation as optimizer", code(optimizer),
                         "pass optax.adam(1e-3), for example")


def for_net(net: Layer, optimizer: Any) -> Any:
    """The optimizer as a step calls it, for the trainable parameters of the net.

    Frozen parameters are never updated, although a penalty may have a gradient there.
    """
    init: Any = functools.partial(_init, optimizer)
    update: Any = functools.partial(_update, optimizer)
    own = optax.GradientTransformationExtraArgs(init, update)
    if not freezes(net):
        return own
    by_label: dict[Any, Any] = {True: own, False: optax.set_to_zero()}
    return optax.multi_transform(by_label, functools.partial(trainable, net))


def descend(
    optimizer: Any, loss: Callable[[Params], Any], params: Params, opt_state: Any, state: State,
    gradient: Callable[[Params, Any], Any] | None = None,
) -> Descent:
    """One update by a loss, ``params -> (value, (state, metrics))``, from the `state` of the net.

    `gradient` gets the parameters and a scale, None for 1. It returns what the loss does, and the
    gradient of the scaled loss.

    A skipped step leaves the state of the net unchanged. A step whose gradient is only accumulated
    leaves the averages of `ema` unchanged, which count the steps of the optimizer.
    """
    gradient, scale = gradient or functools.partial(_gradient, loss), loss_scale(opt_state)
    (value, (after, metrics)), grads = gradient(params, scale)
    grads = grads if scale is None else unscaled(grads, scale)
    grads = jax.tree.map(jnp.conj, grads)  # the convention of optax for complex parameters

    def value_fn(given: Params, *, obj_fn: Any = None) -> jax.Array:
        # A line search passes on obj_fn, the argument of another optimizer in the chain.
        return loss(jax.tree.map(_unmasked, params, given))[0]

    with standard_promotion():  # optax needs it
        updates, opt = optimizer.update(grads, opt_state, params, value=value,
                                        value_fn=value_fn, obj_fn=value_fn)
        moved: Any = optax.apply_updates(params, updates)
    skipped = _skipped(opt_state, opt, updates)
    if skipped is not None:
        after = jax.tree.map(functools.partial(jnp.where, skipped), state, after)
    accumulated = [part.mini_step if isinstance(part, optax.MultiStepsState) else part.count
                   for part in _parts(opt, optax.MultiStepsState, optax.ApplyEvery)]
    if accumulated:
        after = averages_if(jnp.any(jnp.stack(accumulated) == 0), state, after)
    return Descent(moved, opt, after, metrics, skipped, value, grads)


def _gradient(loss: Callable[[Params], Any], params: Params, scale: Any) -> Any:
    """What the loss returns, and the gradient of the loss times `scale`."""
    if scale is None:
        return jax.value_and_grad(loss, has_aux=True)(params)
    value, pull, aux = jax.vjp(loss, params, has_aux=True)
    return (value, aux), pull(scale.astype(value.dtype))[0]


@standard_promotion()
def inference_params(opt_state: Any, params: Params) -> Params:
    """The parameters for inference: `params` themselves, for most optimizers.

    With `optax.lookahead` they are the slow ones, with `optax.contrib.schedule_free` its average.
    """
    for part in _parts(opt_state, Ahead, optax.contrib.ScheduleFreeState):
        if isinstance(part, Ahead):
            params = jax.tree.map(_unmasked, params, part.slow)
        else:
            def average(y: Any, z: Any, part: Any = part) -> Any:
                if isinstance(z, optax.MaskedNode):
                    return y
                return optax.contrib.schedule_free_eval_params(part._replace(z=z), y)

            params = jax.tree.map(average, params, part.z)
    return params


@standard_promotion()
def _init(optimizer: Any, params: Params) -> Any:
    """The initial state of the optimizer; raise if `make_step` cannot use it."""

    def is_other_warning(record: logging.LogRecord) -> bool:
        return "attribute `fast`" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(is_other_warning)  # lookahead gets fast and slow parameters below
    try:
        state = optimizer.init(params)
    finally:
        logger.removeFilter(is_other_warning)
    for part in _parts(state, *_UNSUPPORTED):
        raise LayerError("an optimizer of one gradient a step", *_UNSUPPORTED[type(part)])
    if next(_parts(state, optax.LookaheadState), None) is None:
        return state
    if next(_parts(state, optax.contrib.ScheduleFreeState), None) is not None:
        raise LayerError("one slow average", "those of lookahead and of schedule_free",
                         "leave out one of them: inference uses one set of parameters")
    return Ahead(optimizer.init(optax.LookaheadParams.init_synced(params)), params)


def _update(optimizer: Any, grads: Any, state: Any, params: Params, **extra: Any) -> Updates:
    """The updates of the parameters, and the next state of the optimizer."""
    extra |= {"grad": grads}  # of the trainable parameters alone
    if not isinstance(state, Ahead):
        updates, state = _call_update(optimizer, grads, state, params, extra)
    else:
        both = optax.LookaheadParams(params, state.slow)
        try:
            both, inner = _call_update(optimizer, grads, state.inner, both, extra)
        except LayerError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise LayerError("lookahead around all other optimizers", "one around it or beside it",
                             "write optax.lookahead(optax.chain(...), ...), with accumulation, "
                             "skipping and decay inside") from error
        slow: Any = optax.apply_updates(state.slow, both.slow)
        updates, state = both.fast, Ahead(inner, slow)
    _check_updates(updates, params)
    return updates, state


def _call_update(
    optimizer: Any, grads: Any, state: Any, params: Any, extra: dict[str, Any]
) -> Updates:
    """Call ``optimizer.update`` with those extra arguments that it takes."""
    taken = inspect.signature(optimizer.update).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        extra = {name: value for name, value in extra.items() if name in taken}
    try:
        return optimizer.update(grads, state, params, **extra)
    except ValueError as error:
        if "MaskedNode" not in str(error):
            raise
        raise LayerError("a gradient masked as the updates are",
                         "masked or partition around a line search, which compares both",
                         "pass mask_compatible_extra_args=True to it") from error
    except TypeError as error:
        if "keyword" not in str(error):
            raise
        if isinstance(state, optax.LookaheadState):
            raise LayerError("an optimizer in lookahead that takes the gradient alone",
                             f"one that raises {str(error)!r}",
                             "leave out lookahead: it passes on no extra arguments") from error
        raise LayerError("an optimizer whose extra arguments are value, grad and value_fn",
                         f"one that raises {str(error)!r}",
                         "write your own step: jax.grad of the objective, optimizer.update, "
                         "optax.apply_updates") from error


def _check_updates(updates: Any, params: Params) -> None:
    """Raise unless the updates have the shapes of the parameters: others would broadcast."""
    wanted, found = paths(params), paths(updates)
    for path, leaf in wanted.items():
        if path in found and jnp.shape(found[path]) != jnp.shape(leaf):
            raise LayerError(f"an update of {path} of its shape, {show(leaf)}", show(found[path]),
                             "write your own step with per_example_gradients, if the optimizer "
                             "takes axis 0 for the batch axis")


def learning_rate(opt_state: Any) -> jax.Array:
    """The learning rate in the state of an optimizer; raise if it does not keep it."""
    for part in _parts(opt_state, optax.InjectStatefulHyperparamsState):
        if "learning_rate" in part.hyperparams:
            return part.hyperparams["learning_rate"]
    raise LayerError("an optimizer that keeps its learning rate, to report it", "one that does not",
                     "write optax.inject_hyperparams(optax.adam)(learning_rate=schedule)")


def _unmasked(own: Any, given: Any) -> Any:
    """The leaf that an optimizer holds, or our own if it is masked there."""
    return own if isinstance(given, optax.MaskedNode) else given


def _parts(opt_state: Any, *kinds: type) -> Iterator[Any]:
    """The parts of an optimizer's state of the given types, at any depth."""
    for part in jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, kinds)):
        if isinstance(part, kinds):
            yield part
            yield from _parts(tuple(part), *kinds)


def _skipped(before: Any, after: Any, updates: Any) -> jax.Array | None:
    """Whether the optimizer skipped the step; None if it never skips one.

    `optax.apply_if_finite` inside `optax.MultiSteps` is not called at every step, so a step counts
    as skipped only if its counter has changed.
    """
    found = []
    kinds = Guarded, optax.ApplyIfFiniteState, optax.MultiStepsState
    for old, part in zip(_parts(before, *kinds), _parts(after, *kinds), strict=True):
        if isinstance(part, Guarded):
            found.append(part.skipped)
        elif isinstance(part, optax.ApplyIfFiniteState):
            finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]
            refused = part.total_notfinite != old.total_notfinite
            found.append(refused & jnp.stack(finite).all())  # otherwise it gave up
        elif isinstance(part.skip_state, dict) and "should_skip" in part.skip_state:
            found.append(part.skip_state["should_skip"])
    return jnp.stack(found).any() if found else None


def averages_if(taken: jax.Array, before: State, after: State) -> State:
    """The state `after` a step, with the averages of `ema` from `before` it unless `taken`."""
    found = {}
    for name, part in after.items():
        if name.startswith("#ema"):
            found[name] = jax.tree.map(functools.partial(jnp.where, taken), part, before[name])
        elif isinstance(part, dict):
            found[name] = averages_if(taken, before[name], part)
        else:
            found[name] = part
    return found
