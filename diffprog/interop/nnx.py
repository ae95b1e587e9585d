"""Modules of `flax.nnx`: split into trees, and merged again in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.dtypes import is_key
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.parameters import fold
from diffprog.core.plans import Params, State
from diffprog.interop.foreign import foreign, library, named, on_x, plain, unnamed

__all__ = ["from_nnx"]


def from_nnx(make: Callable[[Any], Any], *, call: Callable[..., Any] | None = None) -> Layer:
    """A `flax.nnx` module: ``y = nnx.merge(graph, params, state)(x)``.

    Every `nnx.Param` is a parameter, every other variable is state. The module is called in
    ``train()`` or ``eval()`` mode. The layer is random if the module has a random stream: each call
    restarts every stream, from the key of the call folded with the path of the stream.

    Args:
        make: ``(rngs) -> module``; `init` calls it with ``nnx.Rngs(key)``.
        call: ``(module, x, train) -> y``, the call of the module; ``module(x)`` if None.

    Raises:
        LayerError: a module in place of `make`; a module that draws random numbers in eval() mode.

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
        raise LayerError("a function from nnx.Rngs to a module of flax.nnx",
                         f"{'' if made is make else 'one that returns '}{type(made).__name__}",
                         "write lambda rngs: Model(rngs=rngs), so that init can draw parameters")
    graph, like, streams, rest = split(made)
    random = bool(jax.tree.leaves(streams))

    def draw(key: jax.Array, x: Any) -> tuple[Params, State]:
        _, params, _, state = split(make(nnx.Rngs(key)))
        return named(params, _names), named(state, _names)

    def apply(params: Params, state: State, x: Any, key: Any, train: bool) -> tuple[Any, State]:
        fresh = _restarted(streams, key) if random else streams
        before = jax.tree.leaves(fresh)  # the module updates the counts in `fresh` in place
        net = nnx.merge(graph, unnamed(params, like, _names), fresh, unnamed(state, rest, _names))
        net.train() if train else net.eval()
        y = run(net, x, train)
        _, _, used, new = split(net)
        if random and key is None and _was_used(before, jax.tree.leaves(used)):
            raise LayerError("a module without random numbers in inference", "one that draws some",
                             "let it draw in train() mode alone: inference has no key")
        return y, named(new, _names)

    layer = foreign("nnx", draw, apply, random=random)
    return layer.described(from_nnx, {"make": make, "call": call})


def _restarted(streams: Any, key: jax.Array | None) -> Any:
    """The random streams of a module with count 0, each with its own key.

    Without a key they get a constant one, since a module cannot be merged without its streams.
    """
    base = jax.random.key(0) if key is None else key
    if not is_key(base):
        base = jax.random.wrap_key_data(base)  # nnx keeps typed keys

    def restart(path: Any, leaf: Any) -> Any:
        if not is_key(leaf):
            return jnp.zeros(leaf.shape, leaf.dtype)
        own = fold(base, "/".join(_names(path)))
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    return jax.tree_util.tree_map_with_path(restart, streams)


def _was_used(before: list[Any], after: list[Any]) -> bool:
    """Was a key drawn from a stream? Its count is another array then."""
    return any(a is not b for a, b in zip(before, after, strict=True))


def _names(path: Any) -> tuple[str, ...]:
    """The dict keys of a path in an `nnx.State`, without the attribute of the variable."""
    return plain(entry for entry in path if isinstance(entry, jax.tree_util.DictKey))
