"""Modules of Equinox: trees of arrays and much else, written for one example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.plans import Params, State
from diffprog.interop.foreign import foreign, library, named, plain, unnamed

__all__ = ["from_equinox"]


def from_equinox(
    make: Callable[[jax.Array], Any], *, random: bool = False, axis_name: str | None = "batch"
) -> Layer:
    """An Equinox module, mapped over the examples: ``y = jax.vmap(module)(x)``.

    Its arrays of floats are the parameters, under the attributes that lead to them. Its other
    arrays are state, and so is what it keeps in an `eqx.nn.State`; the module is then called by
    ``module(x, state)`` and gives ``(y, state)``. At rest it is in inference mode.

    Args:
        make: ``(key) -> module``, or ``(key) -> (module, state)`` such as
            ``eqx.nn.make_with_state(Model)``; every `init` calls it.
        random: does the module take a ``key``? Each example is then given one of its own.
        axis_name: of the first axis of x, that of the examples, over which the module is mapped;
            None calls it once, on x as it is.

    Raises:
        LayerError: a module in place of the function that makes it.

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
        raise LayerError("a function of a key that makes a module of Equinox",
                         f"{'' if made is make else 'one that makes '}{type(made).__name__}",
                         "write lambda key: Model(key=key), so that init can draw")

    def is_index(leaf: Any) -> bool:
        return isinstance(leaf, eqx.nn.StateIndex)

    def split(module: Any, kept: Any) -> Any:
        """The parameters, the other arrays with those kept under their markers, and the rest."""
        params, others = eqx.partition(module, lambda leaf: _is_array(leaf, jnp.inexact))
        arrays, static = eqx.partition(others, _is_array)
        markers, values = ((), ()) if kept is None else kept.tree_flatten()[::-1]
        return params, (arrays, dict(zip(markers, values, strict=True))), static

    leaves = jax.tree_util.tree_leaves_with_path(module, is_leaf=is_index)
    places = {leaf.marker: plain(path) for path, leaf in leaves if is_index(leaf)}

    def names(path: Any) -> tuple[str, ...]:
        """Of the pair (other arrays, those kept): a marker says where in the module it is."""
        part, *entries = path
        if part.idx == 0:
            return plain(entries)
        return places[entries[0].key] + plain(entries[1:])

    like, rest, static = split(module, kept)

    def draw(key: jax.Array, x: Any) -> tuple[Params, State]:
        made = make(key)
        params, others, _ = split(*made) if isinstance(made, tuple) else split(made, None)
        return named(params), named(others, names)

    def apply(params: Params, state: State, x: Any, key: Any, train: bool) -> tuple[Any, State]:
        arrays, values = unnamed(state, rest, names)
        whole = eqx.combine(unnamed(params, like), arrays, static)
        net = eqx.nn.inference_mode(whole, value=not train)

        def one(x: Any, key: Any) -> Any:
            given = {"key": key} if random else {}
            if kept is None:
                return net(x, **given), None
            return net(x, type(kept).tree_unflatten(tuple(values), values.values()), **given)

        if axis_name is not None:
            if random and key is not None:
                key = jax.random.split(key, jax.tree.leaves(x)[0].shape[0])
            one = jax.vmap(one, out_axes=(0, None), axis_name=axis_name)
        y, after = one(x, key if random else None)
        return y, state if after is None else named((arrays, split(whole, after)[1][1]), names)

    layer = foreign("equinox", draw, apply, random=random)
    return layer.described(from_equinox, {"make": make, "random": random, "axis_name": axis_name})


def _is_array(leaf: Any, kind: Any = None) -> bool:
    """Is it an array, or the shape of one; of this kind of dtype?"""
    return hasattr(leaf, "dtype") and (kind is None or jnp.issubdtype(leaf.dtype, kind))
