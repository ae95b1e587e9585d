"""Checks of every call of a layer, made by the record: authors of layers write none of them.

A call with the trees of another net, a traced flag, a missing key, or an unknown side input raises
an error that names it, before anything is computed. Checks run while a call is traced, so a
compiled step costs nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import (
    arrays,
    check_kept,
    check_numbers,
    check_steps,
    given_up,
    is_array,
)
from diffprog.core.dtypes import is_float, is_key
from diffprog.core.errors import LayerError, signed
from diffprog.core.notation import called, listed, name_of, show
from diffprog.core.plans import Params, Plan, State, remember, spec
from diffprog.core.records import Record
from diffprog.core.streams import foreign

NOTHING: Any = inspect.Parameter.empty  # a missing argument

# Side inputs that do not exist, under their names in other libraries.
_MEANT = {
    **dict.fromkeys(["rng", "rngs"], "pass key=jax.random.key(seed) to apply"),
    **dict.fromkeys(["deterministic", "inference", "train", "training"],
                    "pass train=True to apply in training: it reaches every layer"),
    **dict.fromkeys(["attn_mask", "padding_mask"],
                    "pass mask for valid positions, attention_mask for which keys each query sees"),
    "stop": "pass stop_tokens to generate",
}

# The modules of other libraries, and the function that makes a layer of each.
_FOREIGN = (
    ("flax.nnx.", "Module", "from_nnx"), ("flax.linen.", "Module", "from_linen"),
    ("equinox.", "Module", "from_equinox"), ("haiku.", "Transformed", "from_haiku"),
    ("haiku.", "TransformedWithState", "from_haiku"),
)


def guarded_plans(layer: Record, planner: Any, init: Any, apply: Any) -> tuple[Any, Any]:
    """`planner` with checked inputs, and a cheaper function for the trees of the plan alone.

    Without a planner, the plan is `init` and `apply` under abstract evaluation. The trees need
    `init` alone, and a call needs no more than these.
    """

    @remember
    def evaluated(x: Any, side: dict[str, Any]) -> tuple[Params, State]:
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(lambda key: _trees(init(key, x, **side)), key)

    @remember
    def whole(x: Any, side: dict[str, Any]) -> Plan:
        run = lambda *given: _result(apply(*given[:3], **given[3]))  # noqa: E731
        trees = evaluated(x, side)
        return Plan(*trees, jax.eval_shape(run, *trees, x, side)[0])

    def trees(x: Any, side: dict[str, Any]) -> tuple[Params, State]:
        if planner is None:
            return evaluated(x, side)
        plan = planner(x, side)
        return plan.params, plan.state

    def checked(ask: Any) -> Any:
        def plan(x: Any, side: dict[str, Any]) -> Any:
            with signed(layer.__repr__, x):
                given = inputs(x), inputs(taken(layer, side))
                with _explained(lambda known: known.of_plan(layer, init, apply, *given)):
                    return ask(*given)

        return plan

    return checked(planner or whole), checked(trees)


def guarded_init(layer: Record, raw: Any) -> Any:
    """`raw` with checked inputs."""

    def init(key: jax.Array, x: Any = NOTHING, **side: Any) -> tuple[Params, State]:
        with signed(layer.__repr__, x):
            _check_given("init(key, x)", x)
            check_key(key)
            layer.plan(x, **side)  # an x that does not fit raises here, before any random draw
            x, side = inputs(x), inputs(taken(layer, side))
            with _explained(lambda known: known.of_init(layer, raw, x, side)):
                return arrays(raw(key, x, **side))

    return _keeping(init, raw)


def guarded_apply(layer: Record, raw: Any) -> Any:
    """`raw` with checked arguments; if it fails, the error explains a misfit of the parameters."""

    def apply(
        params: Params, state: State = NOTHING, x: Any = NOTHING, *,
        key: jax.Array | None = None, train: bool = False, **side: Any,
    ) -> tuple[Any, State]:
        with signed(layer.__repr__, x):
            _check_given("apply(params, state, x)", x)
            _check_own(layer)
            x, side = arrays((x, taken(layer, side)))
            _check_call(layer, params, state, x, key, train, side)
            params, state = arrays((params, state))
            if jax.sharding.get_abstract_mesh().explicit_axes:
                from diffprog.core.meshes import on_mesh  # most programs need no mesh

                params, state = on_mesh((params, state))
            key = key if layer.random else None  # as inside a net
            with _explained(lambda known: (
                    check_kept((params, state)) or _misfit(layer, params, x, side)
                    or known.of_apply(layer, raw, params, state, x, side, key=key, train=train)),
                    (params, state, x, side)):
                y, after = _result(raw(params, state, x, key=key, train=train, **side))
            if jax.tree.structure(after) != jax.tree.structure(state):
                raise LayerError(f"a state of unchanged structure, {show(state)}", show(after),
                                 "let apply return the given state, with new values")
            return y, after

    return _keeping(apply, raw)


def guarded_start(layer: Record, raw: Any) -> Any:
    """`raw`, with a result that can be donated: it shares no array with the arguments or itself."""

    def start(
        params: Params, state: State = NOTHING, x: Any = NOTHING, *, length: Any = None,
        **side: Any,
    ) -> State:
        with signed(layer.__repr__, x):
            _check_given("start(params, state, x, length=n)", x)
            _check_own(layer)
            check_steps(length)
            x, side = arrays((x, taken(layer, side)))
            _check_call(layer, params, state, x, None, False, side)
            params, state = arrays((params, state))
            carried = raw(params, state, x, length=length, **side)
            if not isinstance(carried, dict):
                raise LayerError("a start that returns a dict", show(carried),
                                 "name what is carried: {'carry': h}")
            return _distinct(carried, (params, state, x, side))

    return _keeping(start, raw)


@contextlib.contextmanager
def _explained(
    reason: Callable[[Any], LayerError | None], given: Any = ()
) -> Iterator[None]:
    """A block whose exception is replaced by its cause, if ``reason(diagnoses)`` finds one.

    The cause may also be the placement of the arrays in `given` on an explicit mesh.
    """
    try:
        yield
    except LayerError:
        raise
    except Exception as error:
        if isinstance(error, (RuntimeError, ValueError)) and "has been deleted" in str(error):
            raise given_up() from error  # under jax.grad there is no array to inspect
        from diffprog.core import diagnoses, meshes  # needed for errors only

        if found := meshes.unplaced(error, given) or reason(diagnoses):
            raise found from error
        raise


def taken(layer: Record, given: Mapping[str, Any]) -> dict[str, Any]:
    """The side inputs without those that are None; unknown ones raise."""
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := given.keys() - layer.side:
        remedy = next((_MEANT[name] for name in sorted(unknown) if name in _MEANT),
                      "leave it out, or add a layer that takes it")
        raise LayerError(f"only side inputs that it takes ({listed(layer.side)})",
                         listed(unknown), remedy)
    return given


def inputs(x: Any) -> Any:
    """Shapes and dtypes of the arguments; raise for what is no array."""
    if isinstance(x, (tuple, list)) and x and all(isinstance(n, int) for n in x):
        raise LayerError("an array or a jax.ShapeDtypeStruct", f"the shape {x}",
                         f"write jax.ShapeDtypeStruct({tuple(x)}, jnp.float32)")
    for leaf in jax.tree.leaves(x):
        if not is_array(leaf):
            raise LayerError("arrays or jax.ShapeDtypeStructs", show(leaf), "use jnp.asarray")
        if isinstance(leaf, (np.ndarray, np.generic)):
            check_numbers(leaf)
    return spec(x)


def trace() -> Any:
    """The current trace of JAX, to be compared: each transformation has its own."""
    from jax.extend.core import get_opaque_trace_state  # a heavy import

    return get_opaque_trace_state()


def transformed(state: State) -> LayerError:
    """The error for a child called inside a transformation that its own program opened."""
    what, why = (("has state or is tapped", "its new state would be lost") if state else
                 ("draws", "examples and steps would share one draw"))
    return LayerError(
        f"a call outside the program's own transformations, as it {what}",
        "one inside of vmap, scan, cond, checkpoint, jit or the like",
        f"use ensemble, heads, repeat or remat, or put a layer of your own around both: {why}")


def check_short_form(x: Any, side: dict[str, Any]) -> None:
    """Raise for ``net(x)``, and for training by ``net(params, x)``."""
    if x is NOTHING:
        raise LayerError("net(params, x)", "one argument",
                         "call layers.<name>(x), the child, inside a program, and "
                         "net(params, x) outside of one")
    if side.pop("train", False):
        raise LayerError("net.apply for training", "train=True in the short form",
                         "call net.apply: the short form would lose the new state")


def check_composable(f: Any) -> None:
    """Raise for what cannot be part of a net: a factory that was not called, a list, a class.

    Modules of other libraries raise too: their parameters would be constants, never trained.
    """
    made = called(f)
    if re.search(r"\bLayer\b", str(getattr(made, "__annotations__", {}).get("return"))):
        raise LayerError("a layer", f"the function {name_of(f)}", f"call it: {name_of(f)}(...)")
    while (inner := called(inspect.unwrap(made))) is not made:
        made = inner  # of `jax.vmap(module)`
    owner = getattr(made, "__self__", made)  # of a method
    if by := _foreign(owner):
        raise LayerError("a layer, or a function without parameters of its own",
                         f"{type(owner).__name__} of another library",
                         f"write dp.interop.{by}(...): a function's parameters are never trained")
    if isinstance(made, np.ufunc):
        raise LayerError("a function that JAX can trace", f"np.{made.__name__}",
                         f"write jnp.{made.__name__}")
    if isinstance(f, (tuple, list)):
        raise LayerError("a layer", show(f), "write serial(a, b) for a sequence of layers, "
                         "and Layer(init, apply) for a pair of functions")
    if not callable(f) or isinstance(f, type):
        raise LayerError("a layer or a function of one input", show(f),
                         "pass dp.linear(8) or jax.nn.relu, for example")


def _foreign(made: Any) -> str:
    """The function that makes a layer of a module of another library; "" if it is no module."""
    for home, kind, by in _FOREIGN:
        if any(f"{base.__module__}.".startswith(home) and base.__name__ == kind
               for base in type(made).__mro__):
            # A module of Equinox may hold no parameters, but wrap a function.
            held = by != "from_equinox" or any(map(is_float, jax.tree.leaves(made)))
            return by if held else ""
    return ""


def checked_result(y: Any) -> Any:
    """The result of a program's function; raise for None and for a layer that was not called."""
    if y is None:
        raise LayerError("a result", "None", "end the function with return")
    if made := next((leaf for leaf in jax.tree.leaves(y) if callable(leaf)), None):
        raise LayerError("arrays as a result", f"the layer {made!r}", "use that layer itself"
                         if hasattr(made, "apply") else f"call it: {made!r}(x)")
    return y


def check_children(params: Params, state: State, children: Mapping[str, Any]) -> None:
    """Raise for names that are no child's; each child checks its own trees."""
    for kind, given in (("params", params), ("state", state)):
        if others := {name for name in given if name.split("@")[0] not in children}:
            raise LayerError(f"{kind} of its children ({listed(children)})", listed(others),
                             "pass what init returned: this belongs to another net")


def _distinct(tree: State, given: Any) -> State:
    """The tree with copies of arrays that occur in `given`, or twice in the tree."""
    seen = set(map(id, jax.tree.leaves(given)))

    def own(leaf: Any) -> Any:
        leaf = jnp.copy(leaf) if id(leaf) in seen else leaf
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)


def _trees(pair: Any) -> tuple[Params, State]:
    two = isinstance(pair, tuple) and len(pair) == 2
    if not (two and isinstance(pair[0], dict) and isinstance(pair[1], dict)):
        raise LayerError("init to return (params, state), two dicts", show(pair),
                         "return an empty dict for none")
    return pair


def _result(pair: Any) -> tuple[Any, State]:
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], dict)):
        raise LayerError("apply to return (y, state)", show(pair),
                         "return the given state if it does not change")
    checked_result(pair[0])
    return pair


def _keeping(checked: Any, raw: Any) -> Any:
    """The checked function, with the original as its attribute `raw`."""
    checked.raw = raw
    return checked


def _check_given(call: str, x: Any) -> None:
    if x is NOTHING:
        raise LayerError(f"net.{call}", "fewer arguments",
                         "pass them all: state is what init returned, {} if the net has none")


def _check_own(layer: Record) -> None:
    if layer.lent:
        raise LayerError(
            "a call of the whole net, which computes the parameters of its children",
            "a call of one child, whose own parameters are not computed yet",
            "take its output by tap(net, path), or call the child of the net without the wrapper "
            "on merge(net, params, state)")


def check_key(key: Any) -> None:
    """Raise unless it is one key, typed or raw."""
    typed = is_key(key) and key.shape == ()
    # Raw ones as jax.random.PRNGKey makes them.
    raw = getattr(key, "dtype", None) == np.uint32 and key.shape in ((2,), (4,))
    if not typed and not raw:
        raise LayerError("a key", show(key),
                         "pass jax.random.key(seed), and map over several by vmap")


def _check_call(
    layer: Record, params: Any, state: Any, x: Any, key: Any, train: Any, side: dict[str, Any],
) -> None:
    """Raise for calls that would be silently wrong: other trees, a traced flag, a missing key."""
    if not isinstance(train, bool):
        raise LayerError("train as a Python bool", show(train), "make it static under jax.jit: "
                         "jax.jit(net.apply, static_argnames='train')")
    if isinstance(params, tuple) and len(params) == 2:
        raise LayerError("params alone", "the pair (params, state)",
                         "unpack it: params, state = net.init(key, x)")
    for kind, given in (("params", params), ("state", state)):
        if not isinstance(given, dict):
            trained = hasattr(given, kind)  # a TrainState
            raise LayerError(f"{kind} as a dict", type(given).__name__ if trained else show(given),
                             f"pass its own {kind}: state.{kind}" if trained else
                             "pass what init returned")
    if key is not None:
        check_key(key)
    if layer.children:
        return  # a program checks the names of its children, and they check their own
    if layer.random and train and key is None:
        raise LayerError("a key when train=True", "none", "pass key=jax.random.key(seed) to apply")
    _check_trees(layer, params, state, x, side)


def _check_trees(layer: Record, params: Any, state: Any, x: Any, side: dict[str, Any]) -> None:
    """Raise for missing or unknown names in the trees of a layer without children."""
    try:
        planned = layer._shaped(x, side)
    except Exception:
        if state and layer.kept - side.keys():
            return  # the plan needs side inputs that the stream keeps
        raise
    if planned[0].keys() != params.keys():
        raise LayerError(f"params {listed(planned[0])}", listed(params), "pass what init returned")
    if planned[1].keys() - state.keys() or foreign(layer, params, state, planned[1], x, side):
        raise LayerError(f"state {listed(planned[1])}", listed(state),
                         "pass state=, as init returned it")


def _misfit(layer: Record, params: Params, x: Any, side: dict[str, Any]) -> LayerError | None:
    """The error if parameters were initialized for another input, for a layer without children.

    A part of `mixed` is skipped: it gets parameters in another dtype than it would initialize.
    """
    if layer.children or layer.dtype is not None:
        return None
    try:
        return layer.plan(x, **side).difference(params)
    except LayerError as error:
        return error
    except Exception:
        return None  # the plan fails too, so the parameters are not the cause
