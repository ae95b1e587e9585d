"""What every call is checked for, once, by the record: authors of layers write no such checks.

A call with another net's trees, a traced flag, a forgotten key, or a side input that nobody takes
is refused by name, before anything is computed. All of it happens while a call is traced, so a
compiled step pays nothing.
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
from diffprog.core.dtypes import is_float
from diffprog.core.errors import LayerError, signed
from diffprog.core.notation import called, listed, name_of, show
from diffprog.core.plans import Params, Plan, State, remember, spec
from diffprog.core.records import Record
from diffprog.core.streams import foreign

NOTHING: Any = inspect.Parameter.empty  # an argument that was not given

# What other libraries call what is no side input here.
_MEANT = {
    **dict.fromkeys(["rng", "rngs"], "pass key=jax.random.key(seed) to apply"),
    **dict.fromkeys(["deterministic", "inference", "train", "training"],
                    "pass train=True to apply in training: it reaches every layer"),
    **dict.fromkeys(["attn_mask", "padding_mask"],
                    "pass mask for which positions are real, attention_mask for who sees whom"),
    "stop": "pass stop_tokens to generate",
}

# Where the modules of other libraries are from, and what makes layers of them.
_FOREIGN = (
    ("flax.nnx.", "Module", "from_nnx"), ("flax.linen.", "Module", "from_linen"),
    ("equinox.", "Module", "from_equinox"), ("haiku.", "Transformed", "from_haiku"),
    ("haiku.", "TransformedWithState", "from_haiku"),
)


def guarded_plans(layer: Record, planner: Any, init: Any, apply: Any) -> tuple[Any, Any]:
    """`planner` on inputs that the layer can take, and the trees of its plan alone.

    Without a planner it is the pair under evaluation. The trees need no more than `init`, which is
    much the cheaper half: they are what a call asks for.
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
    """`raw`, which has seen no input that the layer cannot take."""

    def init(key: jax.Array, x: Any = NOTHING, **side: Any) -> tuple[Params, State]:
        with signed(layer.__repr__, x):
            _check_given("init(key, x)", x)
            check_key(key)
            layer.plan(x, **side)  # whatever is wrong with x shows here, before anything is drawn
            x, side = inputs(x), inputs(taken(layer, side))
            with _explained(lambda known: known.of_init(layer, raw, x, side)):
                return arrays(raw(key, x, **side))

    return _keeping(init, raw)


def guarded_apply(layer: Record, raw: Any) -> Any:
    """`raw`, called with trees of this layer alone; what else goes wrong is explained by them."""

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
                from diffprog.core.meshes import on_mesh  # which is of no use to most imports

                params, state = on_mesh((params, state))
            key = key if layer.random else None  # alone a layer is as random as inside a net
            with _explained(lambda known: (
                    check_kept((params, state)) or _misfit(layer, params, x, side)
                    or known.of_apply(layer, raw, params, state, x, side, key=key, train=train)),
                    (params, state, x, side)):
                y, after = _result(raw(params, state, x, key=key, train=train, **side))
            if jax.tree.structure(after) != jax.tree.structure(state):
                raise LayerError(f"a state of one structure, {show(state)}", show(after),
                                 "let apply return the state that came, with new values")
            return y, after

    return _keeping(apply, raw)


def guarded_start(layer: Record, raw: Any) -> Any:
    """`raw`, whose stream can be donated: it holds no array that was given, and none twice."""

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
                                 "give what is carried a name: {'carry': h}")
            return _distinct(carried, (params, state, x, side))

    return _keeping(start, raw)


@contextlib.contextmanager
def _explained(
    reason: Callable[[Any], LayerError | None], given: Any = ()
) -> Iterator[None]:
    """A block whose exception is told by its reason, if `diagnoses`, which `reason` is given, know.

    What stands in its way may also be how the arrays in `given` lie on an explicit mesh.
    """
    try:
        yield
    except LayerError:
        raise
    except Exception as error:
        if isinstance(error, (RuntimeError, ValueError)) and "has been deleted" in str(error):
            raise given_up() from error  # inside of jax.grad there is no array to be looked at
        from diffprog.core import diagnoses, meshes  # they serve errors alone

        if found := meshes.unplaced(error, given) or reason(diagnoses):
            raise found from error
        raise


def taken(layer: Record, given: Mapping[str, Any]) -> dict[str, Any]:
    """The side inputs that are there; None is absent, and what nobody takes is refused."""
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := given.keys() - layer.side:
        remedy = next((_MEANT[name] for name in sorted(unknown) if name in _MEANT),
                      "leave it out, or add a layer that takes it")
        raise LayerError(f"only side inputs that it takes ({listed(layer.side)})",
                         listed(unknown), remedy)
    return given


def inputs(x: Any) -> Any:
    """Shapes and dtypes of what the caller gave; what has none is refused."""
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
    """What JAX is tracing for now, to be compared: another one under every transformation."""
    from jax.extend.core import get_opaque_trace_state  # would make the import of diffprog heavy

    return get_opaque_trace_state()


def transformed(state: State) -> LayerError:
    """What is wrong with a call of a child under a transformation that its program opened."""
    what, why = (("has state or is tapped", "its new state would be lost") if state else
                 ("draws", "examples and steps would share one draw"))
    return LayerError(
        f"a call outside of the program's own transformations, as it {what}",
        "one inside of vmap, scan, cond, checkpoint, jit or the like",
        f"use ensemble, heads, repeat or remat, or put a layer of your own around both: {why}")


def check_short_form(x: Any, side: dict[str, Any]) -> None:
    """Refuse ``net(x)``, and training by ``net(params, x)``."""
    if x is NOTHING:
        raise LayerError("net(params, x)", "one argument",
                         "call layers.<name>(x), the child, inside a program, and "
                         "net(params, x) outside of one")
    if side.pop("train", False):
        raise LayerError("net.apply for training", "train=True in the short form",
                         "call net.apply: the short form would lose the new state")


def check_composable(f: Any) -> None:
    """Refuse what can be no part of a net: a factory that was not called, a list, a class.

    And a module of another library, whose parameters would be constants that nothing trains.
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
    """What makes a layer of a module of another library; "" for what is none."""
    for home, kind, by in _FOREIGN:
        if any(f"{base.__module__}.".startswith(home) and base.__name__ == kind
               for base in type(made).__mro__):
            # One of Equinox may wrap a function alone.
            held = by != "from_equinox" or any(map(is_float, jax.tree.leaves(made)))
            return by if held else ""
    return ""


def checked_result(y: Any) -> Any:
    """The result as it is, unless it is none: nothing, or a layer that was not called."""
    if y is None:
        raise LayerError("a result", "None", "end the function with return")
    if made := next((leaf for leaf in jax.tree.leaves(y) if callable(leaf)), None):
        raise LayerError("arrays as a result", f"the layer {made!r}", "use that layer itself"
                         if hasattr(made, "apply") else f"call it: {made!r}(x)")
    return y


def check_children(params: Params, state: State, children: Mapping[str, Any]) -> None:
    """Refuse trees with a name that is no child's; the children answer for what is in them."""
    for kind, given in (("params", params), ("state", state)):
        if others := {name for name in given if name.split("@")[0] not in children}:
            raise LayerError(f"{kind} of its children ({listed(children)})", listed(others),
                             "pass what init gave: this is of another net")


def _distinct(tree: State, given: Any) -> State:
    """The tree with copies of the arrays that were given, or that stand in it twice."""
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
                         "return the state that came if it does not change")
    checked_result(pair[0])
    return pair


def _keeping(checked: Any, raw: Any) -> Any:
    """The checked function, which remembers the one that it checks."""
    checked.raw = raw
    return checked


def _check_given(call: str, x: Any) -> None:
    if x is NOTHING:
        raise LayerError(f"net.{call}", "fewer arguments",
                         "pass them all: state is what init gave, {} if the net has none")


def _check_own(layer: Record) -> None:
    if layer.lent:
        raise LayerError(
            "a call of the whole net, which computes the parameters of its children",
            "one of this child alone, by what they are computed from",
            "take its output by tap(net, path), or call the child of the net without the wrapper "
            "on merge(net, params, state)")


def check_key(key: Any) -> None:
    """Raise unless it is one key, typed or raw."""
    dtype = getattr(key, "dtype", np.dtype(bool))
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = dtype == np.uint32 and key.shape in ((2,), (4,))  # as jax.random.PRNGKey makes them
    if not typed and not raw:
        raise LayerError("a key", show(key),
                         "pass jax.random.key(seed), and map over several by vmap")


def _check_call(
    layer: Record, params: Any, state: Any, x: Any, key: Any, train: Any, side: dict[str, Any],
) -> None:
    """Refuse what would be silently wrong: another net's trees, a traced flag, a missing key."""
    if not isinstance(train, bool):
        raise LayerError("train as a Python bool", show(train), "make it static under jax.jit: "
                         "jax.jit(net.apply, static_argnames='train')")
    if isinstance(params, tuple) and len(params) == 2:
        raise LayerError("params alone", "the pair (params, state)",
                         "unpack it: params, state = net.init(key, x)")
    for kind, given in (("params", params), ("state", state)):
        if not isinstance(given, dict):
            trained = hasattr(given, kind)  # a state of training
            raise LayerError(f"{kind} as a dict", type(given).__name__ if trained else show(given),
                             f"pass its own {kind}: state.{kind}" if trained else
                             "pass what init gave")
    if key is not None:
        check_key(key)
    if layer.children:
        return  # a program answers for its children's names, and they for their own
    if layer.random and train and key is None:
        raise LayerError("a key when train=True", "none", "pass key=jax.random.key(seed) to apply")
    _check_trees(layer, params, state, x, side)


def _check_trees(layer: Record, params: Any, state: Any, x: Any, side: dict[str, Any]) -> None:
    """Refuse names that are missing or foreign in the trees of a leaf, for such an input."""
    try:
        planned = layer._shaped(x, side)
    except Exception:
        if state and layer.kept - side.keys():
            return  # of what `start` has kept is more to know; the layer must know its own state
        raise
    if planned[0].keys() != params.keys():
        raise LayerError(f"params {listed(planned[0])}", listed(params), "pass what init gave")
    if planned[1].keys() - state.keys() or foreign(layer, params, state, planned[1], x, side):
        raise LayerError(f"state {listed(planned[1])}", listed(state),
                         "pass state=, as init gave it")


def _misfit(layer: Record, params: Params, x: Any, side: dict[str, Any]) -> LayerError | None:
    """Why a leaf failed, if it is that its parameters were made for another input.

    A part of `mixed` is handed parameters in another dtype than it would make.
    """
    if layer.children or layer.dtype is not None:
        return None
    try:
        return layer.plan(x, **side).difference(params)
    except LayerError as error:
        return error
    except Exception:
        return None  # it fails on shapes as well, so the parameters are not at fault
