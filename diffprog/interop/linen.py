"""Modules of `flax.linen`: their collections are parameters and state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import code, listed, show
from diffprog.core.parameters import fold
from diffprog.core.plans import Params, State
from diffprog.interop.foreign import foreign, kind, library, named, on_x

__all__ = ["from_linen"]


def from_linen(
    net: Any, *, call: Callable[..., Any] | None = None, streams: Sequence[str] = ()
) -> Layer:
    """A `flax.linen` module: ``y = module.apply({"params": params, **state}, x)``.

    The collection ``params`` becomes the parameters. Every other collection, such as
    ``batch_stats``, becomes state under its own name, updated whenever the module updates it.

    Args:
        net: a module, such as ``nn.Dense(3)``.
        call: ``(module, x, train) -> y``, the call in each mode, for example
            ``lambda net, x, train: net(x, deterministic=not train)``; required if the module takes
            more than x, since its flags have no common name. `init` calls it with train=False.
        streams: names of random streams, such as ``["dropout"]``; each receives its own key if the
            layer receives one.

    Raises:
        LayerError: `net` is not a module; a module that takes more than x without `call`;
            variables that are not nested dicts of arrays, such as those of `sow`.

    Example:
        >>> from flax import linen as nn
        >>> net = dp.serial(dp.linear(8), dp.interop.from_linen(nn.Dense(3)))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(params["linen_0"]), net(params, jnp.ones((2, 4))).shape
        (['bias', 'kernel'], (2, 3))
    """
    nn, unbox = library("flax.linen"), library("flax.core.meta").unbox
    if not isinstance(net, nn.Module):
        raise LayerError("a module of flax.linen", code(net), "call its class: nn.Dense(3)")
    run = call or _call_on_x(net)

    def draw(key: jax.Array, x: Any) -> tuple[Params, State]:
        rngs = {"params": key, **_keys(streams, key)}
        state = _in_dicts(unbox(net.init(rngs, x, method=lambda net, x: run(net, x, False))))
        return state.pop("params", {}), state

    def apply(params: Params, state: State, x: Any, key: Any, train: bool) -> tuple[Any, State]:
        y, new = net.apply(
            {"params": params, **state}, x, method=lambda net, x: run(net, x, train),
            rngs={} if key is None else _keys(streams, key), mutable=list(state))
        return y, _in_dicts(unbox(new))

    layer = foreign("linen", draw, apply, random=bool(streams))
    return layer.described(from_linen, {"net": kind(net), "call": call, "streams": streams})


def _keys(streams: Sequence[str], key: jax.Array) -> dict[str, jax.Array]:
    return {name: fold(key, name) for name in streams}


def _call_on_x(net: Any) -> Callable[..., Any]:
    """The call with x alone; raise if the module takes more."""
    _, *more = inspect.signature(net.__call__).parameters.values()
    if taken := [p.name for p in more if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
        raise LayerError("call= for a module that takes more than x",
                         f"{type(net).__name__}, which takes {listed(taken)}",
                         "pass call=lambda net, x, train: net(x, ...)")
    return on_x


def _in_dicts(variables: Any) -> dict[str, Any]:
    """The variables of a module; raise unless they are nested dicts of arrays."""
    dicts = named(variables)
    if jax.tree.structure(dicts) != jax.tree.structure(variables):
        raise LayerError("variables in nested dicts of arrays", show(variables),
                         "keep one array in each variable, and leave out sown values")
    return dicts
