"""The flow of activations and gradients through a net: do they vanish or explode with depth?

Each layer is followed by an identity whose backward pass receives the gradient of the loss with
respect to the layer's output. It returns the size of this gradient, and of the output, as the
"gradient" of three numbers added to the layer's parameters: so `repeat` and the other combinators
pass them in and out as any parameters, separately for each copy.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import held
from diffprog.core.computed import Expanded, Mapped
from diffprog.core.dtypes import is_float, norm
from diffprog.core.layer import Layer, around, as_layer
from diffprog.core.notation import clip
from diffprog.core.plans import Params, Plan, State
from diffprog.inspection.tables import table
from diffprog.training.objectives import Objective

__all__ = ["gradient_flow"]

_MARK = "#flow"  # the reserved name of the three numbers among the parameters


class Row(NamedTuple):
    """The sizes at one layer, each a root mean square over all entries.

    Attributes:
        path: of the layer; after a `repeat`, the copy in brackets.
        layer: the layer.
        activation: size of its output; None if the loss does not depend on it.
        gradient: size of the gradient of the loss with respect to its output.
        parameters: size of its parameters; None if it has none or is made of layers.
        parameter_gradient: size of the gradient with respect to its parameters, or None too.
    """

    path: str
    layer: Layer
    activation: float | None
    gradient: float
    parameters: float | None
    parameter_gradient: float | None

    def cells(self) -> tuple[str, ...]:
        """The row as text, with only the kind of a layer made of layers."""
        kind = self.layer.name if self.layer.children else clip(repr(self.layer), 60)
        return (self.path, kind, *("" if size is None else f"{size:.2e}" for size in self[2:]))


@dataclasses.dataclass(frozen=True)
class GradientFlow:
    """The rows of a net, in the order of the outputs of its layers; prints as a table.

    Attributes:
        rows: one for the net and for every layer in it, in each copy of a `repeat`.
    """

    rows: list[Row]

    def __str__(self) -> str:
        titles = ("path", "layer", "activation", "gradient", "parameters", "their gradient")
        lines = table([titles, *(row.cells() for row in self.rows)], left=2)
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def gradient_flow(
    net: Layer, objective: Objective, params: Params, batch: Any, *, state: State | None = None,
    key: jax.Array | None = None,
) -> GradientFlow:
    """Sizes of activations and gradients layer by layer: ``rms(y_i)`` and ``rms(dloss / dy_i)``.

    In a training step on this batch. If gradients shrink towards the first layers, a deep net is
    trained only at its end; residual sums and norms keep their size. Masked entries count as all
    others. Copies side by side (`heads`, `ensemble`) share a row, and several calls of one layer
    share one with their mean. A `linearize` has one row for all that is inside.

    Args:
        net: any layer.
        objective: as in `make_step`.
        params, state: of the net, initial or trained.
        batch: as the objective takes it.
        key: for random layers.

    Raises:
        LayerError: as the net and the objective do.

    Example:
        >>> net, x = dp.repeat(30, dp.linear(8) >> jax.nn.relu) >> dp.linear(2), jnp.ones((4, 8))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> batch = x, jnp.array([0, 1, 0, 1])
        >>> flow = dp.inspection.gradient_flow(net, dp.classification(), params, batch)
        >>> size = {row.path: row.gradient for row in flow.rows}
        >>> size["repeat_0[0]"] < 0.01 * size["repeat_0[29]"]
        True

    Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward
    neural networks", section 4.
    """
    order: dict[str, int] = {}
    watched = _watched(net, "", order)

    def loss(params: Params, state: State, batch: Any, key: Any) -> jax.Array:
        return objective(watched, params, state, batch, key=key, train=True)[0]

    felt = jax.jit(jax.grad(loss))(_with_marks(net, params, ()), state or {}, held(batch), key)
    trees = jax.device_get((params, felt))
    return GradientFlow(list(_rows(net, "", "", (), trees, order)))


def _watched(layer: Layer, path: str, order: dict[str, int]) -> Layer:
    """The layer with marks on it and inside; `order` numbers the outputs by calls."""
    children = {name: _watched(child, _join(path, name), order)
                for name, child in _children(layer).items()}
    whole = layer.rebuilt(children) if children else layer
    return _inmost(whole, lambda inner: _marked(
        inner, lambda: order.setdefault(path, len(order))))


def _inmost(layer: Layer, f: Callable[[Layer], Layer]) -> Layer:
    """f of a layer, or inside a `repeat`, of the repeated layer: each copy has a mark."""
    if not _is_repeat(layer):
        return f(layer)
    assert layer.within is not None
    return layer.within(lambda inner: _inmost(inner, f))


def _marked(layer: Layer, note: Callable[[], Any]) -> Layer:
    """The layer with the three numbers among its parameters; an output calls `note`."""

    def own(params: Params) -> Params:
        return {name: value for name, value in params.items() if name != _MARK}

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        params, state = layer.init(key, x, **side)
        return {**params, _MARK: jnp.zeros(3)}, state

    def planner(x: Any, side: dict[str, Any]) -> Plan:
        plan = layer.plan(x, **side)
        mark = jax.ShapeDtypeStruct((3,), jnp.float32)
        return dataclasses.replace(plan, params={**plan.params, _MARK: mark})

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        y, new = layer.apply(own(params), state, x, key=key, train=train, **side)
        leaves, structure = jax.tree.flatten(y)
        floats = [i for i, a in enumerate(leaves) if is_float(a)]
        if floats:
            note()
        for i, a in zip(floats, _felt([leaves[i] for i in floats], params[_MARK]), strict=True):
            leaves[i] = a
        return jax.tree.unflatten(structure, leaves), new

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        return layer.start(own(params), state, x, length=length, **side)

    return dataclasses.replace(
        layer, init=init, apply=apply, start=layer.start and start, planner=planner, bare=False,
        **around(layer, lambda layer: _marked(layer, note)))


@jax.custom_vjp
def _felt(y: list[jax.Array], mark: jax.Array) -> list[jax.Array]:
    """y; the gradient of `mark` is the size of y, the size of its gradient, and 1 per call."""
    return y


def _forward(y: list[jax.Array], mark: jax.Array) -> tuple[list[jax.Array], Any]:
    return y, (_size(y), mark)


def _backward(kept: Any, gradient: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    size, mark = kept
    return gradient, jnp.stack([size, _size(gradient), jnp.ones_like(size)]).astype(mark.dtype)


_felt.defvjp(_forward, _backward)


def _size(arrays: list[jax.Array]) -> jax.Array:
    """The root mean square of all entries."""
    return norm(a.astype(jnp.float32) for a in arrays) / max(sum(a.size for a in arrays), 1) ** 0.5


def _with_marks(layer: Layer, params: Params, shape: tuple[int, ...]) -> Params:
    """The parameters of a layer with the three numbers, in it and in all layers inside.

    `shape` is the shape of the copies around it.
    """
    inside = shape + tuple(n for _, n in _axes(layer))
    below = {name: _with_marks(child, params.get(name, {}), inside)
             for name, child in _children(layer).items()}
    return {**params, **below, _MARK: jnp.zeros((*shape, *_repeats(layer)[0], 3))}


def _rows(
    layer: Layer, path: str, shown: str, at: tuple[Any, ...], trees: tuple[Params, Params],
    order: dict[str, int],
) -> Iterator[Row]:
    """The rows of a layer and of all layers inside, in the order of the calls.

    `at` indexes the leading axes: the copy of everything around the layer.
    """
    (outer, core), children = _repeats(layer), _children(layer)
    for copy in itertools.product(*map(range, outer)):
        name = shown + "".join(f"[{i}]" for i in copy)
        for inner in itertools.product(*(range(n) if in_sequence else [slice(None)]
                                         for in_sequence, n in _axes(layer)[len(outer):])):
            within = name + "".join(f"[{i}]" for i in inner if isinstance(i, int))
            for part in sorted(children, key=lambda part: order.get(_join(path, part), -1)):
                yield from _rows(
                    children[part], _join(path, part), _join(within, part), (*at, *copy, *inner),
                    (trees[0].get(part, {}), trees[1][part]), order)
        if path in order:
            yield _row(name, core, (*at, *copy), trees)


def _row(path: str, layer: Layer, at: tuple[Any, ...], trees: tuple[Params, Params]) -> Row:
    own, felt = trees
    sizes = np.asarray(felt[_MARK], np.float64)[at].reshape(-1, 3)
    calls = max(sizes[:, 2].mean(), 1)
    activation, gradient = np.sqrt((sizes[:, :2] ** 2).mean(0)) / calls
    held: list[float | None] = [None, None]
    if own and not _children(layer):
        held = [float(_size([tree[at] for tree in jax.tree.leaves(trees)])) for trees in
                (own, {name: felt[name] for name in own})]
    return Row(path, layer, float(activation) if sizes[:, 2].any() else None, float(gradient),
               *held)


def _axes(layer: Layer) -> list[tuple[bool, int]]:
    """The leading axes of a layer's copies: do they run in sequence, and how many are they?"""
    found = []
    while wraps := layer.wraps:
        if wraps.order in ("depth", "width"):
            found.append((wraps.order == "depth", wraps.times))
        layer = wraps.layer
    return found


def _repeats(layer: Layer) -> tuple[list[int], Layer]:
    """The counts of each `repeat` with nothing but a `repeat` around it, and what they repeat."""
    counts = []
    while (wraps := layer.wraps) and wraps.order == "depth":
        counts.append(wraps.times)
        layer = wraps.layer
    return counts, layer


def _is_repeat(layer: Layer) -> bool:
    return layer.wraps is not None and layer.wraps.order == "depth"


def _children(layer: Layer) -> Mapping[str, Layer]:
    """The layers inside that have rows: none in `hyper`, which makes their parameters, and in
    `linearize`, which computes them at the origin."""
    elsewhere = any(isinstance(own, (Expanded, Mapped)) for own in layer.computed)
    known = layer.rebuild and not elsewhere
    return {name: as_layer(child) for name, child in layer.children.items()} if known else {}


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
