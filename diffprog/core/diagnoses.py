"""Why a user's layer failed, if its exception says little: a second evaluation finds the cause.

All of this runs only after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diffprog.core.errors import LayerError
from diffprog.core.records import Record


def of_plan(
    layer: Record, init: Callable[..., Any], apply: Callable[..., Any], x: Any,
    side: Mapping[str, Any],
) -> LayerError | None:
    """Why a pair fails on shapes: init computes with x, or apply needs a key."""
    own = _evaluated(lambda key: init(key, x, **side), _key())
    if own is None:
        return of_init(layer, init, x, side)
    params, state = own
    return of_apply(layer, apply, params, state, x, side, key=None, train=False)


def of_init(
    layer: Record, init: Callable[..., Any], x: Any, side: Mapping[str, Any]
) -> LayerError | None:
    """Why an init fails on shapes, if it works on arrays."""
    zeros = lambda: jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), x)  # noqa: E731
    if layer.children or not (
            _evaluated(lambda key, x: init(key, x, **side), _key(), x)
            or _evaluated(lambda key: init(key, zeros(), **side), _key())):
        return None
    return LayerError(
        "an init that reads shapes and dtypes of x alone", "one that computes with x",
        "set data-dependent parameters after init, as in params | {'scale': 1 / x.std(0)}: inside "
        "a net, tap shows the input of a layer")


def of_apply(
    layer: Record, apply: Callable[..., Any], params: Any, state: Any, x: Any,
    side: Mapping[str, Any], *, key: Any, train: bool,
) -> LayerError | None:
    """Why a call without a key fails, if one with a key works."""
    given = params, state, x, dict(side)
    run = lambda key, given: apply(*given[:3], key=key, train=train, **given[3])  # noqa: E731
    if layer.children or key is not None or _evaluated(run, None, given):
        return None
    if layer.start and not state:
        start = layer.start
        carry = _evaluated(lambda given: start(*given[:3], length=1, **given[3]), given)
        if carry and _evaluated(run, None, (params, carry, x, dict(side))):
            return LayerError("an apply that also runs without a carry",
                              "one that reads it from {}",
                              "begin it with carry = state or start(params, state, x, length=1), "
                              "and return the given state if it is empty")
    if not _evaluated(run, _key(), given):
        return None
    if not layer.random:
        return LayerError("a layer that is declared random", "random=False",
                          "pass Layer(init, apply, random=True): no other layer gets a key")
    return LayerError("a layer that needs no key at inference", "one that draws without a key",
                      "return the output without noise, or its mean, if key is None")


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _evaluated(f: Callable[..., Any], *given: Any) -> Any:
    """The shapes of what a function gives; None if it raises anything."""
    try:
        return jax.eval_shape(f, *given)
    except Exception:
        return None
