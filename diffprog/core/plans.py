"""What a layer makes of an input, in shapes and dtypes: nothing is computed to know it."""

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
    """One call of a child: its name, and the shapes of what it was given."""

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
        """The first difference in paths, shapes or dtypes to trees of values, as an error."""
        remedy = "pass what init gave on input of this shape"
        return difference("params", self.params, params, remedy) or (
            None if state is None else difference("state", self.state, state, remedy))


def difference(kind: str, wanted: Any, given: Any, remedy: str) -> LayerError | None:
    """The first difference of two trees in paths, shapes or dtypes, as an error about `kind`."""
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
    """Zeros in place of shapes, where a function is evaluated abstractly."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)


def grown(less: Any, more: Any) -> int:
    """The axis along which `more` is larger: that of examples, if it has more; -1 if none is."""
    return next((i for i, (a, b) in enumerate(zip(less.shape, more.shape, strict=True)) if a != b),
                -1)


def example_axes(run: Callable[..., Any], count: int, *given: Any) -> Any:
    """Of each leaf of ``run(*given)`` the axis of examples: the one that grows with them; else -1.

    `given` has `count` examples: on the first axis of each leaf whose first axis is that long.
    """
    given = spec(given)
    less, more = jax.eval_shape(run, *given), jax.eval_shape(run, *one_more(count, given))
    return jax.tree.map(grown, less, more)


def one_more(count: int, given: Any) -> Any:
    """The shapes of `given` with one example more."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(
        (count + 1, *a.shape[1:]) if a.shape[:1] == (count,) else a.shape, a.dtype), given)


def reaches(linear: Callable[..., Any], given: Any) -> bool:
    """Does anything of what a linear function is given come out of it? Read off its jaxpr."""
    traced = jax.make_jaxpr(linear)(given).jaxpr
    return any(dce_jaxpr(traced, [True] * len(traced.outvars))[1])


def remember(plan: Callable[..., T]) -> Callable[..., T]:
    """`plan(x, side)`, evaluated once for each set of shapes; the results die with the layer.

    It saves time and decides nothing: it is a function of shapes, dtypes, and what `_setting` says.
    Threads that ask at once may both evaluate it, to equal results.
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


# To how many frames of Python's stack the plans of this thread may go, and in what setting.
_INSIDE: contextvars.ContextVar[tuple[int, Any]] = contextvars.ContextVar(
    "inside", default=(0, None))
_FRAMES = 500  # half of what Python allows by itself: what is run inside of a plan has the other
_ROOM = 160  # of four plans, where the stack is deep already
_ANEW = 50  # how often a plan is begun anew: in layers that it makes itself nothing stays noted


class _Deeper(BaseException):
    """What is to be evaluated first, from the beginning of the stack."""


def step_by_step(evaluate: Callable[[], None]) -> None:
    """Run what notes its result; where it runs deep inside of others, they are begun anew after it.

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
                _in_place(evaluate, setting)  # what fails shall do so with all its path
                return
    finally:
        _INSIDE.reset(before)


def _in_place(evaluate: Callable[[], None], setting: Any) -> None:
    """Run it with all that is inside, however deep."""
    before = _INSIDE.set((sys.maxsize, setting))
    try:
        evaluate()
    finally:
        _INSIDE.reset(before)


def _frames() -> int:
    """How deep Python's stack is."""
    frame, count = inspect.currentframe(), 0
    while frame:
        frame, count = frame.f_back, count + 1
    return count


def _setting() -> Any:
    """What JAX is set to, as far as shapes and dtypes depend on it."""
    return (jax.config.read("jax_enable_x64"),
            jax.config.jax_default_prng_impl,  # type: ignore[attr-defined]
            jax.sharding.get_abstract_mesh())


def _canonical(dtype: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
