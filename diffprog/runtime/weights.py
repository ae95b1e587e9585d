"""Weights to share: parameters and state of a net in one file of safetensors."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import clip, show
from diffprog.core.paths import paths
from diffprog.core.plans import Params, State
from diffprog.runtime.differences import described, difference

__all__ = ["Weights", "load_weights", "save_weights"]

# The dtypes that safetensors reads into NumPy.
_DTYPES = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
           "bfloat16", "float16", "float32", "float64", "complex64"}


class Weights(NamedTuple):
    """The content of a file of weights.

    Attributes:
        params, state: of the net.
        code: the ``repr`` of the net that was saved; "" if another library wrote the file.
        version: the version of diffprog that wrote the file; "" as for `code`.
    """

    params: Params
    state: State
    code: str
    version: str

    def __repr__(self) -> str:
        return f"Weights(params={show(self.params)}, state={show(self.state)}, {self.code})"


def save_weights(
    file: str | pathlib.Path, net: Layer, params: Params, state: State | None = None
) -> None:
    """Write the parameters and state of a net into a file of safetensors.

    The names are ``params/<path>`` and ``state/<path>``. The metadata hold the ``repr`` of the net
    under ``net``, the version of the library under ``diffprog``, and the names with a ``*`` for
    each axis of stacked copies under ``layout``. Other programs read such files too.

    Args:
        file: a path, mostly with the ending ``.safetensors``; the file is replaced.
        net: the net.
        params, state: its trees; None for no state.

    Raises:
        LayerError: a leaf of a dtype that the format does not have, such as int4 or a key.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> net, x = dp.linear(3), jnp.ones((2, 4))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> file = tempfile.mkdtemp() + "/net.safetensors"
        >>> dp.runtime.save_weights(file, net, params, state)
        >>> dp.runtime.load_weights(file, net, x).code
        'linear(3)'
    """
    safetensors, tree = _safetensors(), {"params": params, "state": state or {}}
    leaves = paths(tree)
    for path, leaf in leaves.items():
        if getattr(getattr(leaf, "dtype", None), "name", "") not in _DTYPES:
            raise LayerError("arrays of a dtype that safetensors has",
                             f"{show(leaf)} at {path}", "cast it: leaf.astype(jnp.int8)")
    safetensors.save_file(
        {path: np.asarray(leaf, order="C") for path, leaf in leaves.items()}, file,
        metadata={"net": repr(net), "diffprog": importlib.metadata.version("diffprog"),
                  "layout": json.dumps(_layout(net, tree))})


def load_weights(
    file: str | pathlib.Path, net: Layer | None = None, x: Any = None, **side: Any
) -> Weights:
    """The parameters and state in a file of `save_weights`, in the layout of a net.

    Dtypes are those saved. Copies of a layer, stacked by ``blocks=repeat(n, layer)`` or one after
    the other by ``blocks=layer ** n``, are converted to the layout of the net.

    Args:
        file: the path.
        net: the net that they are for; None returns nested dicts as saved.
        x: an input of the net, or its shapes; needed with `net`.
        side: the side inputs that the net needs.

    Raises:
        LayerError: the leaves are not those of the net: the error lists the paths that differ,
            with likely renames; the file is none of safetensors; 64-bit leaves without
            ``jax_enable_x64``.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> x, file = jnp.ones((2, 4)), tempfile.mkdtemp() + "/net.safetensors"
        >>> stacked = dp.serial(blocks=dp.repeat(3, dp.linear(4)), head=dp.linear(2))
        >>> dp.runtime.save_weights(file, stacked, *stacked.init(jax.random.key(0), x))
        >>> net = dp.serial(blocks=dp.linear(4) ** 3, head=dp.linear(2))
        >>> params, state, *_ = dp.runtime.load_weights(file, net, x)
        >>> list(params["blocks"])
        ['linear_0', 'linear_1', 'linear_2']
    """
    if net is not None and x is None:
        raise LayerError("x with net", "none",
                         "pass an input: the shapes of parameters depend on it")
    leaves, about = _read(file)
    if net is None:
        tree = _nested(leaves, leaves)
    else:
        plan = net.plan(x, **side)
        tree = _fitted(net, {"params": plan.params, "state": plan.state}, leaves, about)
    tree = jax.tree.map(jnp.asarray, tree)
    return Weights(tree.get("params", {}), tree.get("state", {}),
                   about.get("net", ""), about.get("diffprog", ""))


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("files of weights need safetensors: "
                          "pip install 'diffprog[checkpoints]'") from error
    return safetensors.numpy


def _read(file: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays and the metadata of a file."""
    open_file = _safetensors().safe_open
    from safetensors import SafetensorError

    try:
        with open_file(file, framework="np") as opened:
            leaves = {path: opened.get_tensor(path) for path in opened.keys()}
            about = opened.metadata() or {}
    except SafetensorError as error:
        raise LayerError("a whole file of safetensors", f"{file} ({error})",
                         "save it again: it was cut short, or has another format") from error
    for path, leaf in leaves.items():
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise LayerError("leaves of at most 32 bits", f"{show(leaf)} at {path}",
                             "call jax.config.update('jax_enable_x64', True) before")
    return leaves, about


def _fitted(net: Layer, wanted: Any, leaves: dict[str, Any], about: dict[str, str]) -> Any:
    """The leaves of a file as the tree of a net."""
    own, kinds = paths(wanted), described(wanted)
    if wrong := difference("weights", described(leaves), kinds):
        layout = json.loads(about["layout"]) if "diffprog" in about else leaves
        laid = paths(_laid_out(_nested(layout, leaves), _nested(_layout(net, wanted), own)))
        leaves = {_path(pattern): leaf for pattern, leaf in laid.items()}
        if difference("weights", described(leaves), kinds):
            wrong.got += f" in weights of {clip(about['net'])}" if "net" in about else ""
            raise wrong
    return jax.tree.unflatten(jax.tree.structure(wanted), [leaves[path] for path in own])


def _layout(net: Layer, tree: Any) -> list[str]:
    """The paths of the leaves of params and state, with a * for each stacked axis.

    ``serial(blocks=repeat(n, layer))`` has ``params/blocks/*/kernel``, for example.
    """
    def within(layer: Layer, path: str) -> str:
        name, _, rest = path.partition("/")
        child = layer.children.get(name.split("@")[0])
        return "*/" * layer.stacks + (f"{name}/{within(child, rest)}" if child and rest else path)

    return [f"{kind}/{within(net, path)}" for kind, part in tree.items() for path in paths(part)]


def _path(pattern: str) -> str:
    return "/".join(name for name in pattern.split("/") if name != "*")


def _nested(patterns: Iterable[str], leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of leaves, which are under their paths, by pattern."""
    tree: dict[str, Any] = {}
    for pattern in patterns:
        *above, name = pattern.split("/")
        part = tree
        for step in above:
            part = part.setdefault(step, {})
        part[name] = leaves[_path(pattern)]
    return tree


def _laid_out(saved: Any, wanted: Any, axis: int = 0) -> Any:
    """`saved` with stacked copies split and single copies stacked, where `wanted` has them so.

    Arrays have `axis` axes of the stacks around these parts.
    """
    if not (isinstance(saved, dict) and isinstance(wanted, dict)):
        return saved
    if "*" in saved and "*" in wanted:
        return {"*": _laid_out(saved["*"], wanted["*"], axis + 1)}
    if "*" in saved and (names := _copies(wanted)):
        if all(a.shape[axis] == len(names) for a in jax.tree.leaves(saved)):
            return {name: _laid_out(jax.tree.map(lambda a, i=i: a.take(i, axis), saved["*"]),
                                    wanted[name], axis) for i, name in enumerate(names)}
    if "*" in wanted and (names := _copies(saved)):
        whole = jax.tree.map(lambda *each: np.stack(each, axis), *(saved[name] for name in names))
        return {"*": _laid_out(whole, wanted["*"], axis + 1)}
    return {name: _laid_out(part, wanted.get(name), axis) for name, part in saved.items()}


def _copies(tree: dict[str, Any]) -> list[str]:
    """The names of equal copies, such as block_0, block_1, ..., if the tree holds nothing else."""
    stem = next(iter(tree), "").rpartition("_")[0]
    names = [f"{stem}_{i}" for i in range(len(tree))]
    if not tree or tree.keys() != set(names):
        return []
    first, *others = (described(tree[name]) for name in names)
    return names if all(other == first for other in others) else []
