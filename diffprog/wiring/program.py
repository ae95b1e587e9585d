"""The one primitive: a program is a Python function over layers, and a layer itself.

Parameters, state, keys, the training flag, side inputs, streams, names and error paths are threaded
here and nowhere else. The function runs in three ways: to plan (on shapes), to apply, and to start
a stream; they differ only in what a call of a child does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffprog.core.arguments import check_names
from diffprog.core.errors import LayerError, signed
from diffprog.core.guards import check_children, checked_result
from diffprog.core.layer import Layer, as_layer
from diffprog.core.nets import reader
from diffprog.core.notation import listed, name_of, show
from diffprog.core.parameters import fold
from diffprog.core.paths import both
from diffprog.core.plans import Call, Params, Plan, State, blank, remember, spec
from diffprog.core.streams import miscounted, parted
from diffprog.wiring.children import Child, Children, named_side, slot_of

__all__ = ["program"]


def program(**children: Any) -> Callable[[Callable[..., Any]], Layer]:
    """A decorator that makes a layer of a function over layers: ``y = f(layers, x, **side)``.

    Calling a child twice shares its parameters. Side inputs (keyword inputs such as ``mask``) in
    the function's signature go to the function, which passes them on itself; all others go to every
    child that accepts them. A function with an argument ``train`` receives the training flag. Any
    JAX code may stand between the calls. Inside a `jax.vmap`, `jax.lax.scan`, `jax.checkpoint` or
    the like inside the function, it may call only stateless, deterministic children; others raise.

    Args:
        children: the layers, or plain functions, under the names used in the function.

    Raises:
        LayerError: at composition, a wrong signature or a reserved name; at ``init``, a child that
            is never called, is called on inputs of different width, or has state and is called
            inside a transformation; at ``apply``, a random child called inside one.

    Example:
        >>> @dp.program(norm=dp.layer_norm(), feed=dp.linear(4))
        ... def block(layers, x):
        ...     return x + layers.feed(layers.norm(x))
        >>> params, state = block.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(params)
        ['feed', 'norm']
    """
    check_names(children)
    children = {name: as_layer(f) for name, f in children.items()}
    return lambda function: wire(function, children, named_side(function))


def wire(
    function: Callable[..., Any], parts: Mapping[str, Any],
    named: frozenset[str] = frozenset(), *, name: str | None = None,
    rebuild: Callable[[Mapping[str, Layer]], Layer] | None = None,
) -> Layer:
    """The layer of a function over named children; `named` are the side inputs it names."""
    program = _Program(function, {name: as_layer(f) for name, f in parts.items()}, named)
    children, inside = program.children, program.children.values()
    again = functools.partial(rebuild, children) if rebuild else functools.partial(
        wire, function, children, named, name=name)
    rebuild = rebuild or (lambda new: wire(function, new, named))
    return Layer(
        program.init, program.apply, program.start if any(child.start for child in inside) else
        None, children, rebuild,
        name=name or name_of(function),
        bare=all(child.bare for child in inside), random=any(child.random for child in inside),
        side=program.side, kept=frozenset().union(*(child.kept for child in inside)),
        planner=program.plan,
        within=lambda f: rebuild({name: f(child) for name, child in children.items()}),
        _call=again,
    )


class _Program:
    """A function over named children, run to plan, to apply, and to start a stream.

    `_Planning`, `_Applying` and `_Starting` say what a call of a child does (`visit`).
    """

    def __init__(
        self, function: Callable[..., Any], children: dict[str, Layer], named: frozenset[str]
    ) -> None:
        self.function, self.children, self.named = function, children, named
        self.flagged = "train" in inspect.signature(function).parameters
        self.side = named.union(*(child.side for child in children.values())) - {"train"}
        self.plan = remember(self._plan)

    def arguments(
        self, visit: Callable[..., Any], read: Callable[[str], Params], train: bool,
        side: Mapping[str, Any],
    ) -> tuple[dict[str, Child], dict[str, Any]]:
        """The children and the side inputs with which the function is called.

        The caller calls it: nets are nested deeply, and Python's stack is short.
        """
        own = {name: side[name] for name in side.keys() & self.named}
        if self.flagged:
            own["train"] = train
        routed = {name: side[name] for name in side.keys() - self.named}
        seen = {name: Child(name, child, visit, read, routed)
                for name, child in self.children.items()}
        return seen, own

    def _plan(self, x: Any, side: dict[str, Any]) -> Plan:
        planning = _Planning(self.children)

        def run(x: Any, side: dict[str, Any], train: bool) -> Any:
            seen, own = self.arguments(planning.visit, planning.read, train, side)
            return checked_result(self.function(Children(seen), x, **own))

        y = jax.eval_shape(functools.partial(run, train=False), x, side)
        inference = list(planning.calls)
        if self.flagged:
            jax.eval_shape(functools.partial(run, train=True), x, side)
        called = {call.name for call in inference}
        training = [call for call in planning.calls if call.name not in called]
        idle = [name for name, child in self.children.items()
                if name not in planning.params and not child.bare]
        if idle:
            raise LayerError(
                f"a call of every child, {listed(idle)} too", "no call on this input",
                f"give init every side input ({listed(self.side)}), or remove the child")
        return Plan(_nonempty(planning.params), _nonempty(planning.state), y,
                    (*inference, *training))

    def init(self, key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        """Each child on the input of its first call, by a key of its own name."""
        params, state = {}, {}
        for name, seen, beside in self.plan(x, side).calls:
            if name not in params:
                with signed(self.children[name].__repr__, seen, name):  # some raise on values only
                    params[name], state[name] = self.children[name].init(
                        fold(key, name), seen, **beside)
        return _nonempty(params), _nonempty(state)

    def apply(
        self, params: Params, state: State, x: Any, *, key: jax.Array | None = None,
        train: bool = False, **side: Any,
    ) -> tuple[Any, State]:
        """The function's result, and the state with that of each child after its call."""
        check_children(params, state, self.children)
        applying = _Applying(self.children, params, state, key, train)
        read = reader(self.children, params, state, train)
        seen, own = self.arguments(applying.visit, read, train, side)
        y = checked_result(self.function(Children(seen), x, **own))
        for name, child in self.children.items():
            calls = seen[name].calls
            initial = lambda name=name: self.plan(spec(x), spec(side)).state.get(name, {})  # noqa: E731
            if slot_of(name, calls) in state and (calls or parted(child, state[name], initial)[1]):
                raise miscounted(name, calls)
        return y, applying.new

    def start(
        self, params: Params, state: State, x: Any, *, length: int, **side: Any
    ) -> State:
        """The state with the carry of each call of a child that streams."""
        check_children(params, state, self.children)
        starting = _Starting(self.children, params, state, length)
        seen, own = self.arguments(
            starting.visit, reader(self.children, params, state), False, side)
        checked_result(self.function(Children(seen), x, **own))
        return starting.new


class _Planning:
    """Calls of children on shapes: they add to the trees and to the list of calls."""

    def __init__(self, children: Mapping[str, Layer]) -> None:
        self.children = children
        self.params: Params = {}
        self.state: State = {}
        self.calls: list[Call] = []

    def visit(self, name: str, nth: int, x: Any, side: dict[str, Any]) -> Any:
        """Zeros in the shape of the output, the shapes of the state, and no key."""
        plan = self.children[name].plan(x, **side)
        self.calls.append(Call(name, spec(x), spec(side)))
        for trees, tree in ((self.params, plan.params), (self.state, plan.state)):
            if trees.setdefault(name, tree) != tree:
                first = next(call.x for call in self.calls if call.name == name)
                raise LayerError("the same parameters in all its calls",
                                 f"{show(first)} first and {show(x)} later",
                                 "share it between inputs of one width")
        return blank(plan.y), plan.state, None

    def read(self, name: str) -> Params:
        """Zeros in the shapes of the parameters of a child that was called before."""
        if name not in self.params:
            raise LayerError(f"a call of layers.{name} before its params are read", "",
                             f"call layers.{name} on a line before")
        return reader(self.children, *blank((self.params, self.state)))(name)


class _Applying:
    """Calls of children on values: each replaces its state in `new`.

    The carry of a stream belongs to a call, so the nth call has a slot of its own; running
    statistics belong to the child, and are in the slot of the first.
    """

    def __init__(
        self, children: Mapping[str, Layer], params: Params, state: State,
        key: jax.Array | None, train: bool,
    ) -> None:
        self.children, self.params, self.state = children, params, state
        self.key, self.train = key, train
        self.new = dict(state)
        self.streaming: set[str] = set()

    def visit(self, name: str, nth: int, x: Any, side: dict[str, Any]) -> Any:
        """The output, the new state, and the key of the call."""
        child = self.children[name]
        parts = lambda tree: parted(child, tree, lambda: child._shaped(x, side)[1])  # noqa: E731
        if child.start and name in self.state and nth == 0 and parts(self.state[name])[1]:
            self.streaming.add(name)
        slot = slot_of(name, nth) if name in self.streaming else name
        if name in self.streaming and slot not in self.state:
            raise miscounted(name, nth + 1)
        key = None  # deterministic layers cost no key operations
        if child.random and self.key is not None:
            key = fold(self.key, name)
            key = key if nth == 0 else jax.random.fold_in(key, nth)
        later = slot != name
        statistics, carry = parts(self.new[name]) if later else ({}, {})
        held = both(self.new.get(slot, {}), statistics)
        y, after = child.apply(
            self.params.get(name, {}), held, x, key=key, train=self.train, **side)
        if later:
            statistics, self.new[slot] = parts(after)
            self.new[name] = both(carry, statistics)
        elif after:
            self.new[name] = after
        return y, after, key


class _Starting:
    """Calls of children that begin a stream: each adds its carry to `new`."""

    def __init__(
        self, children: Mapping[str, Layer], params: Params, state: State, length: int
    ) -> None:
        self.children, self.params, self.state, self.length = children, params, state, length
        self.new = dict(state)

    def visit(self, name: str, nth: int, x: Any, side: dict[str, Any]) -> Any:
        """The output without a stream, the carry, and no key."""
        child, own = self.children[name], (self.params.get(name, {}), self.state.get(name, {}))
        carried = child.start(*own, x, length=self.length, **side) if child.start else {}
        if carried:
            self.new[slot_of(name, nth)] = carried if nth == 0 else parted(
                child, carried, lambda: child._shaped(x, side)[1])[1]
        return child.apply(*own, x, **side)[0], carried or own[1], None


def _nonempty(trees: Mapping[str, Any]) -> dict[str, Any]:
    """The trees of children without those that are empty."""
    return {name: tree for name, tree in trees.items() if tree}
