"""Loops: compiled once for all eager calls, and written out where XLA is slow in them.

`jax.lax.scan` compiles a body anew that is a new function, as a closure in each call is. So what
loops is a function of its layer, given all that it reads.

XLA brings convolutions to the form that is fast on CPU only where they stand in the program itself.
In the body of a loop, or in a branch, their gradients are tens of times slower, and so they are if
the loop has one round or the branch no choice, for these are removed after that.
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

from diffprog.core.meshes import settled
from diffprog.core.parameters import INLINE

# What was told while this thread traced; None where nobody listens.
_TOLD: contextvars.ContextVar[set[Hashable] | None] = contextvars.ContextVar("told", default=None)


@contextlib.contextmanager
def listening() -> Iterator[set[Hashable]]:
    """What is told within; who listens around is told it too."""
    told: set[Hashable] = set()
    outer = _TOLD.set(told)
    try:
        yield told
    finally:
        _TOLD.reset(outer)
    tell(*told)


def tell(*notes: Hashable) -> None:
    """Let those who listen know, also where the call is not traced again."""
    told = _TOLD.get()
    if told is not None:
        told.update(notes)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Told:
    """What was told in a trace, which is remembered with the form of its result."""

    notes: frozenset[Hashable]


def once(f: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """f, compiled once for all eager calls on the same shapes; in a program as it is written.

    It must be the same function in each call, and is given all that it reads; what is no array is
    named in `static`.
    """

    @functools.wraps(f)
    def heard(*given: Any, **named: Any) -> tuple[Any, _Told]:
        with listening() as told:
            result = f(*given, **named)
        return result, _Told(frozenset(told))

    # What is written into a program is written into an eager gradient too, and so compiled anew.
    alone, inside = (jax.jit(heard, static_argnames=static, inline=inline)
                     for inline in (False, INLINE))

    def run(*given: Any, **named: Any) -> Any:
        staged = any(map(_is_staged, jax.tree.leaves((given, named))))
        result, told = (inside if staged else alone)(*given, **named)
        tell(*told.notes)
        return result

    return run


def _is_staged(leaf: Any) -> bool:
    """Is it of a program that is being traced, and not a value that is differentiated or mapped?"""
    while isinstance(leaf, Tracer):
        if hasattr(leaf, "primal"):
            leaf = leaf.primal
        elif hasattr(leaf, "batch_dim"):
            leaf = leaf.val
        else:
            return True
    return False


def convolves(f: Callable[..., Any], *given: Any, **named: Any) -> bool:
    """Is there a convolution in f, or in what it calls?"""
    return "conv_general_dilated" in str(jax.make_jaxpr(f)(*given, **named))


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, *, length: int,
    convolving: Callable[[], bool], unroll: int = 1,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, written out if `unroll` is the length, and on CPU if the step convolves."""

    carry = settled(lambda carry, at: step(carry, at)[0], carry, xs)

    def loop() -> tuple[Any, Any]:
        return jax.lax.scan(step, carry, xs, length=length, unroll=unroll)

    # Not as a scan that is unrolled: `vmap` gives all its rounds what one of them needs, and a
    # convolution whose input all copies share becomes one in groups.
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
    """What the platform runs, without a trace of the choice.

    The number of the branch is computed anew for the gradient: handed from one function of the
    program to another it would be a value, and the branch be taken out too late.
    """
    anew = lambda primitive, *_, **__: primitive.name != "platform_index"  # noqa: E731
    choose = lambda: jax.lax.platform_dependent(cpu=cpu, default=default)  # noqa: E731
    return jax.checkpoint(choose, policy=anew, prevent_cse=False)()
