"""Wiring: layers in sequence, around, and side by side; each a program of a few lines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_names
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.core.notation import show
from diffprog.core.plans import spec
from diffprog.wiring.children import Children, numbered
from diffprog.wiring.program import wire

__all__ = ["branch", "parallel", "residual", "serial"]


@factory
def serial(*layers: Any, **named: Any) -> Layer:
    """One after the other: ``y = f_n(... f_2(f_1(x)))``; also written ``f_1 >> f_2``.

    Unnamed layers are named by kind and count, ``linear_0``, ``linear_1``; layers without
    parameters count apart, so that inserting an activation renames nothing. A layer in two places
    has separate parameters in each.

    Args:
        layers: layers and plain functions, unnamed.
        named: more layers after these, with explicit names.

    Raises:
        LayerError: an argument is no layer; two children have one name.

    Example:
        >>> net = dp.serial(dp.linear(8), jax.nn.relu, head=dp.linear(3))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(params)
        ['head', 'linear_0']
    """

    def flow(children: Children, x: Any) -> Any:
        for child in children:
            x = child(x)
        return x

    return _several(serial, flow, layers, named)


@factory
def branch(*layers: Any, merge: Callable[[Any], Any] | None = None, **named: Any) -> Layer:
    """Several layers on the same input: ``y = merge((f_1(x), ..., f_n(x)))``; or the tuple.

    Args:
        layers, named: as in `serial`.
        merge: a function of the tuple of results, such as `concatenate` or `add`.

    Example:
        >>> net = dp.branch(dp.linear(2), jax.nn.relu, merge=dp.concatenate)
        >>> net.plan(jax.ShapeDtypeStruct((5, 3), jnp.float32)).y.shape
        (5, 5)
    """

    def spread(children: Children, x: Any) -> Any:
        y = tuple(child(x) for child in children)
        return merge(y) if merge else y

    return _several(branch, spread, layers, named, merge=merge)


@factory
def parallel(*layers: Any, **named: Any) -> Layer:
    """Several layers, each on its input: ``(y_1, ..., y_n) = (f_1(x_1), ..., f_n(x_n))``.

    Args:
        layers, named: as in `serial`.

    Raises:
        LayerError: at ``init``, if x is no tuple with one part for each layer.

    Example:
        >>> net = dp.parallel(dp.linear(2), jax.nn.relu) >> dp.concatenate
        >>> net.plan((jnp.ones((5, 3)), jnp.ones((5, 4)))).y.shape
        (5, 6)
    """

    def each(children: Children, x: Any) -> Any:
        if not isinstance(x, (tuple, list)) or len(x) != len(children):
            raise LayerError(f"a tuple of {len(children)} inputs, one for each layer", show(x),
                             "give each layer its part, or use branch for one input")
        return tuple(child(part) for child, part in zip(children, x, strict=True))

    return _several(parallel, each, layers, named)


@factory
def residual(body: Any, shortcut: Any = None) -> Layer:
    """A residual sum: ``y = shortcut(x) + body(x)``.

    Args:
        body: a layer whose output has the shape of x, or of ``shortcut(x)``.
        shortcut: a layer for the other summand, such as a 1x1 convolution; the identity if None.

    Raises:
        LayerError: at ``init``, if the two shapes or dtypes differ; nothing is broadcast.

    Example:
        >>> net = dp.residual(dp.serial(dp.linear(4), jax.nn.relu))
        >>> net.plan(jnp.ones((2, 4))).y.shape
        (2, 4)

    Source: He, Zhang, Ren, Sun 2015, arXiv:1512.03385, eq. 1 and 2.
    """

    def add_up(layers: Children, x: Any) -> Any:
        y = layers.body(x)
        x = x if shortcut is None else layers.shortcut(x)
        if spec(x) != spec(y):
            other = "x" if shortcut is None else "the shortcut"
            raise LayerError(f"a body that keeps the shape of {other}, {show(x)}", show(y),
                             "give it as many features, or a shortcut of the same shape")
        return jax.tree.map(jnp.add, x, y)

    ways = {"body": body} if shortcut is None else {"body": body, "shortcut": shortcut}
    return wire(add_up, ways, name="residual", rebuild=lambda new: residual(**new))


def _several(
    made_by: Callable[..., Layer], function: Callable[..., Any], layers: tuple[Any, ...],
    named: Mapping[str, Any], **options: Any,
) -> Layer:
    """Wire unnamed and named layers with `function`, described as a call of `made_by`."""
    check_names(named)
    children = numbered(map(as_layer, layers))
    if doubled := children.keys() & named.keys():
        raise LayerError("children of different names", f"{show(sorted(doubled)[0])} twice",
                         "choose another name: unnamed layers are named by kind and count")
    unnamed = tuple(children)

    def build(children: Mapping[str, Any]) -> Layer:
        layer = wire(function, children, name=made_by.__name__, rebuild=build)
        layers = tuple(layer.children[name] for name in unnamed)
        named = {name: layer.children[name] for name in children if name not in unnamed}
        return layer.described(made_by, {"layers": layers, "named": named, **options})

    return build({**children, **named})


class _Chain(Layer):
    """``f >> g``, composed on first use, and a plain layer from then on.

    So a chain of n links is composed once, not n times.
    """

    def __getattribute__(self, name: str) -> Any:
        made = serial(*_links(self))
        fields = object.__getattribute__(self, "__dict__")
        fields.pop("pair", None)
        fields.update(vars(made))
        object.__setattr__(self, "__class__", Layer)
        return getattr(self, name)


def _chain(f: Any, g: Any) -> Layer:
    chain = object.__new__(_Chain)
    pair = tuple(f if type(f) is _Chain else as_layer(f) for f in (f, g))
    object.__setattr__(chain, "pair", pair)
    return chain


def _links(chain: Layer) -> list[Layer]:
    """The layers of a chain: unnamed serials are flattened, so that grouping does not matter."""
    links: list[Layer] = []
    waiting = [chain]
    while waiting:
        f = waiting.pop()
        if type(f) is _Chain:
            waiting += reversed(object.__getattribute__(f, "__dict__")["pair"])
        elif f.factory is inspect.unwrap(serial) and not f.settings["named"]:
            links += f.settings["layers"]
        else:
            links.append(f)
    return links


Layer.chain, Layer.serial = staticmethod(_chain), staticmethod(serial)
