"""Surgery: a net with some of its layers exchanged or wrapped; all others stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffprog.core.errors import LayerError, signed
from diffprog.core.layer import Layer, as_layer
from diffprog.core.notation import code, listed
from diffprog.core.patterns import matches

__all__ = ["replace"]


def replace(net: Layer, pattern: str, f: Any) -> Layer:
    """The net with ``f(layer)`` in the place of each layer whose path matches.

    Names stay, so the parameters of every layer that was not replaced remain loadable. A match
    inside a match is replaced first.

    Args:
        net: a layer made of layers.
        pattern: of the paths of layers, in which ``*`` is one level and ``**`` any number.
        f: a function from the old layer to the new one, such as `remat`; or the new layer itself.

    Raises:
        LayerError: the pattern matches no layer, or `f` gives no layer; a layer around a match has
            no `rebuild`.

    Example:
        >>> net = dp.serial(body=dp.linear(8) >> jax.nn.relu, head=dp.linear(10))
        >>> dp.replace(net, "head", dp.linear(3))
        serial(body=serial(linear(8), jax.nn.relu), head=linear(3))
        >>> dp.replace(net, "**/relu~*", lambda relu: dp.gelu)
        serial(body=serial(linear(8), gelu), head=linear(10))
    """

    def new(path: str, old: Layer) -> Layer:
        with signed(old.__repr__, name=path):
            try:
                return as_layer(f if isinstance(f, Layer) else f(old))
            except TypeError as error:
                raise LayerError(
                    "a function from a layer to a layer", f"{code(f)}, which takes none",
                    "write lambda old: jax.nn.gelu for an activation") from error

    return edited(net, pattern, new)


def edited(net: Layer, pattern: str, new: Callable[[str, Layer], Layer]) -> Layer:
    """The net with ``new(path, layer)`` for each layer in it whose path matches."""
    seen: list[str] = []

    def edit(layer: Layer, path: str) -> Layer:
        children = {}
        inside = {name: as_layer(child) for name, child in layer.children.items()}
        for name, child in inside.items():
            below = f"{path}/{name}" if path else name
            seen.append(below)
            children[name] = edit(child, below)
            if matches(below, pattern):
                children[name] = new(below, children[name])
        same = all(children[name] is child for name, child in inside.items())
        with signed(layer.__repr__, name=path):
            return layer if same else layer.rebuilt(children)

    whole = edit(as_layer(net), "")
    if not any(matches(path, pattern) for path in seen):
        raise LayerError(f"a pattern that matches a layer ({listed(seen)})", repr(pattern),
                         "correct it: * is one level, ** any number")
    return whole
