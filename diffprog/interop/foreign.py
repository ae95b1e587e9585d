"""The layer of another library's network: names of leaves, dtypes, initialization.

A network is described by two functions: ``draw(key, x)`` returns its parameters and its state, and
``call(params, state, x, key, train)`` returns its output and its new state. All trees are nested
dicts.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_names
from diffprog.core.dtypes import cast, float_dtype, joint
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.core.plans import Params, State, blank, remember

Names = Callable[[Any], tuple[str, ...]]  # path of a leaf in jax.tree_util -> names


def library(name: str) -> Any:
    """Import a library; the error names the extra that installs it."""
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
    """The layer of a network; `origin`, the name of its library, becomes the name of the layer.

    `draw` is jitted, so that XLA drops all that it computes besides the parameters. Floats are
    stored in float32, or in float64 if x is. `call` receives parameters in the dtype of x, and y
    has that dtype.
    """

    @remember
    def jitted_draw(x: Any, side: dict[str, Any]) -> Callable[[jax.Array], tuple[Params, State]]:
        stored = joint(float_dtype(x) or jnp.float32, jnp.float32)
        return jax.jit(lambda key: cast(draw(key, blank(x)), stored))

    def init(key: jax.Array, x: Any) -> tuple[Params, State]:
        return jitted_draw(x, {})(key)

    def apply(
        params: Params, state: State, x: Any, *, key: jax.Array | None = None, train: bool = False
    ) -> tuple[Any, State]:
        y, new = call(cast(params, float_dtype(x)), state, x, key, train)
        if jax.tree.structure(new) != jax.tree.structure(state):
            raise LayerError(f"a state that keeps its structure, {show(state)}", show(new),
                             "leave out the variables that appear in a call")
        new = jax.tree.map(
            lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype), new, state)
        return cast(y, float_dtype(x)), new

    def start(params: Params, state: State, x: Any, *, length: int) -> State:
        raise LayerError("a layer that can stream", f"one of {origin}",
                         "write it with layers of diffprog: nothing tells whether this one mixes "
                         "time steps")

    return Layer(init, apply, start, name=origin, random=random)


def plain(path: Any) -> tuple[str, ...]:
    """The keys, attributes and indices along a path."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def named(tree: Any, names: Names = plain) -> dict[str, Any]:
    """The leaves of any tree as nested dicts, by `names` of each path."""
    dicts: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        whole = names(path)
        check_names(name.lstrip("_") for name in whole)  # trees allow a leading _
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
    """The inverse of `named`: a tree of the structure of `like`."""

    def find(path: Any, _: Any) -> Any:
        found = dicts
        for name in names(path):
            found = found[name]
        return found

    return jax.tree_util.tree_map_with_path(find, like)


def on_x(net: Any, x: Any, train: bool) -> Any:
    """The default call of a network: with x alone."""
    return net(x)


def kind(net: Any) -> Any:
    """Wrap a network whose `repr` is long, to show only its class."""
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
