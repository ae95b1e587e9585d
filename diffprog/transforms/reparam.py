"""Reparametrization: a leaf is replaced in place by a small tree from which it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.computed import Computed, Patterns
from diffprog.core.dtypes import wide
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer, computing
from diffprog.core.nets import stacks_at, trainable
from diffprog.core.notation import listed, show
from diffprog.core.paths import paths
from diffprog.core.plans import Params, Plan, State, remember

__all__ = ["reparam"]


@factory
def reparam(
    layer: Any, make: Callable[[jax.Array, jax.Array], Any], use: Callable[..., Any],
    pattern: Patterns = "**/kernel", *, carry: Callable[[Any], Any] | None = None,
    constant: str = "",
) -> Layer:
    """Compute parameters from others: ``y = f(x; w)`` with ``w = use(tree)``.

    Each leaf w whose path matches the pattern is replaced by ``make(key, w)``, a small tree under
    the name of the leaf. `merge` returns the parameters of the plain layer, and `unmerge` starts
    from them. `lora`, `weight_norm`, `spectral_norm`, `freeze`, `quantize` and `ema` are this with
    functions of a few lines. The kind and the names of the layer stay.

    Args:
        layer: any layer.
        make: ``(key, leaf) -> tree``, an array or nested dicts of arrays. If `repeat`, `heads` or
            `ensemble` stack copies, make, use and carry get one copy at a time.
        use: ``tree -> leaf``, with the leaf's shape and dtype. With `carry` it is
            ``(tree, carried, train) -> (leaf, carried)``.
        pattern: paths of the leaves, or a tuple of several patterns.
        carry: ``tree -> carried``, initial arrays that the state holds under ``#reparam``, at the
            path of the leaf.
        constant: pattern of paths inside the small tree, such as "base", that are frozen: no
            gradient reaches them, and `make_step` keeps them from the optimizer.

    Raises:
        LayerError: at ``init``, for a pattern that matches nothing, a leaf whose shape or dtype
            `use` does not restore, or a leaf that is frozen inside.

    Example:
        >>> positive = dp.reparam(dp.linear(3), lambda key, w: {"log": jnp.log(jnp.abs(w))},
        ...                       lambda tree: jnp.exp(tree["log"]))
        >>> params, state = positive.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> jax.tree.map(jnp.shape, params)
        {'bias': (3,), 'kernel': {'log': (4, 3)}}
    """
    own = Computed(make, use, pattern, carry=carry, constant=constant)
    return reparametrized(as_layer(layer), own, lambda layer: reparam(
        layer, make, use, pattern, carry=carry, constant=constant))


def reparametrized(layer: Layer, own: Computed, again: Callable[[Layer], Layer]) -> Layer:
    """The layer with computed parameters; `again` applies the same wrapper to another layer.

    The carried arrays are in the state under `own.mark`, numbered if an inner wrapper uses it too.
    """
    inside = sum(other.mark.startswith(own.mark) for other in layer.computed
                 if isinstance(other, Computed))
    if inside:
        own = dataclasses.replace(own, mark=f"{own.mark}_{inside}")

    def stacks(path: str) -> int:
        return stacks_at(layer, path)

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        plan = layer.plan(x, **side)
        params, state = _made(own, plan, stacks)
        if own.mark in plan.state:
            raise LayerError(f"a layer without {own.mark} in its state", listed(plan.state),
                             "make the inner wrapper by dataclasses.replace, which keeps the field "
                             "computed")
        chosen = own.choose(plan.params)
        _check_restored(own, plan, params, state, stacks, chosen)
        _check_trainable(layer, plan.params, params, chosen)
        return dataclasses.replace(plan, params=params, state=state)

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        params, state = layer.init(key, x, **side)
        return own.made(key, params, state, stacks)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        params, state, carried = own.plain(params, state, stacks, train)
        y, state = layer.apply(params, state, x, key=key, train=train, **side)
        return y, {**state, **carried}

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        params, state, carried = own.plain(params, state, stacks)
        return {**layer.start(params, state, x, length=length, **side), **carried}

    return dataclasses.replace(
        layer, init=init, apply=apply, start=layer.start and start, planner=planner,
        computed=(own, *layer.computed), **computing(layer, again),
    )


def _made(own: Computed, plan: Plan, stacks: Callable[[str], int]) -> tuple[Params, State]:
    """The shapes of parameters and state with the small trees."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key, params, state: own.made(key, params, state, stacks),
                          key, plan.params, plan.state)


def _check_restored(
    own: Computed, plan: Plan, params: Params, state: State, stacks: Callable[[str], int],
    chosen: Sequence[str],
) -> None:
    """Raise unless `use` returns leaves with the shapes and dtypes of the plain layer."""
    plain = jax.eval_shape(
        lambda params, state: own.plain(params, state, stacks, at=chosen)[0], params, state)
    if wrong := Plan(plan.params, {}, None).difference(plain):
        raise wrong


def _check_trainable(
    layer: Layer, plain: Params, params: Params, chosen: Sequence[str]
) -> None:
    """Raise if a leaf is frozen inside and replaced by a tree, which would be trained."""
    trained, kept = paths(trainable(layer, plain)), paths(params)
    for path in chosen:
        if not trained[path] and path not in kept:
            raise LayerError(f"{path} as a trainable leaf", "one that is frozen inside",
                             "freeze outside: freeze(lora(...), exclude=('**/down', '**/up'))")


def length(w: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """``sqrt(sum |w|**2)`` over axes, all if None, in float32 or wider, without overflow."""
    w = wide(w)
    # Scaled to 1 first: squares of large or small numbers would overflow or underflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(w), axes, keepdims=True))
    largest = jnp.where(largest == 0, 1, largest)
    scaled = w / largest.astype(w.dtype)
    square = jnp.sum((scaled * scaled.conj()).real, axes)
    root = jnp.sqrt(jnp.where(square == 0, 1, square))  # sqrt has no finite slope at zero
    return jnp.where(square == 0, 0, root * largest.reshape(square.shape))


def check_kernel(leaf: jax.Array) -> None:
    """Raise unless a leaf has input and output axes, so that several weights share a norm."""
    if leaf.ndim < 2:
        raise LayerError("kernels (..., in, out)", show(leaf),
                         "choose a pattern that matches no vectors")
