"""Functions transformed by Haiku: their module names are paths in one string."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import code
from diffprog.core.plans import Params, State
from diffprog.interop.foreign import foreign, kind, library, named, on_x, plain

__all__ = ["from_haiku"]


def from_haiku(
    net: Any, *, call: Callable[..., Any] | None = None, random: bool = False
) -> Layer:
    """A function transformed by Haiku: ``y = transformed.apply(params, state, key, x)``.

    Each ``/`` in a module name becomes one level of nesting. Haiku inserts ``~`` into the path of
    submodules made in a constructor, and ``~method`` for those made in another method; here they
    are ``init()`` and ``method()``: ``mlp/~/linear_0`` becomes ``mlp/init()/linear_0``.

    Args:
        net: the result of `hk.transform` or `hk.transform_with_state`.
        call: ``(f, x, train) -> y``, how to call it in training and at inference, for example
            ``lambda f, x, train: f(x, is_training=train)``; ``f(x)`` if None. `init` calls it with
            train=True, because Haiku creates running statistics only then.
        random: whether `apply` needs a key.

    Raises:
        LayerError: a function that is not transformed; a parameter and a module share a name.

    Example:
        >>> import haiku as hk
        >>> net = dp.interop.from_haiku(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> min(dp.tree.paths(params)), net(params, jnp.ones((2, 4))).shape
        ('mlp/init()/linear_0/b', (2, 3))
    """
    hk = library("haiku")
    if not isinstance(net, (hk.Transformed, hk.TransformedWithState)):
        raise LayerError("a function transformed by Haiku", code(net),
                         "pass hk.transform(f) or hk.transform_with_state(f)")
    run = call or on_x
    pair = net if isinstance(net, hk.TransformedWithState) else hk.with_empty_state(net)

    def draw(key: jax.Array, x: Any) -> tuple[Params, State]:
        params, state = run(functools.partial(pair.init, key), x, True)
        return named(params, _names), named(state, _names)

    def apply(params: Params, state: State, x: Any, key: Any, train: bool) -> tuple[Any, State]:
        own = key if random else None
        f = functools.partial(pair.apply, _joined(params), _joined(state), own)
        y, new = run(f, x, train)
        return y, named(new, _names)

    layer = foreign("haiku", draw, apply, random=random)
    return layer.described(from_haiku, {"net": kind(net), "call": call, "random": random})


def _names(path: Any) -> tuple[str, ...]:
    """``("mlp", "init()", "linear_0", "w")`` for ``mlp/~/linear_0`` and ``w``."""
    modules, *rest = plain(path)
    whole = (f"{name[1:] or 'init'}()" if name[0] == "~" else name for name in modules.split("/"))
    return (*whole, *rest)


def _joined(dicts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tree of Haiku: the inverse of `_names`, since names in Haiku have no parentheses."""
    tree: dict[str, dict[str, Any]] = {}

    def visit(level: dict[str, Any], modules: tuple[str, ...]) -> None:
        for name, inner in level.items():
            if isinstance(inner, dict):
                if name.endswith("()"):
                    name = "~" if name == "init()" else f"~{name[:-2]}"
                visit(inner, (*modules, name))
            else:
                tree.setdefault("/".join(modules), {})[name] = inner

    visit(dicts, ())
    return tree
