"""Plans: shapes and dtypes of parameters, state and output, by abstract evaluation."""

from __future__ import annotations

import contextvars
import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from diffprog.core.errors import LayerError
from diffprog.core.notation import listed, show
from diffprog.core.paths import paths

Params = dict[str, Any]
State = dict[str, Any]
T = TypeVar("T")


class Call(NamedTuple):
    """One call of a child: its name, and the shapes of its inputs."""

    name: str
    x: Any
    side: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes and dtypes of parameters, state and output, and the calls of the children."""

    params: Params
    state: State
    y: Any
    calls: tuple[Call, ...] = ()

    def difference(self, params: Any, state: Any = None) -> LayerError | None:
        """An error for the first difference of `params` or `state` from the plan; None for none."""
        remedy = "pass what init returned on input of this shape"
        return difference("params", self.params, params, remedy) or (
            None if state is None else difference("state", self.state, state, remedy))


def difference(kind: str, wanted: Any, given: Any, remedy: str) -> LayerError | None:
    """An error for the first difference of two trees in paths, shapes or dtypes; None for none."""
    want, have = paths(wanted), paths(given)
    for path in [*want, *have]:
        if path not in have:
            return LayerError(f"{kind} with {path}", listed(have), remedy)
        if path not in want:
            return LayerError(f"{kind} without {path}", listed(have), remedy)
        if (want[path].shape, want[path].dtype) != (have[path].shape, have[path].dtype):
            return LayerError(f"{kind} {path}".rstrip() + f" as {show(want[path])}",
                              show(have[path]), remedy)
    return None


def spec(x: Any) -> Any:
    """Shapes and dtypes of a pytree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, _canonical(a.dtype)), x)


def blank(tree: Any) -> Any:
    """Zeros of these shapes, for abstract evaluation."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)


def grown(less: Any, more: Any) -> int:
    """The axis along which `more` is larger than `less`; -1 if they are equal.

    It is the batch axis if `more` has one example more.
    """
    return next((i for i, (a, b) in enumerate(zip(less.shape, more.shape, strict=True)) if a != b),
                -1)


def example_axes(run: Callable[..., Any], count: int, *given: Any) -> Any:
    """The batch axis of each leaf of ``run(*given)``, found by planning with one example more.

    -1 for leaves without one. The batch axis of `given` is axis 0 of each leaf of length `count`.
    """
    given = spec(given)
    less, more = jax.eval_shape(run, *given), jax.eval_shape(run, *one_more(count, given))
    return jax.tree.map(grown, less, more)


def one_more(count: int, given: Any) -> Any:
    """The shapes of `given` for a batch of one example more."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(
        (count + 1, *a.shape[1:]) if a.shape[:1] == (count,) else a.shape, a.dtype), given)


def reaches(linear: Callable[..., Any], given: Any) -> bool:
    """Does the output of a linear function depend on its input? Read off its jaxpr."""
    traced = jax.make_jaxpr(linear)(given).jaxpr
    return any(dce_jaxpr(traced, [True] * len(traced.outvars))[1])


def remember(plan: Callable[..., T]) -> Callable[..., T]:
    """`plan(x, side)` with a cache keyed by shapes and dtypes, which lives as long as the function.

    The cache saves time and changes no result: `plan` is a function of shapes, dtypes, and JAX's
    configuration (`_setting`). Two threads may evaluate it at once, with equal results.
    """
    plans: dict[Any, T] = {}

    def planned(*given: Any) -> T:
        leaves, structure = jax.tree.flatten(given)
        at = (structure, tuple((a.shape, a.dtype) for a in leaves), _setting())
        if at not in plans:
            def evaluate() -> None:
                plans[at] = plan(*given)

            step_by_step(evaluate)
        return plans[at]

    return planned


# The number of stack frames that plans of this thread may use, and the configuration of JAX.
_INSIDE: contextvars.ContextVar[tuple[int, Any]] = contextvars.ContextVar(
    "inside", default=(0, None))
_FRAMES = 500  # half of Python's default limit; what runs inside a plan has the other half
_ROOM = 160  # for four plans, if the stack is already deep
_ANEW = 50  # restarts of a plan: one that composes its layers itself never finds them in a cache


class _Deeper(BaseException):
    """A plan that must be evaluated first, from the bottom of the stack."""


def step_by_step(evaluate: Callable[[], None]) -> None:
    """Run a function that caches its result; deep inside others, run it first and restart them.

    So the stack does not grow with the depth of a net.
    """
    setting, (most, around) = _setting(), _INSIDE.get()
    if most and setting == around and _frames() > most:
        raise _Deeper(evaluate)
    before = _INSIDE.set((most, around) if most else (max(_FRAMES, _frames() + _ROOM), setting))
    waiting, begun = [evaluate], [0]
    try:
        while waiting:
            try:
                if begun[-1] > _ANEW:
                    _in_place(waiting[-1], setting)
                else:
                    waiting[-1]()
                waiting.pop()
                begun.pop()
            except _Deeper as deeper:
                if most:
                    raise
                waiting.append(*deeper.args)
                begun[-1:] = [begun[-1] + 1, 0]
            except Exception:
                if len(waiting) == 1:
                    raise
                _in_place(evaluate, setting)  # an error must show the whole path
                return
    finally:
        _INSIDE.reset(before)


def _in_place(evaluate: Callable[[], None], setting: Any) -> None:
    """Run it and everything inside, to any depth."""
    before = _INSIDE.set((sys.maxsize, setting))
    try:
        evaluate()
    finally:
        _INSIDE.reset(before)


def _frames() -> int:
    """The depth of Python's stack."""
    frame, count = inspect.currentframe(), 0
    while frame:
        frame, count = frame.f_back, count + 1
    return count


def _setting() -> Any:
    """The configuration of JAX on which shapes and dtypes depend."""
    return (jax.config.read("jax_enable_x64"),
            jax.config.jax_default_prng_impl,  # type: ignore[attr-defined]
            jax.sharding.get_abstract_mesh())


def _canonical(dtype: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
