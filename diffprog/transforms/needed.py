"""Dead-code elimination that also removes callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr


def needed(f: Callable[..., Any], *given: Any) -> Any:
    """``f(*given)`` without the operations that the result does not depend on.

    XLA also removes such operations, but not callbacks, and only from a whole program.
    """
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*given)
    jaxpr, used = dce_jaxpr(_silent(closed.jaxpr), [True] * len(closed.jaxpr.outvars))
    leaves = [leaf for leaf, use in zip(jax.tree.leaves(given), used, strict=True) if use]
    results = jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*leaves)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _silent(value: Any) -> Any:
    """A jaxpr, or a parameter that contains jaxprs, with all effects removed."""
    if isinstance(value, Jaxpr):
        eqns = [eqn.replace(effects=frozenset(), params={
            name: _silent(part) for name, part in eqn.params.items()}) for eqn in value.eqns]
        return value.replace(eqns=eqns, effects=frozenset())
    if isinstance(value, ClosedJaxpr):
        return ClosedJaxpr(_silent(value.jaxpr), value.consts)
    return tuple(map(_silent, value)) if type(value) is tuple else value
