"""What a function costs, as XLA counts it before compiling: nothing is run, nothing compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


def flops(f: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of ``f(*args)``; the body of a scan counts as often as it runs.

    XLA's analysis of the lowered program sees the body of a loop once. A loop whose length is not
    known (`jax.lax.while_loop`) stays counted once.
    """
    return _counted(jax.jit(f).trace(*args).jaxpr)


def _counted(jaxpr: ClosedJaxpr) -> float:
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.in_avals]
    found: Any = jax.jit(jaxpr_as_fun(jaxpr)).lower(*shapes).cost_analysis() or {}
    loops = sum(times * _counted(body) for times, body in _unseen(jaxpr.jaxpr))
    return max(float(found.get("flops", 0.0)), 0.0) + loops


def _unseen(jaxpr: Any) -> Iterator[tuple[int, ClosedJaxpr]]:
    """The body of every scan, and how many of its runs XLA does not see."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            length, unroll = equation.params["length"], equation.params["unroll"]
            seen = length if unroll >= length else unroll + length % unroll
            body = equation.params["jaxpr"]
            yield length - seen, body
            yield from ((seen * times, inner) for times, inner in _unseen(body.jaxpr))
        for part in jax.tree.leaves(list(equation.params.values())):
            if equation.primitive.name != "scan" and hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield from _unseen(getattr(part, "jaxpr", part))
