"""What the network of another library needs to be a layer: our names, our dtypes, one draw.

Such a network is told by two functions: ``draw(key, x)`` makes its parameters and its state, and
``call(params, state, x, key, train)`` gives its output and its new state, both in nested dicts.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_names
from diffprog.core.dtypes import cast, is_float, joint
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.core.plans import Params, State, blank, remember

Names = Callable[[Any], tuple[str, ...]]  # of one leaf, from its path as jax.tree_util gives it


def library(name: str) -> Any:
    """The module of another library; if it is not installed, an error that says what installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name and error.name.partition(".")[0] == name.partition(".")[0]:
            raise ImportError(f"diffprog.interop needs {name.partition('.')[0]} here: "
                              "pip install 'diffprog[interop]'") from error
        raise


def foreign(
    origin: str, draw: Callable[..., tuple[Params, State]], call: Callable[..., tuple[Any, State]],
    *, random: bool,
) -> Layer:
    """The layer of another library's network; `origin` is its kind, by which it is numbered.

    `draw` is jitted, so that what it computes beside the parameters is never run. Floats are
    stored in float32 (float64 if x is), whatever the library makes of them, and y is in the dtype
    of x, in which the parameters come to `call`.
    """

    @remember
    def drawing(x: Any, side: dict[str, Any]) -> Callable[[jax.Array], tuple[Params, State]]:
        stored = joint(_dtype(x) or jnp.float32, jnp.float32)
        return jax.jit(lambda key: cast(draw(key, blank(x)), stored))

    def init(key: jax.Array, x: Any) -> tuple[Params, State]:
        return drawing(x, {})(key)

    def apply(
        params: Params, state: State, x: Any, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Any, State]:
        y, new = call(cast(params, _dtype(x)), state, x, key, train)
        if jax.tree.structure(new) != jax.tree.structure(state):
            raise LayerError(f"a state that keeps its structure, {show(state)}", show(new),
                             "leave out what the module collects besides")
        new = jax.tree.map(
            lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype), new, state)
        return cast(y, _dtype(x)), new

    def start(params: Params, state: State, x: Any, *, length: int) -> State:
        raise LayerError("a layer that can stream", f"one of {origin}",
                         "write it by layers of diffprog: of this one it is not known whether it "
                         "mixes positions")

    return Layer(init, apply, start, name=origin, random=random)


def plain(path: Any) -> tuple[str, ...]:
    """The names along a path as they are: keys, attributes, and places in a sequence."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def named(tree: Any, names: Names = plain) -> dict[str, Any]:
    """The leaves of any tree in nested dicts under these names."""
    dicts: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        whole = names(path)
        check_names(name.lstrip("_") for name in whole)  # a leading _ means nothing in trees
        *levels, last = whole
        level = dicts
        for name in levels:
            level = level.setdefault(name, {}) if isinstance(level, dict) else None
        if not isinstance(level, dict) or last in level:
            raise LayerError("arrays of different names", f"several within {'/'.join(whole)}",
                             "rename one of them")
        level[last] = leaf
    return dicts


def unnamed(dicts: dict[str, Any], like: Any, names: Names = plain) -> Any:
    """The tree like `like` of which `named` has made these dicts."""

    def find(path: Any, _: Any) -> Any:
        found = dicts
        for name in names(path):
            found = found[name]
        return found

    return jax.tree_util.tree_map_with_path(find, like)


def on_x(net: Any, x: Any, train: bool) -> Any:
    """How a network is called that takes x alone."""
    return net(x)


def kind(net: Any) -> Any:
    """A network whose own `repr` takes many lines, to be shown by its class."""
    return _Shown(net)


@dataclasses.dataclass(frozen=True, repr=False)
class _Shown:
    net: Any

    def __repr__(self) -> str:
        return f"<{type(self.net).__name__}>"

    def __reduce__(self) -> Any:
        return _itself, (self.net,)


def _itself(net: Any) -> Any:
    return net


def _dtype(x: Any) -> Any:
    """The dtype of the floats in x; None if there are none."""
    floats = [a.dtype for a in jax.tree.leaves(x) if is_float(a)]
    return joint(*floats) if floats else None
