"""What layers ask of their arguments and inputs, each demand in the same words everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from diffprog.errors import LayerError
from diffprog.notation import show

_FORBIDDEN = "/*@~#"  # they mean something in paths


def check_array(x: Any, rank: int = 0, axes: str = "", *, floating: bool = True) -> None:
    """Raise unless x is one array with at least `rank` axes, of floats unless told otherwise."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise LayerError("one array", show(x), "pick one part of it with a lambda")
    if len(x.shape) < rank:
        wanted = "at least 1 axis" if rank == 1 else f"at least {rank} axes"
        raise LayerError(f"{wanted} {axes}".rstrip(), show(x), "add the missing axes")
    if floating and not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError("floating-point input", show(x), "convert it: x.astype(jnp.float32)")


def check_features(wanted: int, x: Any) -> None:
    """Raise unless the last axis of x has the size that the parameters were made for."""
    if x.shape[-1] != wanted:
        raise LayerError(f"{_features(wanted)} on the last axis, as init saw", show(x),
                         "init anew on input of this shape, or mend the layer before")


def check_leaves(params: Any, features: int) -> None:
    """Raise unless every leaf has `features` on its last axis: a single one would broadcast."""
    if any(leaf.shape[-1] != features for leaf in params.values()):
        raise LayerError(f"params of {_features(features)}", show(params), "pass what init gave")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless `value` is a Python int of at least `least`."""
    wanted = f"{name} as an int of at least {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise LayerError(wanted, show(value), "pass a Python int")
    if value < least:
        raise LayerError(wanted, repr(value), f"pass {least} or more")


def check_share(name: str, value: Any) -> None:
    """Raise unless `value` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise LayerError(f"{name} in [0, 1)", repr(value), "pass a share, not a percentage")


def check_names(names: Iterable[str]) -> None:
    """Raise for a name that a path pattern could not tell from its own signs."""
    for name in names:
        if not name or name.startswith("_") or any(sign in name for sign in _FORBIDDEN):
            raise LayerError(f"a name without leading _ and {' '.join(_FORBIDDEN)}", repr(name),
                             "rename it: these signs mean something in paths")


def _features(count: int) -> str:
    return "1 feature" if count == 1 else f"{count} features"
