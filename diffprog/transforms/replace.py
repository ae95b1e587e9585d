"""Model surgery: a net with some of its layers replaced or wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffprog.core.errors import LayerError, signed
from diffprog.core.layer import Layer, as_layer
from diffprog.core.notation import code, listed
from diffprog.core.patterns import matches

__all__ = ["replace"]


def replace(net: Layer, pattern: str, f: Any) -> Layer:
    """Replace each layer whose path matches by ``f(layer)``.

    Names stay, so that the parameters of all other layers remain loadable. A match inside another
    match is replaced first.

    Args:
        net: a layer made of layers.
        pattern: paths of layers; ``*`` matches one level and ``**`` any number of levels.
        f: a function from the old layer to the new one, such as `remat`; or the new layer itself.

    Raises:
        LayerError: the pattern matches no layer, `f` does not return a layer, or a layer around a
            match has no `rebuild`.

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
                    "a function from a layer to a layer", f"{code(f)}, which takes no layer",
                    "write lambda old: jax.nn.gelu for an activation") from error

    return edited(net, pattern, new)


def edited(net: Layer, pattern: str, new: Callable[[str, Layer], Layer]) -> Layer:
    """Replace each layer whose path matches by ``new(path, layer)``."""
    seen: list[str] = []

    def edit(layer: Layer, path: str) -> Layer:
        old = {name: as_layer(child) for name, child in layer.children.items()}
        children = {}
        for name, child in old.items():
            child_path = f"{path}/{name}" if path else name
            seen.append(child_path)
            children[name] = edit(child, child_path)
            if matches(child_path, pattern):
                children[name] = new(child_path, children[name])
        with signed(layer.__repr__, name=path):
            if all(children[name] is child for name, child in old.items()):
                return layer
            return layer.rebuilt(children)

    result = edit(as_layer(net), "")
    if not any(matches(path, pattern) for path in seen):
        raise LayerError(f"a pattern that matches a layer ({listed(seen)})", repr(pattern),
                         "correct it: * is one level, ** any number")
    return result
