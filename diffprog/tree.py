"""Parameters and state are nested dicts; a path such as ``blocks/attend/kernel`` names a leaf.

Patterns address many leaves at once: ``*`` stands for one level and ``**`` for any number of
levels, none included. One scheme serves every tool that speaks of some parameters: weight decay,
freezing, partial loading, sharding. A pattern that matches nothing is an error.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from diffprog.errors import LayerError
from diffprog.notation import listed, show

if TYPE_CHECKING:
    from diffprog.layer import Layer

__all__ = ["count", "mask", "matches", "nonfinite", "paths", "select", "verify"]


def paths(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree under its path.

    Example:
        >>> dp.tree.paths({"head": {"kernel": 1, "bias": 2}})
        {'head/bias': 2, 'head/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(at, simple=True, separator="/"): leaf for at, leaf in leaves}


def select(tree: Any, *patterns: str) -> dict[str, Any]:
    """The leaves whose path matches one of the patterns, under their paths.

    Args:
        tree: any pytree, mostly parameters.
        patterns: paths in which ``*`` is one level and ``**`` any number of levels, none included.

    Raises:
        LayerError: a pattern matches nothing.

    Example:
        >>> params = {"body": {"up": {"kernel": 1, "bias": 2}}, "head": {"kernel": 3}}
        >>> dp.tree.select(params, "**/kernel")
        {'body/up/kernel': 1, 'head/kernel': 3}
        >>> dp.tree.select(params, "*/kernel")
        {'head/kernel': 3}
    """
    leaves = paths(tree)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {path for path in leaves if matches(path, pattern)}
        if not found:
            raise LayerError(f"a pattern that matches a path ({listed(leaves)})", repr(pattern),
                             "correct it; * is one level, ** any number")
        chosen |= found
    return {path: leaf for path, leaf in leaves.items() if path in chosen}


def matches(path: str, pattern: str) -> bool:
    """Does a path match a pattern?

    Example:
        >>> dp.tree.matches("blocks/feed/kernel", "blocks/**"), dp.tree.matches("a/b/c", "a/*")
        (True, False)
    """
    return _expression(pattern).fullmatch(path) is not None


def mask(tree: Any, *patterns: str) -> Any:
    """The tree of booleans that is True where `select` finds a leaf: what optax calls a mask.

    Example:
        >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> dp.tree.mask(params, "**/kernel")
        {'bias': False, 'kernel': True}
        >>> decay = optax.add_decayed_weights(1e-4, mask=lambda p: dp.tree.mask(p, "**/kernel"))
    """
    chosen = select(tree, *patterns)
    flags = [path in chosen for path in paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), flags)


def count(tree: Any) -> int:
    """How many numbers the leaves of a tree hold; abstract leaves count as well.

    Example:
        >>> dp.tree.count({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        9
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nonfinite(tree: Any) -> list[str]:
    """The paths of the leaves that hold a NaN or an infinity: which layer broke the gradient.

    It waits for the values, so it belongs outside `jax.jit`.

    Example:
        >>> dp.tree.nonfinite({"body": {"kernel": jnp.array([1.0, jnp.nan])}, "bias": jnp.ones(2)})
        ['body/kernel']
    """
    floats = {p: a for p, a in paths(tree).items() if jnp.issubdtype(a.dtype, jnp.inexact)}
    finite = jax.device_get({path: jnp.isfinite(leaf).all() for path, leaf in floats.items()})
    return [path for path, fine in finite.items() if not fine]


def verify(net: Layer, params: Any, x: Any, *, state: Any = None, **side: Any) -> None:
    """Raise unless `params` have the paths, shapes and dtypes of `net` on x; `state` too, if given.

    `apply` compares names only; this compares everything, from abstract evaluation alone.

    Example:
        >>> net, x = dp.linear(3), jnp.ones((2, 4))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> dp.tree.verify(net, params, x)
    """
    plan = net.plan(x, **side)
    for kind, wanted, given in (("params", plan.params, params), ("state", plan.state, state)):
        if kind == "state" and state is None:
            continue
        if difference := compare(kind, wanted, given):
            raise difference


def compare(kind: str, wanted: Any, given: Any) -> LayerError | None:
    """The first difference between two trees in paths, shapes or dtypes, as an error."""
    want, have = paths(wanted), paths(given)
    remedy = f"these {kind} are of another net, or init saw another input"
    for path in want:
        if path not in have:
            return LayerError(f"{kind} with {path}", listed(have), remedy)
    for path, leaf in have.items():
        if path not in want:
            return LayerError(f"{kind} without {path}", listed(have), remedy)
        if (leaf.shape, leaf.dtype) != (want[path].shape, want[path].dtype):
            return LayerError(f"{kind} {path} as {show(want[path])}", show(leaf), remedy)
    return None


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    levels = pattern.split("/")
    parts = []
    for i, level in enumerate(levels):
        slash = "/" if i < len(levels) - 1 else ""
        if level == "**":
            parts.append("(?:[^/]+/)*" if slash else "(?:[^/]+(?:/[^/]+)*)?")
        else:
            parts.append("[^/]*".join(map(re.escape, level.split("*"))) + slash)
    expression = "".join(parts)
    # "a/**" matches a itself as well: the levels that ** stands for may be none.
    if levels[-1] == "**" and len(levels) > 1:
        expression = expression.removesuffix("/(?:[^/]+(?:/[^/]+)*)?") + "(?:/[^/]+)*"
    return re.compile(expression)
