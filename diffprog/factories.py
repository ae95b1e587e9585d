"""A layer shows the call that made it: in its `repr`, in errors, in summaries."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec

from diffprog import notation
from diffprog.arguments import plain_numbers
from diffprog.errors import LayerError, signed
from diffprog.notation import listed

if TYPE_CHECKING:
    from diffprog.layer import Layer

P = ParamSpec("P")


def factory(function: Callable[P, Layer]) -> Callable[P, Layer]:
    """Let the layers that `function` makes show the call that made them, in `repr` and errors."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Layer:
        bound = _given(function, signature, args, kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            bound.arguments[name] = plain_numbers(value)
        with signed(lambda: notation.call(function, bound.arguments)):
            return described(function(*bound.args, **bound.kwargs), function, bound.arguments)

    return make


def _given(
    function: Callable[..., Any], signature: inspect.Signature, args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> inspect.BoundArguments:
    """The arguments by name; what does not fit is told with what may have been meant."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        from diffprog.synonyms import arguments  # it serves errors alone

        name, parameters = function.__name__, signature.parameters
        star = next((p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY), None)
        takes = ", ".join(f"*, {p}" if p == star else p for p in parameters)
        remedy = arguments(name, parameters, args, kwargs)
        raise TypeError(f"{name}, which takes {takes}: {error}"
                        + (f"; {remedy}" if remedy else "")) from None


def known(function: Callable[P, Layer]) -> Callable[P, Layer]:
    """Let the layers that `function` makes be known by that call, by which they are pickled.

    They show what they are made of, as a model of many layers does.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Layer:
        given = _given(function, signature, tuple(map(plain_numbers, args)), {
            name: plain_numbers(value) for name, value in kwargs.items()})
        layer = function(*given.args, **given.kwargs)
        given.apply_defaults()
        return dataclasses.replace(layer, _call=bound(function, given.arguments), _made={})

    return make


def bound(function: Callable[..., Any], settings: Mapping[str, Any]) -> functools.partial[Any]:
    """The call of a function with these arguments, by name where they need not be in order."""
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


def described(layer: Layer, function: Callable[..., Layer], settings: Mapping[str, Any]) -> Layer:
    """The layer with the call ``function(**settings)`` as its description."""
    name = function.__name__ if layer.name == "layer" else layer.name
    made_by = inspect.unwrap(function)
    return dataclasses.replace(
        layer, name=name, factory=made_by, settings=settings, _made={}, _call=None)


def around(layer: Layer, again: Callable[[Layer], Layer]) -> dict[str, Any]:
    """The fields by which a wrapper is made again: `again` wraps a layer as this one was wrapped.
    """
    return {"rebuild": lambda children: again(rebuilt(layer, children)),
            "within": lambda f: again(f(layer))}


def computing(layer: Layer, again: Callable[[Layer], Layer]) -> dict[str, Any]:
    """`around` for a wrapper that computes the parameters of the layer; it shows views of children.
    """
    return {**around(layer, again),
            "children": {name: view(child) for name, child in layer.children.items()}}


def view(layer: Layer) -> Layer:
    """The layer to be looked at, as one shows it that computes its parameters."""
    children = {name: view(child) for name, child in layer.children.items()}
    return dataclasses.replace(layer, lent=layer.lent or layer, children=children)


def rebuilt(layer: Layer, children: Mapping[str, Layer]) -> Layer:
    """The layer with other children; one whose children stay, or that has none, stays as it is."""
    children = {name: child.lent or child for name, child in children.items()}
    if layer.rebuild:
        return layer.rebuild(children)
    if changed := [name for name, child in layer.children.items() if children[name] is not child]:
        raise LayerError(f"rebuild, to make it anew with another {listed(changed)}", "none",
                         "pass rebuild=lambda children: ...: dataclasses.replace leaves it out "
                         "with other functions, unless it is given anew")
    return layer
