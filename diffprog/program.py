"""One primitive: a program is a Python function over layers, and is a layer itself.

Parameters, state, keys, the training flag, side inputs, streaming, names and error paths are
threaded here and nowhere else. The function is run in one of three ways: to plan (on shapes), to
apply, or to start streaming; what differs is only what happens when it calls a child.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.errors import LayerError, lengthen, sign
from diffprog.layer import Layer, as_layer
from diffprog.notation import listed, show
from diffprog.parameters import fold
from diffprog.plans import Call, Params, Plan, State, remember, spec

_RESERVED = frozenset({"params", "state", "x", "key", "length"})
_FORBIDDEN = "/*@~#"  # they mean something in paths


class Child:
    """A child as the program's function sees it: called with x and side inputs alone."""

    def __init__(self, call: Callable[..., Any], read: Callable[[], Params]) -> None:
        self._call, self._read = call, read

    def __call__(self, x: Any, **side: Any) -> Any:
        """The child's output on x."""
        return self._call(x, side)

    @property
    def params(self) -> Params:
        """The child's parameters, to be read after it was called."""
        return self._read()


class Children:
    """The children of a program, by attribute, by name in brackets, or in order."""

    def __init__(self, children: dict[str, Child]) -> None:
        self._children = children

    def __getitem__(self, name: str) -> Child:
        if name not in self._children:
            raise LayerError(f"one of its children ({listed(self._children)})", f"layers.{name}",
                             "correct the name, or add the child")
        return self._children[name]

    __getattr__ = __getitem__

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children.values())

    def __len__(self) -> int:
        return len(self._children)


def program(**children: Any) -> Callable[[Callable[..., Any]], Layer]:
    """Make a layer of a function over layers: ``y = f(layers, x, *, side inputs)``.

    Calling a child twice shares its parameters. Side inputs that the function names are routed by
    it; all others go to exactly the children that take them. A function that names ``train``
    receives the flag. Any JAX code may stand between the calls.

    Args:
        children: the layers, or plain functions, under the names used in the function.

    Raises:
        LayerError: at composition for a signature of another form or a forbidden name; at ``init``
            for a child that is never called, or shared between inputs of different width.

    Example:
        >>> @dp.program(norm=dp.layer_norm(), feed=dp.linear(4))
        ... def block(layers, x):
        ...     return x + layers.feed(layers.norm(x))
        >>> params, state = block.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(params)
        ['feed', 'norm']
    """
    layers = {name: as_layer(f) for name, f in children.items()}
    check_names(layers)

    def lift(function: Callable[..., Any]) -> Layer:
        return wire(function, layers, _named_side(function))

    return lift


def wire(
    function: Callable[..., Any], children: Mapping[str, Layer],
    named: frozenset[str] = frozenset(), *, name: str | None = None,
    rebuild: Callable[[Mapping[str, Layer]], Layer] | None = None,
) -> Layer:
    """The layer of a function over named children; `named` are the side inputs it names."""
    asks = "train" in inspect.signature(function).parameters
    side = named.union(*(child.side for child in children.values())) - {"train"}
    streams = any(child.start for child in children.values())

    def run(call: Callable[..., Any], read: Callable[[str], Params], x: Any, train: bool,
            given: dict[str, Any]) -> Any:
        """Run the function; `call(name, child, x, side)` is what a call of a child does."""
        rest = {name: value for name, value in given.items() if name not in named}

        def child_of(name: str, child: Layer) -> Child:
            routed = {n: value for n, value in rest.items() if n in child.side}

            def called(x: Any, own: dict[str, Any]) -> Any:
                try:
                    return call(name, child, x, child._taken(routed | own))
                except Exception as error:
                    sign(error, repr(child), x)
                    lengthen(error, name)
                    raise

            return Child(called, lambda: read(name))

        layers = Children({name: child_of(name, child) for name, child in children.items()})
        own = {name: value for name, value in given.items() if name in named}
        y = function(layers, x, **({"train": train} if asks else {}), **own)
        if y is None:
            raise LayerError("a result", "None", "end the program with return")
        return y

    @remember
    def planner(x: Any, given: dict[str, Any]) -> Plan:
        params: Params = {}
        state: State = {}
        calls: list[Call] = []

        def call(name: str, child: Layer, x: Any, side: dict[str, Any]) -> Any:
            plan = child.plan(x, **side)
            calls.append(Call(name, spec(x), spec(side)))
            for trees, tree in ((params, plan.params), (state, plan.state)):
                if trees.setdefault(name, tree) != tree:
                    first = next(call.x for call in calls if call.name == name)
                    raise LayerError("the same parameters in all its calls",
                                     f"{show(first)} first and {show(x)} later",
                                     "share it between inputs of one width")
            return _blank(plan.y)

        def read(name: str) -> Params:
            if name not in params:
                raise LayerError(f"a call of layers.{name} before its params are read", "",
                                 f"call layers.{name} on a line before")
            return _blank(params[name])

        evaluate = lambda train: jax.eval_shape(  # noqa: E731
            lambda x, given: run(call, read, x, train, given), x, given)
        y = evaluate(False)
        at_rest = tuple(calls)
        if asks:
            evaluate(True)
        if idle := [n for n, child in children.items() if n not in params and not child.bare]:
            raise LayerError(f"a call of every child, {listed(idle)} too", "no call on this input",
                             f"give init every side input ({listed(side)}), or remove the child")
        full = lambda trees: {name: tree for name, tree in trees.items() if tree}  # noqa: E731
        known = {call.name for call in at_rest}
        only_training = tuple(call for call in calls if call.name not in known)
        return Plan(full(params), full(state), y, at_rest + only_training)

    def init(key: jax.Array, x: Any, **given: Any) -> tuple[Params, State]:
        params, state = {}, {}
        called = {call.name: call for call in planner(x, given).calls}
        for name, seen, side in called.values():
            trees = children[name].init(fold(key, name), seen, **side)
            for whole, tree in zip((params, state), trees, strict=True):
                if tree:
                    whole[name] = tree
        return params, state

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **given: Any) -> tuple[Any, State]:
        _check_trees(params, state, children)
        new, count = dict(state), dict.fromkeys(children, 0)
        streaming = {name for name in children if _slot(name, 1) in state or
                     (name in state and jax.tree.structure(state[name]) in started)}

        def call(name: str, child: Layer, x: Any, side: dict[str, Any]) -> Any:
            nth, count[name] = count[name], count[name] + 1
            slot = _slot(name, nth) if name in streaming else name
            if name in streaming and slot not in state:
                raise LayerError(f"as many calls of {name} as start made", f"{nth + 1}",
                                 "start anew with the same inputs")
            if child.random and key is not None:
                own = fold(key, name) if nth == 0 else jax.random.fold_in(fold(key, name), nth)
            else:
                own = None  # deterministic layers cost no key operations
            y, after = child.apply(
                params.get(name, {}), new.get(slot, {}), x, key=own, train=train, **side)
            if after:
                new[slot] = after
            return y

        y = run(call, lambda name: params[name], x, train, given)
        for name, calls in count.items():
            if name in streaming and (calls == 0 or _slot(name, calls) in state):
                raise LayerError(f"as many calls of {name} as start made", f"{calls}",
                                 "start anew with the same inputs")
        return y, new

    # What tells a streaming state from running statistics, which all calls of a child share.
    started: set[Any] = set()

    def start(params: Params, state: State, x: Any, *, length: int, **given: Any) -> State:
        _check_trees(params, state, children)
        new, count = dict(state), dict.fromkeys(children, 0)

        def call(name: str, child: Layer, x: Any, side: dict[str, Any]) -> Any:
            nth, count[name] = count[name], count[name] + 1
            p, s = params.get(name, {}), state.get(name, {})
            if child.start and (carried := child.start(p, s, x, length=length, **side)):
                new[_slot(name, nth)] = carried
                if jax.tree.structure(carried) != jax.tree.structure(s):
                    started.add(jax.tree.structure(carried))
            return child.apply(p, s, x, **side)[0]

        run(call, lambda name: params[name], x, False, given)
        return new

    return Layer(
        init, apply, start if streams else None, dict(children),
        rebuild or (lambda new: wire(function, new, named)),
        name=name or function.__name__.strip("<>_"),
        bare=all(child.bare for child in children.values()),
        random=any(child.random for child in children.values()),
        side=side, planner=planner,
    )


def check_names(names: Mapping[str, Any]) -> None:
    """Raise for a name that a path pattern could not tell from its own signs."""
    for name in names:
        if not name or name.startswith("_") or any(sign in name for sign in _FORBIDDEN):
            raise LayerError(f"a name without leading _ and {' '.join(_FORBIDDEN)}", repr(name),
                             "rename it: these signs mean something in paths")


def _named_side(function: Callable[..., Any]) -> frozenset[str]:
    """The side inputs that a program's function names, after its signature is checked."""
    parameters = inspect.signature(function).parameters.values()
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    if len(plain) != 2 or len(plain) + len(named) != len(parameters):
        raise LayerError("a program f(layers, x, *, side inputs)",
                         f"{function.__name__}{inspect.signature(function)}",
                         "put side inputs after the star")
    if taken := named & _RESERVED:
        raise LayerError(f"side inputs of other names than {listed(_RESERVED)}", listed(taken),
                         "rename them")
    return named - {"train"}


def _check_trees(params: Params, state: State, children: Mapping[str, Layer]) -> None:
    for kind, given in (("params", params), ("state", state)):
        if foreign := {name for name in given if name.split("@")[0] not in children}:
            raise LayerError(f"{kind} of its children ({listed(children)})", listed(foreign),
                             f"these {kind} are of another net; pass what init gave")


def _slot(name: str, nth: int) -> str:
    """Where the state of the nth call of a child is kept: streaming state belongs to the call."""
    return f"{name}@{nth}" if nth else name


def _blank(tree: Any) -> Any:
    """Zeros in place of shapes, for a function that is evaluated abstractly."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)
