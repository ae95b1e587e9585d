"""A function of which only what its result depends on is run, callbacks too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr


def needed(f: Callable[..., Any], *given: Any) -> Any:
    """``f(*given)`` without what its result does not depend on.

    XLA leaves such operations out by itself, but for callbacks, and only from a whole program.
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*given)
    jaxpr, used = dce_jaxpr(_silent(closed.jaxpr), [True] * len(closed.jaxpr.outvars))
    leaves = [leaf for leaf, use in zip(jax.tree.leaves(given), used, strict=True) if use]
    results = jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*leaves)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _silent(value: Any) -> Any:
    """A program, or what holds some, in which nothing is run for its effects alone."""
    if isinstance(value, Jaxpr):
        eqns = [eqn.replace(effects=frozenset(), params={
            name: _silent(part) for name, part in eqn.params.items()}) for eqn in value.eqns]
        return value.replace(eqns=eqns, effects=frozenset())
    if isinstance(value, ClosedJaxpr):
        return ClosedJaxpr(_silent(value.jaxpr), value.consts)
    return tuple(map(_silent, value)) if type(value) is tuple else value
