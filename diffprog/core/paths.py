"""Paths such as ``blocks/attend/kernel`` name the leaves of nested dicts of parameters and state.

Patterns select several leaves. One scheme serves every tool that addresses parameters: weight
decay, freezing, partial loading, sharding. A pattern that matches nothing is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.dtypes import is_inexact
from diffprog.core.errors import LayerError
from diffprog.core.notation import listed
from diffprog.core.patterns import matches

__all__ = ["count", "mask", "nonfinite", "paths", "select"]


def paths(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree under its path.

    Example:
        >>> dp.tree.paths({"head": {"kernel": 1, "bias": 2}})
        {'head/bias': 2, 'head/kernel': 1}
    """
    found: dict[str, Any] = {}
    for at, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(at, simple=True, separator="/")
        if path in found:
            raise LayerError("one path for each leaf", f"two leaves at {path}",
                             "rename one of them: / separates levels")
        found[path] = leaf
    return found


def select(tree: Any, *patterns: str) -> dict[str, Any]:
    """The leaves whose path matches one of the patterns, under their paths.

    Args:
        tree: any pytree, mostly parameters.
        patterns: paths in which ``*`` is one level and ``**`` any number, none included; one that
            matches nothing is an error.

    Example:
        >>> params = {"body": {"up": {"kernel": 1, "bias": 2}}, "head": {"kernel": 3}}
        >>> dp.tree.select(params, "**/kernel")
        {'body/up/kernel': 1, 'head/kernel': 3}
        >>> dp.tree.select(params, "*/kernel")
        {'head/kernel': 3}
    """
    leaves = paths(tree)
    for pattern in patterns:
        if not any(matches(path, pattern) for path in leaves):
            raise LayerError(f"a pattern that matches a path ({listed(leaves)})", repr(pattern),
                             "correct it: * is one level, ** any number")
    return {path: leaf for path, leaf in leaves.items()
            if any(matches(path, pattern) for pattern in patterns)}


def mask(tree: Any, *patterns: str) -> Any:
    """A tree of booleans, True for the leaves that `select` finds: a mask as optax takes it.

    Args:
        tree, patterns: as in `select`.

    Example:
        >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> dp.tree.mask(params, "**/kernel")
        {'bias': False, 'kernel': True}
        >>> decay = optax.add_decayed_weights(1e-4, mask=lambda p: dp.tree.mask(p, "**/kernel"))
    """
    chosen = select(tree, *patterns)
    return jax.tree.unflatten(jax.tree.structure(tree), [path in chosen for path in paths(tree)])


def count(tree: Any) -> int:
    """The number of entries of all leaves; abstract leaves count too.

    Example:
        >>> dp.tree.count({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        9
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nonfinite(tree: Any) -> list[str]:
    """The paths of the leaves with a NaN or an infinity, as in the gradients of a broken layer.

    It waits for the values: call it outside `jax.jit`.

    Example:
        >>> dp.tree.nonfinite({"body": {"kernel": jnp.array([1.0, jnp.nan])}, "bias": jnp.ones(2)})
        ['body/kernel']
    """
    floats = {p: a for p, a in paths(tree).items() if is_inexact(a)}
    finite = jax.device_get({path: jnp.isfinite(leaf).all() for path, leaf in floats.items()})
    return [path for path, fine in finite.items() if not fine]


def both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts with the parts of both."""
    shared = {name: both(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **shared}


def joined(at: str, path: str) -> str:
    """The path of a leaf below another path; "" is the whole tree."""
    return f"{at}/{path}" if at and path else at or path


def part_at(tree: Any, path: str) -> Any:
    """The subtree at a path; None if there is none."""
    if not path:
        return tree
    for name, part in level(tree)[0].items():
        if (rest := _behind(name, path)) is not None and (found := part_at(part, rest)) is not None:
            return found
    return None


def put(tree: Any, path: str, value: Any) -> Any:
    """The tree with another value at a path; empty nested dicts are removed."""
    if not path:
        return value
    parts, again = level(tree)
    there = (name for name, part in parts.items() if (rest := _behind(name, path)) is not None
             and part_at(part, rest) is not None)
    name = next(there, path.partition("/")[0])
    below = put(parts.get(name, {}), path[len(name) + 1 :], value)
    if not isinstance(tree, dict):
        return again(parts | {name: below})
    if below is None or (isinstance(below, dict) and not below):
        return {other: part for other, part in tree.items() if str(other) != name}
    return {**tree, {str(other): other for other in tree}.get(name, name): below}


def level(tree: Any) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """The parts of a tree by name, one level deep, and a function that rebuilds it from parts."""
    found, form = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    names = [jax.tree_util.keystr(at, simple=True) for at, _ in found]
    if names == [""]:
        return {}, lambda parts: tree  # a leaf
    return (dict(zip(names, (part for _, part in found), strict=True)),
            lambda parts: form.unflatten([parts[name] for name in names]))


def _behind(name: str, path: str) -> str | None:
    """The rest of a path after a name, which may hold / itself; None if it has another name."""
    return path[len(name) + 1 :] if f"{path}/".startswith(f"{name}/") else None
