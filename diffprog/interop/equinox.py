"""Modules of Equinox: trees of arrays and static fields, written for one example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from diffprog.core.dtypes import is_inexact
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.plans import Params, State
from diffprog.interop.foreign import foreign, library, named, plain, unnamed

__all__ = ["from_equinox"]


def from_equinox(
    make: Callable[[jax.Array], Any], *, random: bool = False, axis_name: str | None = "batch"
) -> Layer:
    """An Equinox module, mapped over the batch axis: ``y = jax.vmap(module)(x)``.

    Its floating-point arrays are parameters, named by attribute path. Integer and boolean arrays
    are state, and so are the arrays of an `eqx.nn.State`; a module with such a state is called as
    ``module(x, state)`` and returns ``(y, state)``. It is in inference mode if train=False.

    Args:
        make: ``(key) -> module``, or ``(key) -> (module, state)`` such as
            ``eqx.nn.make_with_state(Model)``; each `init` calls it.
        random: whether the module takes a ``key``; each example then receives its own.
        axis_name: of the `jax.vmap` over the first axis of x, as `eqx.nn.BatchNorm` needs it; None
            calls the module once, on the whole batch.

    Raises:
        LayerError: a module is passed instead of a function.

    Example:
        >>> import equinox as eqx
        >>> net = dp.interop.from_equinox(lambda key: eqx.nn.Linear(4, 3, key=key))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(params), net(params, jnp.ones((2, 4))).shape
        (['bias', 'weight'], (2, 3))
    """
    eqx = library("equinox")
    made = make
    if not isinstance(make, eqx.Module):
        made = eqx.filter_eval_shape(lambda: make(jax.random.key(0)))
    module, kept = made if isinstance(made, tuple) else (made, None)
    if made is make or not isinstance(module, eqx.Module):
        raise LayerError("a function from a key to a module of Equinox",
                         f"{'' if made is make else 'one that returns '}{type(made).__name__}",
                         "write lambda key: Model(key=key), so that init can draw parameters")
    trees = _Trees(eqx, module, kept)

    def draw(key: jax.Array, x: Any) -> tuple[Params, State]:
        made = make(key)
        return trees.to_dicts(*(made if isinstance(made, tuple) else (made, None)))

    def apply(params: Params, state: State, x: Any, key: Any, train: bool) -> tuple[Any, State]:
        whole, values = trees.from_dicts(params, state)
        net = eqx.nn.inference_mode(whole, value=not train)

        def one(x: Any, key: Any) -> Any:
            given = {"key": key} if random else {}
            if kept is None:
                return net(x, **given), None
            return net(x, trees.kept_state(values), **given)

        if axis_name is not None:
            if random and key is not None:
                batch = jax.tree.leaves(x)[0].shape[0]
                key = jax.random.split(key, batch)
            one = jax.vmap(one, out_axes=(0, None), axis_name=axis_name)
        y, after = one(x, key if random else None)
        if after is None:
            return y, state
        return y, trees.to_dicts(whole, after)[1]

    layer = foreign("equinox", draw, apply, random=random)
    return layer.described(from_equinox, {"make": make, "random": random, "axis_name": axis_name})


class _Trees:
    """The trees of a module and of its `eqx.nn.State` as nested dicts, and back.

    Args:
        eqx: the module `equinox`.
        module, kept: module and state (or None) with shapes in place of arrays.
    """

    def __init__(self, eqx: Any, module: Any, kept: Any) -> None:
        self.eqx, self.kept = eqx, kept
        self.params, self.state, self.static = self._split(module, kept)
        # An `eqx.nn.State` holds its arrays by marker; the module has an index for each marker.
        leaves = jax.tree_util.tree_leaves_with_path(module, is_leaf=self._is_index)
        self.places = {leaf.marker: plain(path) for path, leaf in leaves if self._is_index(leaf)}

    def to_dicts(self, module: Any, kept: Any) -> tuple[Params, State]:
        """Parameters and state by name."""
        params, state, _ = self._split(module, kept)
        return named(params), named(state, self._names)

    def from_dicts(self, params: Params, state: State) -> tuple[Any, dict[Any, Any]]:
        """The module, and the arrays of its `eqx.nn.State` by marker."""
        arrays, values = unnamed(state, self.state, self._names)
        return self.eqx.combine(unnamed(params, self.params), arrays, self.static), values

    def kept_state(self, values: dict[Any, Any]) -> Any:
        """The `eqx.nn.State` of arrays by marker."""
        return type(self.kept).tree_unflatten(tuple(values), values.values())

    def _split(self, module: Any, kept: Any) -> tuple[Any, tuple[Any, dict[Any, Any]], Any]:
        """Parameters, (other arrays, arrays of the state by marker), and static fields."""
        params, others = self.eqx.partition(module, is_inexact)
        arrays, static = self.eqx.partition(others, _is_array)
        values = {}
        if kept is not None:
            leaves, markers = kept.tree_flatten()
            values = dict(zip(markers, leaves, strict=True))
        return params, (arrays, values), static

    def _names(self, path: Any) -> tuple[str, ...]:
        """Names in the pair (other arrays, arrays by marker); a marker has those of its index."""
        part, *entries = path
        if part.idx == 0:
            return plain(entries)
        return self.places[entries[0].key] + plain(entries[1:])

    def _is_index(self, leaf: Any) -> bool:
        return isinstance(leaf, self.eqx.nn.StateIndex)


def _is_array(leaf: Any) -> bool:
    """Is it an array, or the shape of one?"""
    return hasattr(leaf, "dtype")
