"""Notation: arrays as dtype and shape, layers as the call that made them."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Modules in which a function is looked up, to be written as users do: `jax.nn.relu`, `gelu`.
_HOMES = (("jax.nn", "jax.nn."), ("jax.numpy", "jnp."), ("jax.lax", "jax.lax."),
          ("jax.nn.initializers", "jax.nn.initializers."), ("diffprog", ""))


def clip(text: str, most: int = 120) -> str:
    """The text, cut to `most` characters: a whole network would bury an error message."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def show(x: Any) -> str:
    """Dtypes and shapes of a pytree, ``float32[2,10]``; other values by their repr."""
    return clip(_shown(x))


def _shown(x: Any) -> str:
    if isinstance(x, dict):
        return f"{{{', '.join(f'{name}: {_shown(a)}' for name, a in x.items())}}}"
    if isinstance(x, (tuple, list)) and not all(isinstance(a, int) for a in x):
        left, right = "[]" if isinstance(x, list) else "()"
        return f"{left}{', '.join(map(_shown, x))}{right}"
    if not isinstance(x, (tuple, list)) and hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{getattr(x.dtype, 'name', x.dtype)}[{','.join(map(str, x.shape))}]"
    return repr(x)


def called(function: Any) -> Any:
    """The innermost function of a partial; any other function itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, of the function in a partial, or of the class of an object."""
    function = called(function)
    return getattr(function, "__name__", type(function).__name__).strip("<>_")


def listed(names: Iterable[Any]) -> str:
    """Sorted names, separated by commas; ``none`` if there are none."""
    return clip(", ".join(sorted(map(str, names))), 240) or "none"


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The call ``function(arguments)`` as code, without the arguments that equal their defaults."""
    parts = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = arguments[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts += map(code, value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            parts += keywords(value)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            parts.append(code(value))
        elif value is not parameter.default and (
                type(value) is not type(parameter.default) or value != parameter.default):
            parts += keywords({name: value})
    return f"{function.__name__}({', '.join(parts)})"


def keyword_only(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the keyword-only arguments, except those that a partial sets."""
    names = frozenset(p.name for p in inspect.signature(function).parameters.values()
                      if p.kind is p.KEYWORD_ONLY)
    while isinstance(function, functools.partial):
        names, function = names.difference(function.keywords), function.func
    return names


def keywords(arguments: Mapping[str, Any]) -> list[str]:
    """Each argument as ``name=value``."""
    return [f"{name}={code(value)}" for name, value in arguments.items()]


def code(value: Any) -> str:
    """A value as code: `jax.nn.relu`, ``(3, 3)``, ``<lambda file:line>``."""
    if isinstance(value, functools.partial):
        arguments = [*map(code, value.args), *keywords(value.keywords)]
        return f"functools.partial({', '.join([code(value.func), *arguments])})"
    if isinstance(value, tuple):
        return f"({', '.join(map(code, value))}{',' if len(value) == 1 else ''})"
    name = getattr(value, "__name__", None)
    if name is None or not callable(value):
        text = show(value) if hasattr(value, "shape") else repr(value)
        # An object without a repr of its own is written as its class.
        return f"<{type(value).__name__}>" if "\n" in text or " at 0x" in text else text
    for module, prefix in _HOMES:
        if vars(sys.modules.get(module, object)).get(name) is value:
            return prefix + name
    if name.isidentifier() and "<locals>" not in value.__qualname__:
        return name
    place = getattr(inspect.unwrap(value), "__code__", None)
    where = f" {os.path.basename(place.co_filename)}:{place.co_firstlineno}" if place else ""
    return f"<{name.strip('<>')}{where}>"
