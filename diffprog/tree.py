"""Parameters and state are nested dicts; a path such as ``blocks/attend/kernel`` names a leaf.

Patterns address many leaves at once. One scheme serves every tool that speaks of some parameters:
weight decay, freezing, partial loading, sharding. A pattern that matches nothing is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from diffprog.errors import LayerError
from diffprog.notation import listed
from diffprog.patterns import matches

if TYPE_CHECKING:
    from diffprog.layer import Layer

__all__ = ["count", "mask", "matches", "nonfinite", "paths", "select", "verify"]


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
            raise LayerError("a path for each leaf alone", f"two leaves at {path}",
                             "rename one of them: / parts the levels")
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
    """The tree of booleans that is True where `select` finds a leaf: what optax calls a mask.

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

    Args:
        net, params, x: a layer, its parameters, and an input or its shapes.
        state, side: its state, and the side inputs that it needs.

    Example:
        >>> net, x = dp.linear(3), jnp.ones((2, 4))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> dp.tree.verify(net, params, x)
    """
    if difference := net.plan(x, **side).difference(params, state):
        raise difference
