"""One primitive: a program is a Python function over layers, and is a layer itself.

Parameters, state, keys, the training flag, side inputs, streaming, names and error paths are
threaded here and nowhere else. The function is run in one of three ways: to plan (on shapes), to
apply, or to start streaming; what differs is only what happens when it calls a child.
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
    """Make a layer of a function over layers: ``y = f(layers, x, *, side inputs)``.

    Calling a child twice shares its parameters. Side inputs that the function names are routed by
    it; all others go to exactly the children that take them. A function that names ``train``
    receives the flag. Any JAX code may stand between the calls. Around a call it may only where the
    child has no state and draws nothing: inside of a `jax.vmap`, `jax.lax.scan`, `jax.checkpoint`
    or the like that the function opens, any other child is refused.

    Args:
        children: the layers, or plain functions, under the names used in the function.

    Raises:
        LayerError: at composition for a signature of another form or a forbidden name; at ``init``
            for a child that is never called, shared between inputs of different width, or called
            inside of a transformation with state; at ``apply``, if it draws there.

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
    children = {name: as_layer(f) for name, f in parts.items()}
    flagged = "train" in inspect.signature(function).parameters
    side = named.union(*(child.side for child in children.values())) - {"train"}

    def given_to(visit: Callable[..., Any], read: Callable[[str], Params], train: bool,
                 given: Mapping[str, Any]) -> tuple[dict[str, Child], dict[str, Any]]:
        """The children and the side inputs with which the function is run.

        It is called where it is run: nets are nested deeply, and Python's stack is short.
        """
        own = {n: given[n] for n in given.keys() & named} | ({"train": train} if flagged else {})
        routed = {n: given[n] for n in given.keys() - named}
        return {n: Child(n, child, visit, read, routed) for n, child in children.items()}, own

    @remember
    def planner(x: Any, given: dict[str, Any]) -> Plan:
        params: Params = {}
        state: State = {}
        calls: list[Call] = []

        def visit(name: str, nth: int, x: Any, side: dict[str, Any]) -> Any:
            plan = children[name].plan(x, **side)
            calls.append(Call(name, spec(x), spec(side)))
            for trees, tree in ((params, plan.params), (state, plan.state)):
                if trees.setdefault(name, tree) != tree:
                    first = next(call.x for call in calls if call.name == name)
                    raise LayerError("the same parameters in all its calls",
                                     f"{show(first)} first and {show(x)} later",
                                     "share it between inputs of one width")
            return blank(plan.y), plan.state, None

        def read(name: str) -> Params:
            if name not in params:
                raise LayerError(f"a call of layers.{name} before its params are read", "",
                                 f"call layers.{name} on a line before")
            return reader(children, *blank((params, state)))(name)

        def run(x: Any, given: dict[str, Any], train: bool) -> Any:
            seen, own = given_to(visit, read, train, given)
            return checked_result(function(Children(seen), x, **own))

        evaluate = lambda train: jax.eval_shape(  # noqa: E731
            functools.partial(run, train=train), x, given)
        y, at_rest = evaluate(False), list(calls)
        if flagged:
            evaluate(True)
        if idle := [n for n, child in children.items() if n not in params and not child.bare]:
            raise LayerError(f"a call of every child, {listed(idle)} too", "no call on this input",
                             f"give init every side input ({listed(side)}), or remove the child")
        in_training = [call for call in calls if call.name not in {c.name for c in at_rest}]
        return Plan(_full(params), _full(state), y, (*at_rest, *in_training))

    def init(key: jax.Array, x: Any, **given: Any) -> tuple[Params, State]:
        params, state = {}, {}
        for name, seen, side in planner(x, given).calls:
            if name not in params:
                with signed(children[name].__repr__, seen, name):  # some fail on values alone
                    params[name], state[name] = children[name].init(fold(key, name), seen, **side)
        return _full(params), _full(state)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **given: Any) -> tuple[Any, State]:
        check_children(params, state, children)
        new = dict(state)
        streaming: set[str] = set()

        def visit(name: str, nth: int, x: Any, side: dict[str, Any]) -> Any:
            child = children[name]
            parts = lambda tree: parted(child, tree, lambda: child._shaped(x, side)[1])  # noqa: E731
            if child.start and name in state and nth == 0 and parts(state[name])[1]:
                streaming.add(name)
            # What a stream carries belongs to the call, running statistics to the child.
            slot = slot_of(name, nth) if name in streaming else name
            if name in streaming and slot not in state:
                raise miscounted(name, nth + 1)
            own = None  # deterministic layers cost no key operations
            if child.random and key is not None:
                own = fold(key, name) if nth == 0 else jax.random.fold_in(fold(key, name), nth)
            later = slot != name
            statistics, first = parts(new[name]) if later else ({}, {})
            held = both(new.get(slot, {}), statistics)
            y, after = child.apply(params.get(name, {}), held, x, key=own, train=train, **side)
            if later:
                statistics, new[slot] = parts(after)
                new[name] = both(first, statistics)
            elif after:
                new[name] = after
            return y, after, own

        seen, own = given_to(visit, reader(children, params, state, train), train, given)
        y = checked_result(function(Children(seen), x, **own))
        for name, child in children.items():
            left = slot_of(name, calls := seen[name].calls)
            at_rest = lambda name=name: planner(spec(x), spec(given)).state.get(name, {})  # noqa: E731
            if left in state and (calls or parted(child, state[name], at_rest)[1]):
                raise miscounted(name, calls)
        return y, new

    def start(params: Params, state: State, x: Any, *, length: int, **given: Any) -> State:
        check_children(params, state, children)
        new = dict(state)

        def visit(name: str, nth: int, x: Any, side: dict[str, Any]) -> Any:
            child, own = children[name], (params.get(name, {}), state.get(name, {}))
            carried = child.start(*own, x, length=length, **side) if child.start else {}
            if carried:
                new[slot_of(name, nth)] = carried if nth == 0 else parted(
                    child, carried, lambda: child._shaped(x, side)[1])[1]
            return child.apply(*own, x, **side)[0], carried or own[1], None

        seen, own = given_to(visit, reader(children, params, state), False, given)
        checked_result(function(Children(seen), x, **own))
        return new

    inside = children.values()
    again = functools.partial(rebuild, children) if rebuild else functools.partial(
        wire, function, children, named, name=name)
    rebuild = rebuild or (lambda new: wire(function, new, named))
    return Layer(
        init, apply, start if any(child.start for child in inside) else None, children,
        rebuild,
        name=name or name_of(function),
        bare=all(child.bare for child in inside), random=any(child.random for child in inside),
        side=side, kept=frozenset().union(*(child.kept for child in inside)), planner=planner,
        within=lambda f: rebuild({name: f(child) for name, child in children.items()}),
        _call=again,
    )


def _full(trees: Mapping[str, Any]) -> dict[str, Any]:
    """The trees of children without those that are empty."""
    return {name: tree for name, tree in trees.items() if tree}
