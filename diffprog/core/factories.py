"""Factories: functions whose layers show the call that made them, in `repr` and errors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar

from diffprog.core import notation
from diffprog.core.arguments import plain_numbers
from diffprog.core.errors import signed

P = ParamSpec("P")
L = TypeVar("L", bound="Made")


class Made(Protocol):
    """A `Layer`, as far as factories need it."""

    def described(self, function: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
        """The layer, shown as the call."""
        ...

    def known_by(self, call: Callable[..., Any]) -> Any:
        """The layer, compared and pickled by the call."""
        ...


def factory(function: Callable[P, L]) -> Callable[P, L]:
    """Let the layers that `function` makes show the call that made them, in `repr` and errors."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> L:
        bound = _given(function, signature, args, kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            bound.arguments[name] = plain_numbers(value)
        with signed(lambda: notation.call(function, bound.arguments)):
            return function(*bound.args, **bound.kwargs).described(function, bound.arguments)

    return make


def _given(
    function: Callable[..., Any], signature: inspect.Signature, args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> inspect.BoundArguments:
    """The arguments by name; an argument that does not fit raises with a suggestion."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        from diffprog.core.synonyms import arguments  # needed for errors only

        name, parameters = function.__name__, signature.parameters
        star = next((p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY), None)
        takes = ", ".join(f"*, {p}" if p == star else p for p in parameters)
        remedy = arguments(name, parameters, args, kwargs)
        raise TypeError(f"{name}, which takes {takes}: {error}"
                        + (f"; {remedy}" if remedy else "")) from None


def known(function: Callable[P, L]) -> Callable[P, L]:
    """Let the layers that `function` makes be compared and pickled by the call that made them.

    Their `repr` shows their parts, as of a model of many layers.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> L:
        given = _given(function, signature, tuple(map(plain_numbers, args)), {
            name: plain_numbers(value) for name, value in kwargs.items()})
        layer = function(*given.args, **given.kwargs)
        given.apply_defaults()
        return layer.known_by(bound(function, given.arguments))

    return make


def bound(function: Callable[..., Any], settings: Mapping[str, Any]) -> functools.partial[Any]:
    """The call of a function with these arguments, by name if their order does not matter."""
    args: list[Any] = []
    keywords: dict[str, Any] = {}
    parameters = inspect.signature(function).parameters.values()
    ordered = {p.POSITIONAL_ONLY for p in parameters}
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        ordered |= {p.POSITIONAL_OR_KEYWORD for p in parameters}
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            args += settings[p.name]
        elif p.kind is p.VAR_KEYWORD:
            keywords |= settings[p.name]
        elif p.kind in ordered:
            args.append(settings[p.name])
        else:
            keywords[p.name] = settings[p.name]
    return functools.partial(function, *args, **keywords)
