"""Computed parameters: a leaf is replaced in place by a small tree from which it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.computed import Computed, Patterns
from diffprog.core.dtypes import joint
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

    Each leaf w whose path matches stands in the parameters as ``make(key, w)``, a small tree under
    the name of the leaf. `merge` gives the parameters that the layer alone takes, and `unmerge`
    begins from such. `lora`, `weight_norm`, `spectral_norm`, `freeze`, `quantize` and `ema` are
    this with functions of a few lines. It keeps the kind and the names of what it wraps.

    Args:
        layer: any layer.
        make: ``(key, leaf) -> tree``, an array or nested dicts of arrays. Of copies that `repeat`,
            `heads` or `ensemble` stack, it sees one at a time, and so do `use` and `carry`.
        use: ``tree -> leaf``, of the leaf's shape and dtype. With `carry` it is
            ``(tree, carried, train) -> (leaf, carried)``.
        pattern: of the paths of the leaves, or a tuple of several.
        carry: ``tree -> carried``, arrays that the state holds under ``#reparam``, at the path of
            the leaf.
        constant: a pattern of paths inside the small tree, such as "base", which no gradient
            reaches and `make_step` keeps from the optimizer.

    Raises:
        LayerError: at ``init``: a pattern that matches nothing, a leaf that `use` does not give
            back as it was, a leaf that is frozen inside.

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
    """The layer with computed parameters; `again` does the same to the layer of other children.

    What is carried stands under `own.mark`, with a number where the same is inside already.
    """
    inside = sum(other.mark.startswith(own.mark) for other in layer.computed
                 if isinstance(other, Computed))
    own = dataclasses.replace(own, mark=f"{own.mark}_{inside}" if inside else own.mark)

    def stacks(path: str) -> int:
        return stacks_at(layer, path)

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        plan = layer.plan(x, **side)
        key = jax.eval_shape(lambda: jax.random.key(0))
        params, state = jax.eval_shape(
            lambda key, params, state: own.made(key, params, state, stacks),
            key, plan.params, plan.state)
        if own.mark in plan.state:
            raise LayerError(f"a state that leaves the name {own.mark} free", listed(plan.state),
                             "make the wrapper inside by dataclasses.replace, which hands on what "
                             "is computed")
        chosen = own.choose(plan.params)
        back = jax.eval_shape(
            lambda params, state: own.plain(params, state, stacks, at=chosen)[0], params, state)
        if wrong := Plan(plan.params, {}, None).difference(back):
            raise wrong
        held = trainable(layer, plan.params)
        for path in chosen:
            if not paths(held)[path] and path not in paths(params):
                raise LayerError(f"{path} to be trained", "a leaf that is frozen inside",
                                 "freeze around it: freeze(lora(...), exclude=('**/down', "
                                 "'**/up'))")
        return dataclasses.replace(plan, params=params, state=state)

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        return own.made(key, *layer.init(key, x, **side), stacks)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        params, state, after = own.plain(params, state, stacks, train)
        y, state = layer.apply(params, state, x, key=key, train=train, **side)
        return y, {**state, **after}

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        params, state, after = own.plain(params, state, stacks)
        return {**layer.start(params, state, x, length=length, **side), **after}

    return dataclasses.replace(
        layer, init=init, apply=apply, start=layer.start and start, planner=planner,
        computed=(own, *layer.computed), **computing(layer, again),
    )


def length(w: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """``sqrt(sum |w|**2)`` over axes, all if None, in float32 or wider, w being of any size."""
    w = w.astype(joint(w.dtype, jnp.float32))
    # Neither a square of large numbers nor one of small ones can be held.
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(w), axes, keepdims=True))
    size = jnp.where(size == 0, 1, size)
    scaled = w / size.astype(w.dtype)
    square = jnp.sum((scaled * scaled.conj()).real, axes)
    root = jnp.sqrt(jnp.where(square == 0, 1, square))  # which has a slope at zero
    return jnp.where(square == 0, 0, root * size.reshape(square.shape))


def check_kernel(leaf: jax.Array) -> None:
    """Raise unless a leaf is a kernel: of a vector no norm or step is shared by several weights."""
    if leaf.ndim < 2:
        raise LayerError("kernels (..., in, out)", show(leaf),
                         "choose a pattern that matches no vectors")
