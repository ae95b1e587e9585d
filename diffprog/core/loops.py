"""Loops: compiled once for all eager calls, and unrolled where XLA is slow in them.

`jax.lax.scan` compiles a body again if it is a new function, such as a closure of each call. So a
looping layer passes one function everything that it reads.

XLA rewrites convolutions to the form that is fast on CPU only at the top level of a program. In the
body of a loop or a branch their gradients are tens of times slower, even if the loop has one round
or the branch no alternative, as these are removed later.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from diffprog.core.jaxprs import primitives
from diffprog.core.meshes import settled
from diffprog.core.parameters import INLINE

# The notes made while this thread traces; None if nobody listens.
_TOLD: contextvars.ContextVar[set[Hashable] | None] = contextvars.ContextVar("told", default=None)


@contextlib.contextmanager
def listening() -> Iterator[set[Hashable]]:
    """The notes made inside the block; an outer block receives them too."""
    told: set[Hashable] = set()
    outer = _TOLD.set(told)
    try:
        yield told
    finally:
        _TOLD.reset(outer)
    tell(*told)


def tell(*notes: Hashable) -> None:
    """Add notes for the blocks around, also if a cached call is not traced again."""
    told = _TOLD.get()
    if told is not None:
        told.update(notes)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Told:
    """The notes of a trace, cached as a static part of its result."""

    notes: frozenset[Hashable]


def once(f: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """f, compiled once for all eager calls on the same shapes, and inlined into a traced program.

    Pass the same function in each call, and everything that it reads as arguments; arguments that
    are no arrays are named in `static`.
    """

    @functools.wraps(f)
    def heard(*given: Any, **named: Any) -> tuple[Any, _Told]:
        with listening() as told:
            result = f(*given, **named)
        return result, _Told(frozenset(told))

    # An inlined function is inlined into an eager gradient too, and compiled again for each.
    alone, inside = (jax.jit(heard, static_argnames=static, inline=inline)
                     for inline in (False, INLINE))

    def run(*given: Any, **named: Any) -> Any:
        staged = any(map(_is_staged, jax.tree.leaves((given, named))))
        result, told = (inside if staged else alone)(*given, **named)
        tell(*told.notes)
        return result

    return run


def _is_staged(leaf: Any) -> bool:
    """Does it belong to a program that is being traced, not just to `jax.grad` or `jax.vmap`?"""
    while isinstance(leaf, Tracer):
        if hasattr(leaf, "primal"):
            leaf = leaf.primal
        elif hasattr(leaf, "batch_dim"):
            leaf = leaf.val
        else:
            return True
    return False


def convolves(f: Callable[..., Any], *given: Any, **named: Any) -> bool:
    """Does f, or a function that it calls, contain a convolution?"""
    return "conv_general_dilated" in primitives(jax.make_jaxpr(f)(*given, **named).jaxpr)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, *, length: int,
    convolving: Callable[[], bool], unroll: int = 1,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, unrolled if `unroll` is the length, and on CPU if the step convolves."""

    carry = settled(lambda carry, at: step(carry, at)[0], carry, xs)

    def loop() -> tuple[Any, Any]:
        return jax.lax.scan(step, carry, xs, length=length, unroll=unroll)

    # Not by ``unroll=length``: under `vmap`, a scan batches all rounds as soon as one needs it, and
    # a convolution whose input all copies share becomes one in groups.
    def written_out() -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(xs)
        rounds = zip(*map(jnp.unstack, leaves), strict=True) if leaves else [()] * length
        last, ys = carry, []
        for at in rounds:
            last, y = step(last, structure.unflatten(at))
            ys.append(y)
        return last, jax.tree.map(lambda *each: jnp.stack(each), *ys)

    if unroll >= length:
        return written_out()
    return _chosen(written_out, loop) if convolving() else loop()


def _chosen(cpu: Callable[[], Any], default: Callable[[], Any]) -> Any:
    """The function for the platform, chosen so that XLA removes the choice early.

    The index of the branch is recomputed for the gradient: as a value passed between functions of
    the program it would keep the branch until after convolutions are rewritten.
    """
    anew = lambda primitive, *_, **__: primitive.name != "platform_index"  # noqa: E731
    choose = lambda: jax.lax.platform_dependent(cpu=cpu, default=default)  # noqa: E731
    return jax.checkpoint(choose, policy=anew, prevent_cse=False)()
