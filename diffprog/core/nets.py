"""Walks over a whole net: its calls, its wrappers, its computed parameters.

The record of a layer lists what is done to its own trees (`computed`). The functions here apply it
throughout a net, so that the trees of a net with reparametrizations become plain ones, and back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core.computed import Computed, Expanded, Mapped, Own, Pinned, WrittenOut, one_copy
from diffprog.core.dtypes import cast
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer, Wraps
from diffprog.core.notation import listed
from diffprog.core.parameters import fold
from diffprog.core.paths import joined, part_at, paths, put
from diffprog.core.plans import Params, Plan, State, spec

__all__ = ["merge", "trainable", "unmerge", "verify"]


class Visit(NamedTuple):
    """One call of a layer in a net: its path, the layer, its inputs, and its plan."""

    path: str
    layer: Layer
    x: Any
    side: dict[str, Any]
    plan: Plan


def visits(layer: Layer, x: Any, side: dict[str, Any], path: str = "") -> Iterator[Visit]:
    """The calls of a layer and all layers in it, in order; a layer called twice comes twice."""
    plan = layer.plan(x, **side)
    yield Visit(path, layer, x, side, plan)
    for name, seen, beside in plan.calls:
        child = layer.children[name].lent or layer.children[name]
        yield from visits(child, seen, beside, f"{path}/{name}" if path else name)


class Run(NamedTuple):
    """How a wrapper runs what it wraps: on inputs of these shapes."""

    wrapper: Layer
    wraps: Wraps
    x: Any
    side: dict[str, Any]


def unwrapped(layer: Layer, x: Any, side: dict[str, Any]) -> Iterator[Run]:
    """The wrappers around the innermost layer, the outermost first."""
    while wraps := layer.wraps:
        if wraps.dtype is not None:
            x, side = jax.eval_shape(
                functools.partial(cast, dtype=wraps.dtype), (x, side))
        if wraps.order == "time":  # a recurrence keeps mask and segments to itself
            x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(
                (*a.shape[:1], *a.shape[2:]), a.dtype), x)
            side = {name: side[name] for name in side.keys() - {"mask", "segments"}}
        if wraps.order == "fixed point":
            x = (x, x)  # z and x
        yield Run(layer, wraps, x, side)
        layer = wraps.layer


def silenced(layer: Layer, call: Callable[..., Any]) -> Layer:
    """The layer with children that do not run: ``call(name, child, params, x, side)`` returns y."""

    def silent(name: str, child: Layer) -> Layer:
        def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
                  train: bool = False, **side: Any) -> tuple[Any, State]:
            return call(name, child, params, x, side), state

        return dataclasses.replace(
            child, apply=apply, planner=lambda x, side: child.plan(x, **side))

    return layer.rebuilt({name: silent(name, child) for name, child in layer.children.items()})


def made_by(layer: Layer, *factories: str) -> bool:
    """Is the layer a call of one of these functions, such as "wiring.combinators.serial"?

    The kind alone may be that of a user's layer.
    """
    own = layer.factory
    return own is not None and f"{own.__module__}.{own.__qualname__}" in {
        f"diffprog.{name}" for name in factories}


def ending(layer: Layer) -> Layer:
    """The layer inside whose output is that of the net: the last of a `serial`, also in wrappers.
    """
    while True:
        if layer.wraps and layer.wraps.order == "once":
            layer = layer.wraps.layer
        elif made_by(layer, "wiring.combinators.serial") and layer.children:
            *_, layer = layer.children.values()
        else:
            return layer


# Factories of convolutions and pools with a window.
_WINDOWS = ("layers.spatial.conv.conv", "layers.spatial.conv.depthwise_conv",
            "layers.spatial.pool.max_pool", "layers.spatial.pool.avg_pool")
_TRANSPOSED = "layers.spatial.conv.conv_transpose"


def is_window(layer: Layer, *, transposed: bool = False) -> bool:
    """Is it a convolution or a pool with a window, or a transposed one, if these count?

    Also in wrappers, except in those that run it on other axes, as over time.
    """
    while layer.wraps and layer.wraps.order != "time":
        layer = layer.wraps.layer
    return made_by(layer, *_WINDOWS) or (transposed and made_by(layer, _TRANSPOSED))


def verify(net: Layer, params: Any, x: Any, *, state: Any = None, **side: Any) -> None:
    """Raise unless `params`, and `state` if given, fit the net on x in paths, shapes and dtypes.

    `apply` compares names only; this compares everything, by abstract evaluation.

    Args:
        net, params, x: a layer, its parameters, and an input or its shapes.
        state, side: its state, and the side inputs that it needs.

    Example:
        >>> net, x = dp.linear(3), jnp.ones((2, 4))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> dp.tree.verify(net, params, x)
    """
    if difference := net.plan(x, **side).difference(params, state):
        raise difference


def merge(
    net: Layer, params: Params, state: State | None = None, *, train: bool = False
) -> tuple[Params, State]:
    """The trees of the net without its reparametrizations: each leaf is computed once.

    For `lora` these are the parameters of the plain net after fine-tuning, for `ema` the averages,
    for `spectral_norm` the divided kernels. Use them wherever parameters are read outside the net.
    Gradients flow through.

    Args:
        net: a net with `reparam`, or a transformation made by it, somewhere in it.
        params, state: its trees; None for no state.
        train: as in training, where `ema` uses the parameters themselves.

    Returns:
        Parameters and state of the same net composed without them.

    Raises:
        LayerError: the net has none; parameters that were merged already.

    Example:
        >>> plain = dp.linear(3)
        >>> tuned = dp.lora(plain, rank=2)
        >>> params, state = tuned.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> merged, state = dp.tree.merge(tuned, params, state)
        >>> plain(merged, jnp.ones((2, 4))).shape
        (2, 3)
    """
    _check_found(net)
    return plain(net, params, state or {}, train)


def unmerge(
    net: Layer, params: Params, state: State | None = None, *, key: jax.Array
) -> tuple[Params, State]:
    """The inverse of `merge`: the trees of the net from those without reparametrizations.

    Fine-tuning starts from pretrained parameters this way.

    Args:
        net: as in `merge`.
        params, state: trees of the same net composed without reparametrizations.
        key: of random draws, such as the factors of `lora`.

    Raises:
        LayerError: as in `merge`; a leaf that is to be replaced is missing.

    Example:
        >>> plain, x = dp.linear(3), jnp.ones((2, 4))
        >>> pretrained, _ = plain.init(jax.random.key(0), x)
        >>> tuned = dp.lora(plain, rank=2)
        >>> params, state = dp.tree.unmerge(tuned, pretrained, key=jax.random.key(1))
        >>> bool(jnp.allclose(tuned(params, x), plain(pretrained, x)))
        True
    """
    _check_found(net)
    return _made(net, net.computed, "", 0, params, state or {}, key)


def trainable(net: Layer, params: Params) -> Params:
    """A tree of booleans, False for parameters that `freeze` and `lora` hold constant.

    `make_step` passes exactly the others to the optimizer, so that no weight decay moves frozen
    parameters and no memory is spent on their moments. In a training loop of your own,
    ``optax.multi_transform({True: optimizer, False: optax.set_to_zero()}, mask)`` does.

    Args:
        net: any net.
        params: its parameters, or their shapes.

    Example:
        >>> net = dp.lora(dp.linear(3), rank=2)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> dp.tree.trainable(net, params)
        {'bias': True, 'kernel': {'base': False, 'down': True, 'up': True}}
    """
    trained = jax.tree.map(lambda leaf: True, params)
    for path, own, *_ in _replaced(net, net.computed, params):
        tree = part_at(trained, path)
        trained = put(trained, path, jax.tree.map(
            lambda free, held: free and not held, tree, own.held(tree)))
    return trained


def freezes(net: Layer) -> bool:
    """Does the net have frozen parameters?"""
    inside = any(map(freezes, net.children.values()))
    return inside or any(own.constant for own in net.computed if isinstance(own, Computed))


def idle(net: Layer, params: Params) -> list[str]:
    """The paths of trained leaves without a gradient at inference, such as averages."""
    return [path for path, own, one, train in _replaced(net, net.computed, params)
            if own.carry and not train and not own.moves(one)]


def statistics(layer: Layer, state: State, train: bool) -> State:
    """The part of a state that depends on the inputs in this mode, and not only on parameters."""
    carried = {own.mark for own in layer.computed if isinstance(own, (Computed, Expanded))}
    train = mode(layer.computed, train)
    found = {name: part for name, part in state.items()
             if train and name not in carried | layer.children.keys()}
    for name, child in layer.children.items():
        found = put(found, name, statistics(child, state.get(name, {}), train))
    return found


def mode(computed: Sequence[Own], train: bool) -> bool:
    """The mode inside these marks, with `train` around them; the innermost pin wins."""
    return next((own.train for own in reversed(computed) if isinstance(own, Pinned)), train)


def trained(net: Layer, params: Params) -> tuple[Params, Callable[[Params], Params]]:
    """The trained parameters only, and the function that puts them back among the others."""
    if not freezes(net):
        return params, lambda part: part
    free, whole = trainable(net, params), jax.tree.structure(params)
    part: Params = {}
    for path, leaf in paths(params).items():
        if paths(free)[path]:
            part = put(part, path, leaf)
    if not part:
        raise LayerError("a net with something to train", f"{net!r}, which is frozen",
                         "freeze less of it: exclude= names what trains")
    return part, lambda part: whole.unflatten(
        [paths(part).get(path, leaf) for path, leaf in paths(params).items()])


def check_moves(net: Layer, params: Params, remedy: str) -> None:
    """Raise if trained parameters have no gradient at inference."""
    if still := idle(net, params):
        raise LayerError("parameters that have a gradient at inference",
                         f"averages in place of {listed(still)}", remedy)


def plain(
    layer: Layer, params: Params, state: State, train: bool = False
) -> tuple[Params, State]:
    """The trees of a layer without its reparametrizations; unchanged if it has none."""
    return _plain(layer, layer.computed, 0, params, state, train)


def _plain(
    layer: Layer, computed: Sequence[Own], above: int, params: Params,
    state: State, train: bool,
) -> tuple[Params, State]:
    """`plain` of a layer with these marks left, the outermost first."""
    if not computes(layer, computed):
        return params, state
    if computed:
        own, *inner = computed
        if isinstance(own, Pinned):
            return _plain(layer, inner, above, params, state, own.train)
        if isinstance(own, Mapped):
            return _plain(layer, inner, above, params, state, train)
        if isinstance(own, WrittenOut):
            copies, states = _plain(layer, inner, above, params, state, train)
            return _stacked(copies), _stacked(states)
        if isinstance(own, Expanded):
            origin = state.get("origin", {})
            rest = {name: part for name, part in state.items() if name != "origin"}
            begin, way, rest = jax.jvp(
                lambda params: _plain(layer, inner, above, params, rest, train), (origin,),
                (jax.tree.map(jnp.subtract, params, origin),), has_aux=True)
            return jax.tree.map(jnp.add, begin, way), {**rest, "origin": begin}
        stacks = _stacks(layer, above)
        return _plain(layer, inner, above, *own.plain(params, state, stacks, train)[:2], train)
    for name, child in layer.children.items():
        if own := params.get(name):
            below, rest = _plain(child, child.computed, above + layer.stacks, own,
                                 state.get(name, {}), train)
            params, state = {**params, name: below}, put(state, name, rest)
    return params, state


def _made(
    layer: Layer, computed: Sequence[Own], at: str, above: int, params: Params,
    state: State, key: jax.Array,
) -> tuple[Params, State]:
    """`unmerge` of a layer at a path, with these marks left; the innermost is made first."""
    if not computes(layer, computed):
        return params, state
    if computed:
        own, *inner = computed
        make = lambda params, state: _made(  # noqa: E731
            layer, inner, at, above, params, state, key)
        if isinstance(own, Expanded):
            rest = {name: part for name, part in state.items() if name != "origin"}
            origin, state = make(state.get("origin", {}), rest)
            return make(params, rest)[0], {**state, "origin": origin}
        params, state = make(params, state)
        if isinstance(own, Computed):
            params, state = own.made(fold(key, at), params, state, _stacks(layer, above))
        return params, state
    for name, child in layer.children.items():
        below, rest = _made(child, child.computed, joined(at, name), above + layer.stacks,
                            params.get(name, {}), state.get(name, {}), key)
        params, state = put(params, name, below), put(state, name, rest)
    return params, state


def computes(layer: Layer, computed: Sequence[Own]) -> bool:
    """Are parameters computed in a layer with these marks left?"""
    inside = any(computes(child, child.computed) for child in layer.children.values())
    return inside or any(isinstance(own, (Computed, WrittenOut)) for own in computed)


def _stacks(layer: Layer, above: int) -> Callable[[str], int]:
    """The number of axes of copies of the leaf at a path, `above` of them from around the layer."""
    return lambda path: above + stacks_at(layer, path)


def reader(
    children: Mapping[str, Layer], params: Params, state: State, train: bool = False
) -> Callable[[str], Params]:
    """A function that returns the plain parameters of a child by its name."""
    return lambda name: cast(plain(
        children[name], params.get(name, {}), state.get(name, {}), train)[0], children[name].dtype)


def stacks_at(layer: Layer, path: str) -> int:
    """The number of leading axes of copies of the leaf at a path of a layer's trees."""
    name, _, rest = path.partition("/")
    below = layer.children.get(name)
    return layer.stacks + (stacks_at(below, rest) if below else 0)


def _replaced(
    layer: Layer, computed: Sequence[Own], params: Params, at: str = "", above: int = 0,
    train: bool = False,
) -> Iterator[tuple[str, Computed, Any, bool]]:
    """The path of each small tree, its mark, the shapes of one copy, and its mode at inference.

    Outer ones come first; `computed` are the marks left of the layer at a path.
    """
    if not computes(layer, computed):
        return
    if computed:
        own, *inner = computed
        if isinstance(own, Pinned):
            train = own.train
        if isinstance(own, Mapped):
            params = {**params, "target": _written(params.get("target", {}))}
        if isinstance(own, Computed):
            stacks = _stacks(layer, above)
            for path in own.found(params, stacks):
                yield joined(at, path), own, one_copy(part_at(params, path), stacks(path)), train
            params = jax.eval_shape(lambda params: own.leaves(params, stacks), spec(params))
        yield from _replaced(layer, inner, params, at, above, train)
        return
    for name, child in layer.children.items():
        yield from _replaced(child, child.computed, params.get(name, {}), joined(at, name),
                             above + layer.stacks, train)


def _written(maps: Params) -> Params:
    """The shapes of the leaves that `hyper` makes for its target: the biases of its maps."""
    is_map = lambda part: isinstance(part, dict) and part.keys() == {"kernel", "bias"} and (  # noqa: E731
        not any(isinstance(a, dict) for a in part.values()))
    return jax.tree.map(lambda part: part["bias"] if is_map(part) else part, maps, is_leaf=is_map)


def _check_found(net: Layer) -> None:
    if not computes(net, net.computed):
        raise LayerError("a net with computed parameters", repr(net), "pass the net made by "
                         "reparam, lora or the like: parameters of other nets are plain already")


def _stacked(copies: dict[str, Any]) -> dict[str, Any]:
    """The trees of copies, stacked on a new first axis."""
    return jax.tree.map(lambda *each: jnp.stack(each), *copies.values()) if copies else {}
