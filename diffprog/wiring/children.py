"""The arguments of a program's function: its children, and the side inputs that it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from diffprog.core.errors import LayerError, signed
from diffprog.core.guards import trace, transformed
from diffprog.core.layer import Layer
from diffprog.core.notation import keyword_only, listed, name_of, show
from diffprog.core.plans import Params

_RESERVED = frozenset({"params", "state", "x", "key", "length"})


class Child:
    """A child as the program's function sees it: a function of x and side inputs.

    Side inputs that the program does not name are `routed` to it. ``visit(name, nth, x, side)``
    runs its nth call and returns the output, and the state and the key of the call; ``read(name)``
    returns its parameters. The layer itself checks the side inputs.
    """

    def __init__(
        self, name: str, layer: Layer, visit: Callable[..., Any], read: Callable[[str], Params],
        routed: Mapping[str, Any],
    ) -> None:
        self._name, self._layer, self._visit, self._read = name, layer, visit, read
        self._routed = {n: routed[n] for n in routed.keys() & layer.side}
        self._begun = trace()
        self.calls = 0  # so far

    def __call__(self, x: Any, *more: Any, **side: Any) -> Any:
        """The child's output on x."""
        if more:
            raise LayerError(f"one input, {self!r}(x)", show((x, *more)), "join inputs in a tuple: "
                             "side inputs go by name, params and state by themselves")
        nth, self.calls = self.calls, self.calls + 1
        with signed(self._layer.__repr__, x, self._name):
            y, state, key = self._visit(self._name, nth, x, self._routed | side)
            if (state or key is not None) and trace() != self._begun:
                raise transformed(state)
            return y

    def __repr__(self) -> str:
        return f"layers.{self._name}"

    @property
    def params(self) -> Params:
        """The child's parameters; call it before."""
        return self._read(self._name)


class Children:
    """The children of a program, by attribute, by name in brackets, or in order."""

    def __init__(self, children: dict[str, Child]) -> None:
        self._children = children

    def __getitem__(self, name: str) -> Child:
        if name not in self._children:
            raise LayerError(f"one of its children ({listed(self._children)})", f"layers.{name}",
                             "correct the name, or add the child")
        return self._children[name]

    def __getattr__(self, name: str) -> Child:
        if name.startswith("_"):
            raise AttributeError(name)  # Python looks up such names itself
        return self[name]

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children.values())

    def __len__(self) -> int:
        return len(self._children)


def numbered(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Unnamed layers, named by kind and count; layers that never have parameters count apart."""
    children: dict[str, Layer] = {}
    counts: dict[str, int] = {}
    for layer in layers:
        mark = f"{layer.name}{'~' if layer.bare else '_'}"
        children[f"{mark}{counts.setdefault(mark, 0)}"] = layer
        counts[mark] += 1
    return children


def slot_of(name: str, nth: int) -> str:
    """The key of the state of the nth call of a child: a stream belongs to the call."""
    return f"{name}@{nth}" if nth else name


def named_side(function: Callable[..., Any]) -> frozenset[str]:
    """The side inputs that a program's function names; raise for another signature."""
    parameters = inspect.signature(function).parameters.values()
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    behind = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(plain) != 2 or len(plain) + len(behind) != len(parameters):
        raise LayerError("a program f(layers, x, *, side inputs)",
                         f"{name_of(function)}{inspect.signature(function)}",
                         "put side inputs after the star")
    named = keyword_only(function)
    if taken := named & _RESERVED:
        raise LayerError(
            f"side inputs of other names than {listed(_RESERVED)}", listed(taken),
            "move the random part into a layer, Layer(..., random=True)" if "key" in taken else
            "rename them")
    return named - {"train"}
