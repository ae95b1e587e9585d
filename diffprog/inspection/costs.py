"""The cost of a function as XLA counts it before compilation: nothing is compiled or run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from diffprog.core.jaxprs import programs


def flops(f: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of ``f(*args)``; the body of a scan counts for each iteration.

    XLA's analysis of the lowered program counts the body of a loop once. A loop of unknown length
    (`jax.lax.while_loop`) stays counted once. Of several branches the most expensive counts, and of
    those of `jax.lax.platform_dependent` the one for the default backend.
    """
    return _counted(jax.jit(f).trace(*args).jaxpr)


def _counted(jaxpr: ClosedJaxpr) -> float:
    return _seen(jaxpr) + _unseen(jaxpr.jaxpr)


def _seen(jaxpr: ClosedJaxpr) -> float:
    """The count of XLA: the body of a loop once, and the most expensive branch."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.in_avals]
    found: Any = jax.jit(jaxpr_as_fun(jaxpr)).lower(*shapes).cost_analysis() or {}
    return max(float(found.get("flops", 0.0)), 0.0)


def _unseen(jaxpr: Any) -> float:
    """The part that XLA leaves out: further iterations of scans."""
    return sum(map(_unseen_in, jaxpr.eqns), 0.0)


def _unseen_in(equation: Any) -> float:
    given = equation.params
    if equation.primitive.name == "scan":
        length, unroll, body = given["length"], given["unroll"], given["jaxpr"]
        seen = length if not 0 < unroll < length else unroll + length % unroll
        return (length - seen) * _counted(body) + seen * _unseen(body.jaxpr)
    if equation.primitive.name == "cond":
        if platforms := given.get("branches_platforms"):
            return _unseen(given["branches"][_branch_here(platforms)].jaxpr)
        if any(_unseen(branch.jaxpr) for branch in given["branches"]):
            return max(map(_counted, given["branches"])) - max(map(_seen, given["branches"]))
        return 0.0
    return sum(map(_unseen, programs(equation)), 0.0)


def _branch_here(platforms: Sequence[Sequence[str] | None]) -> int:
    """The index of the branch of `jax.lax.platform_dependent` for the default backend."""
    backend = jax.default_backend()
    names = {"cuda", "rocm"} if backend == "gpu" else {backend}
    return next(i for i, of in enumerate(platforms) if of is None or names.intersection(of))
