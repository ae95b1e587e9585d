"""Modules of `flax.linen`: what they are given already is a tree of parameters and one of state."""

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

    The collection ``params`` is the parameters, and every other one that the module makes, such as
    ``batch_stats``, is state under its own name, which moves wherever the module moves it.

    Args:
        net: a module, such as ``nn.Dense(3)``.
        call: ``(module, x, train) -> y``, how it is called in each mode, for example
            ``lambda net, x, train: net(x, deterministic=not train)``; needed wherever the module
            takes more than x, since its flags have no common name. `init` calls it at rest.
        streams: the names of its random streams, such as ``["dropout"]``; each gets a key of its
            own wherever the layer is given one.

    Raises:
        LayerError: no module; one that takes more than x, without `call`; variables that are no
            nested dicts of arrays, as those that `sow` collects.

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
    run = call or _taking_x_alone(net)

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


def _taking_x_alone(net: Any) -> Callable[..., Any]:
    """How a module is called that takes nothing but x; others are refused."""
    _, *more = inspect.signature(net.__call__).parameters.values()
    if taken := [p.name for p in more if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
        raise LayerError("call=, of a module that takes more than x",
                         f"{type(net).__name__}, which takes {listed(taken)}",
                         "pass call=lambda net, x, train: net(x, ...)")
    return on_x


def _in_dicts(variables: Any) -> dict[str, Any]:
    """The variables of a module, refused where they are no nested dicts of arrays."""
    dicts = named(variables)
    if jax.tree.structure(dicts) != jax.tree.structure(variables):
        raise LayerError("variables in nested dicts of arrays", show(variables),
                         "keep one array in each variable, and leave out what is sown")
    return dicts
