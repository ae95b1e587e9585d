"""Modules of `flax.nnx`: objects that hold their variables are made anew for every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.parameters import fold
from diffprog.core.plans import Params, State
from diffprog.interop.foreign import foreign, library, named, on_x, plain, unnamed

__all__ = ["from_nnx"]


def from_nnx(make: Callable[[Any], Any], *, call: Callable[..., Any] | None = None) -> Layer:
    """A `flax.nnx` module: ``y = nnx.merge(graph, params, state)(x)``.

    Every `nnx.Param` is a parameter and every other variable is state; the module is in its mode
    ``train()`` or ``eval()``. The layer is random if the module keeps a random stream: in every
    call each stream starts anew, from a key made of the call's key and of its place.

    Args:
        make: ``(rngs) -> module``; `init` calls it with ``nnx.Rngs(key)``, so that another key
            makes other parameters.
        call: ``(module, x, train) -> y``, how the module is called; ``module(x)`` if None.

    Raises:
        LayerError: a module in place of the function that makes it; a module that draws random
            numbers in eval() mode too.

    Example:
        >>> from flax import nnx
        >>> net = dp.interop.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(params), net(params, jnp.ones((2, 4))).shape
        (['bias', 'kernel'], (2, 3))
    """
    nnx = library("flax.nnx")
    run = call or on_x

    def split(net: Any) -> Any:
        return nnx.split(net, nnx.Param, nnx.RngState, ...)

    made = make if isinstance(make, nnx.Module) else nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    if made is make or not isinstance(made, nnx.Module):
        raise LayerError("a function of nnx.Rngs that makes a module of flax.nnx",
                         f"{'' if made is make else 'one that makes '}{type(made).__name__}",
                         "write lambda rngs: Model(rngs=rngs), so that init can draw")
    graph, like, streams, rest = split(made)
    random = bool(jax.tree.leaves(streams))

    def draw(key: jax.Array, x: Any) -> tuple[Params, State]:
        _, params, _, state = split(make(nnx.Rngs(key)))
        return named(params, _names), named(state, _names)

    def apply(params: Params, state: State, x: Any, key: Any, train: bool) -> tuple[Any, State]:
        begun = _begun(streams, key) if random else streams
        before = jax.tree.leaves(begun)  # the module counts in the streams that it is given
        net = nnx.merge(graph, unnamed(params, like, _names), begun, unnamed(state, rest, _names))
        net.train() if train else net.eval()
        y = run(net, x, train)
        _, _, ended, new = split(net)
        if random and key is None and _drawn(before, jax.tree.leaves(ended)):
            raise LayerError("a module that draws no random numbers at rest", "one that does",
                             "let it draw in train() mode alone: at rest no key need be given")
        return y, named(new, _names)

    layer = foreign("nnx", draw, apply, random=random)
    return layer.described(from_nnx, {"make": make, "call": call})


def _begun(streams: Any, key: jax.Array | None) -> Any:
    """The random streams of a module, each at its beginning, from a key of its own.

    Without a key they are there all the same, since the module is not whole without them.
    """
    given = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(given.dtype, jax.dtypes.prng_key):
        given = jax.random.wrap_key_data(given)  # as nnx keeps them

    def begin(path: Any, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        own = fold(given, "/".join(_names(path)))
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    return jax.tree_util.tree_map_with_path(begin, streams)


def _drawn(before: list[Any], after: list[Any]) -> bool:
    """Has a stream given a key? It counts them, and its count is then another array."""
    return any(a is not b for a, b in zip(before, after, strict=True))


def _names(path: Any) -> tuple[str, ...]:
    """The keys in an `nnx.State`, without the attribute of a variable in which its array is."""
    return plain(entry for entry in path if isinstance(entry, jax.tree_util.DictKey))
