"""The dataflow between the children of a layer, found by tracing it.

Each call of a child becomes one equation of the traced program; the other equations are what the
layer itself computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from diffprog.core.jaxprs import programs
from diffprog.core.layer import Layer
from diffprog.core.nets import silenced
from diffprog.core.paths import paths
from diffprog.core.plans import Call, blank, spec

_MARK = "#call "  # prefix of the name of the equation of a child
_SYMBOLS = {"add": "+", "add_any": "+", "sub": "\N{MINUS SIGN}", "mul": "\N{MULTIPLICATION SIGN}",
            "div": "÷", "dot_general": "@"}
_MOVES = frozenset({  # primitives that only move numbers
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type",
    "copy", "copy_p", "optimization_barrier", "sharding_constraint", "stop_gradient"})


@dataclasses.dataclass(eq=False)
class Value:
    """An array inside a layer; `of` is the array whose numbers it has, reshaped or moved, if any.

    `params` is the path of a parameter; `place` is set by the code that draws.
    """

    params: str = ""
    of: Value | None = None
    place: Any = None

    @property
    def root(self) -> Value:
        """The array before it was reshaped or moved."""
        return self if self.of is None else self.of.root


@dataclasses.dataclass(eq=False)
class Step:
    """A call of a child; or a chain of operations, each used by the next one only.

    Attributes:
        taken: the inputs, each with its shape; None for constants.
        given: the outputs.
        call: the call of the child; None for operations.
        names: the names of the operations, without repetition.
    """

    taken: Sequence[tuple[Value | None, Any]]
    given: list[Value | None]
    call: Call | None = None
    names: list[str] = dataclasses.field(default_factory=list)

    @property
    def roots(self) -> set[Value]:
        """The inputs before they were reshaped or moved."""
        return {value.root for value, _ in self.taken if value}


@dataclasses.dataclass(frozen=True)
class Wiring:
    """The inputs of a layer, its steps in order, and its outputs."""

    x: list[Value]
    side: dict[str, list[Value]]
    steps: list[Step]
    y: list[Value | None]


def wiring(layer: Layer, x: Any, side: dict[str, Any]) -> Wiring:
    """The wiring of the children of a layer in a call at inference, on inputs of these shapes."""
    plan = layer.plan(x, **side)
    calls: list[Call] = []

    def call(name: str, child: Layer, params: Any, x: Any, side: dict[str, Any]) -> Any:
        y = child.plan(x, **side).y

        def called(x: Any, side: Any) -> Any:
            return blank(y)

        called.__name__ = f"{_MARK}{len(calls)}"
        calls.append(Call(name, spec(x), spec(side)))
        return jax.jit(called)(x, side)

    def run(params: Any, state: Any, x: Any, side: Any) -> Any:
        return quiet.apply(params, state, x, **side)[0]

    quiet = silenced(layer, call)
    traced = jax.make_jaxpr(run)(plan.params, plan.state, x, side)
    own = [Value(path) for path in paths(plan.params)]
    state = [None for _ in jax.tree.leaves(plan.state)]
    xs = [Value() for _ in jax.tree.leaves(x)]
    sides = {name: [Value() for _ in jax.tree.leaves(side[name])] for name in sorted(side)}
    steps: list[Step] = []
    inputs = [*own, *state, *xs, *(value for values in sides.values() for value in values)]
    y = _steps(traced.jaxpr, inputs, calls, steps)
    return Wiring(xs, sides, _grouped(steps, y), y)


def _steps(
    jaxpr: Any, inputs: list[Value | None], calls: list[Call], steps: list[Step]
) -> list[Value | None]:
    """Add the steps of a traced program and return its outputs; nested programs with calls too."""
    known: dict[Any, Value | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda v: None if isinstance(v, Literal) else known.get(v)  # noqa: E731
    for equation in jaxpr.eqns:
        taken = [(read(v), jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype))
                 for v in equation.invars]
        around = next((inner for inner in programs(equation) if _calls(inner)), None)
        sources = {value.root for value, _ in taken if value}
        given: list[Value | None]
        if (at := _call(equation)) is not None:
            given = [Value() for _ in equation.outvars]
            steps.append(Step(taken, given, calls[at]))
        elif around is not None:
            # Leading inputs that are not passed on are an index or belong to a condition.
            passed = [value for value, _ in taken[len(taken) - len(around.invars):]]
            given = [value and Value(value.params, value) for value in
                     _steps(around, passed, calls, steps)]
        elif not sources:
            given = [None for _ in equation.outvars]
        elif not (names := _operations(equation)) and len(sources) == 1:
            (source,) = sources
            given = [Value(source.params, source) for _ in equation.outvars]
        else:
            given = [Value() for _ in equation.outvars]
            steps.append(Step(taken, given, names=names or [equation.primitive.name]))
        known.update(zip(equation.outvars, given, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _grouped(steps: list[Step], y: list[Value | None]) -> list[Step]:
    """The steps, with operations joined to their only user; unused operations are dropped."""
    users: dict[Value, set[Step | None]] = {value.root: {None} for value in y if value}
    parts: dict[Step, list[Step]] = {}
    for step in reversed(steps):
        uses = set[Step | None]().union(*(users.get(v, ()) for v in step.given if v))
        if not step.call and not uses:
            continue
        only = next(iter(uses)) if len(uses) == 1 and not step.call else None
        group = only if only and not only.call else step
        parts.setdefault(group, []).insert(0, step)
        for root in step.roots:
            users.setdefault(root, set()).add(group)
    return [step if step.call else _joined(parts[step]) for step in steps if step in parts]


def _joined(steps: list[Step]) -> Step:
    """Several operations as one step."""
    inside = {value for step in steps for value in step.given}
    taken = [(value, shape) for step in steps for value, shape in step.taken
             if value and value.root not in inside]
    return Step(taken, steps[-1].given, names=list(dict.fromkeys(
        name for step in steps for name in step.names)))


def _operations(equation: Any) -> list[str]:
    """The operations of an equation, by symbols and names; none if it only moves numbers."""
    name = equation.primitive.name
    if name in _MOVES:
        return []
    if name in ("scan", "while", "cond") or not (inside := list(programs(equation))):
        return [_SYMBOLS.get(name, name)]
    found = [part for inner in inside for below in inner.eqns for part in _operations(below)]
    named = equation.params.get("name", "<").strip("_")
    return found if not found or named.startswith("<") else [named]


def _call(equation: Any) -> int | None:
    """The number of the call of a child that an equation stands for; None for others."""
    name = equation.params.get("name")
    marked = isinstance(name, str) and name.startswith(_MARK)
    return int(name.removeprefix(_MARK)) if marked else None


def _calls(jaxpr: Any) -> bool:
    """Does the program contain a call of a child?"""
    return any(_call(equation) is not None or any(map(_calls, programs(equation)))
               for equation in jaxpr.eqns)
