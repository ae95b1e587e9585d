"""What every call is checked for, once, by the record: authors of layers write no such checks.

A call with another net's trees, a traced flag, a forgotten key, or a side input that nobody takes
is refused by name, before anything is computed. All of it happens while a call is traced, so a
compiled step pays nothing.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.arguments import check_steps, held
from diffprog.errors import LayerError, signed
from diffprog.notation import listed, show
from diffprog.plans import Params, Plan, State, remember, spec

if TYPE_CHECKING:
    from diffprog.layer import Layer

NOTHING: Any = inspect.Parameter.empty  # an argument that was not given

# What other libraries call what is no side input here.
_MEANT = {
    **dict.fromkeys(["rng", "rngs"], "pass key=jax.random.key(seed) to apply"),
    **dict.fromkeys(["deterministic", "inference", "train", "training"],
                    "pass train=True to apply in training: it reaches every layer"),
    **dict.fromkeys(["attn_mask", "padding_mask"],
                    "pass mask for which positions are real, attention_mask for who sees whom"),
}


def guarded_plan(layer: Layer, planner: Any, init: Any, apply: Any) -> Any:
    """`planner` on inputs that the layer can take; without one, the pair under evaluation."""
    planner = planner or remember(functools.partial(_evaluated, init, apply))

    def plan(x: Any, side: dict[str, Any]) -> Plan:
        with signed(layer.__repr__, x):
            plan = planner(inputs(x), inputs(taken(layer, side)))
        layer._known.update(params=frozenset(plan.params), state=frozenset(plan.state),
                            rest=jax.tree.structure(plan.state))
        return plan

    return plan


def guarded_init(layer: Layer, raw: Any) -> Any:
    """`raw`, which has seen no input that the layer cannot take."""

    def init(key: jax.Array, x: Any = NOTHING, **side: Any) -> tuple[Params, State]:
        with signed(layer.__repr__, x):
            _check_given("init(key, x)", x)
            _check_key(key)
            layer.plan(x, **side)  # whatever is wrong with x shows here, before anything is drawn
            return raw(key, inputs(x), **inputs(taken(layer, side)))

    return _keeping(init, raw)


def guarded_apply(layer: Layer, raw: Any) -> Any:
    """`raw`, called with trees of this layer alone; what else goes wrong is explained by them."""

    def apply(
        params: Params, state: State = NOTHING, x: Any = NOTHING, *,
        key: jax.Array | None = None, train: bool = False, **side: Any,
    ) -> tuple[Any, State]:
        with signed(layer.__repr__, x):
            _check_given("apply(params, state, x)", x)
            _check_own(layer)
            x, side = held((x, taken(layer, side)))
            _check_call(layer, params, state, x, key, train, side)
            if jax.sharding.get_abstract_mesh().explicit_axes:
                params, state = _on_mesh((params, state))
            key = key if layer.random else None  # alone a layer is as random as inside a net
            try:
                y, after = _result(raw(params, state, x, key=key, train=train, **side))
            except LayerError:
                raise
            except Exception as error:
                if misfit := _misfit(layer, params, state, x, side, error):
                    raise misfit from error
                raise
            if jax.tree.structure(after) != jax.tree.structure(state):
                raise LayerError(f"a state of one structure, {show(state)}", show(after),
                                 "let apply return the state that came, with new values")
            return y, after

    return _keeping(apply, raw)


def guarded_start(layer: Layer, raw: Any) -> Any:
    """`raw`, which notes the names of what it carries: `apply` knows them again.

    A stream can be donated: it holds no array that was given, and none twice.
    """

    def start(
        params: Params, state: State = NOTHING, x: Any = NOTHING, *, length: Any = None,
        **side: Any,
    ) -> State:
        with signed(layer.__repr__, x):
            _check_given("start(params, state, x, length=n)", x)
            _check_own(layer)
            check_steps(length)
            x, side = held((x, taken(layer, side)))
            _check_call(layer, params, state, x, None, False, side)
            carried = raw(params, state, x, length=length, **side)
            layer._known["streamed"] = layer._known.get("streamed", frozenset()) | carried.keys()
            return _distinct(carried, (params, state, x, side))

    return _keeping(start, raw)


def taken(layer: Layer, given: Mapping[str, Any]) -> dict[str, Any]:
    """The side inputs that are there; None is absent, and what nobody takes is refused."""
    given = {name: value for name, value in given.items() if value is not None}
    if foreign := given.keys() - layer.side:
        remedy = next((_MEANT[name] for name in sorted(foreign) if name in _MEANT),
                      "leave it out, or add a layer that takes it")
        raise LayerError(f"only side inputs that it takes ({listed(layer.side)})",
                         listed(foreign), remedy)
    return given


def inputs(x: Any) -> Any:
    """Shapes and dtypes of what the caller gave; what has none is refused."""
    if isinstance(x, (tuple, list)) and x and all(isinstance(n, int) for n in x):
        raise LayerError("an array or a jax.ShapeDtypeStruct", f"the shape {x}",
                         f"write jax.ShapeDtypeStruct({tuple(x)}, jnp.float32)")
    for leaf in jax.tree.leaves(x):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise LayerError("arrays or jax.ShapeDtypeStructs", show(leaf), "use jnp.asarray")
    return spec(x)


def streams(layer: Layer, state: State, *given: Any) -> bool:
    """Is this the state of a stream: is its structure not that of the state that `init` gives?

    `given`, x and side inputs, serves to plan a layer that was never planned.
    """
    if given and not _is_planned(layer, state, *given):
        return True
    return jax.tree.structure(state) != layer._known.get("rest", jax.tree.structure(state))


def parted(layer: Layer, state: State, *given: Any) -> tuple[State, State]:
    """The state of a stream as what `init` gave, and what is carried; `given` as in `streams`."""
    if not _is_planned(layer, state, *given):
        return {}, state
    rest = layer._known["rest"]
    return _split(state, rest.unflatten(range(rest.num_leaves)))


def miscounted(name: str, calls: int) -> LayerError:
    """What is wrong with a streaming call that makes other calls of a child than `start` made."""
    return LayerError(f"as many calls of {name} as start made", f"{calls}",
                      "start anew with the same inputs")


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
                         "call layers.<name>(x), the child, inside a program")
    if side.pop("train", False):
        raise LayerError("net.apply for training", "train=True in the short form",
                         "call net.apply: the short form would lose the new state")


def check_composable(f: Any) -> None:
    """Refuse what can be no part of a net: a factory that was not called, a list, a class."""
    if re.search(r"\bLayer\b", str(getattr(f, "__annotations__", {}).get("return"))):
        raise LayerError("a layer", f"the function {f.__name__}", f"call it: {f.__name__}(...)")
    if isinstance(f, (tuple, list)):
        raise LayerError("a layer", show(f), "write serial(a, b) for a sequence of layers, "
                         "and Layer(init, apply) for a pair of functions")
    if not callable(f) or isinstance(f, type):
        raise LayerError("a layer or a function of one input", show(f),
                         "pass dp.linear(8) or jax.nn.relu, for example")


def check_result(y: Any) -> None:
    """Refuse what is no result: nothing, or a layer that was not called."""
    if y is None:
        raise LayerError("a result", "None", "end the function with return")
    if made := next((leaf for leaf in jax.tree.leaves(y) if callable(leaf)), None):
        raise LayerError("arrays as a result", f"the layer {made!r}", "use that layer itself"
                         if hasattr(made, "apply") else f"call it: {made!r}(x)")


def check_children(params: Params, state: State, children: Mapping[str, Any]) -> None:
    """Refuse trees with a name that is no child's; the children answer for what is in them."""
    for kind, given in (("params", params), ("state", state)):
        if foreign := {name for name in given if name.split("@")[0] not in children}:
            raise LayerError(f"{kind} of its children ({listed(children)})", listed(foreign),
                             "pass what init gave: this is of another net")


def _split(state: State, form: State) -> tuple[State, State]:
    """The state as what stands at the paths of `form`, and what does not."""
    inside, outside = {}, {}
    for name, part in state.items():
        if name not in form:
            outside[name] = part
        elif isinstance(part, dict):
            below = _split(part, form[name])
            for tree, half in zip((inside, outside), below, strict=True):
                if half:
                    tree[name] = half
        else:
            inside[name] = part
    return inside, outside


def _distinct(tree: State, given: Any) -> State:
    """The tree with copies of the arrays that were given, or that stand in it twice."""
    seen = set(map(id, jax.tree.leaves(given)))

    def own(leaf: Any) -> Any:
        leaf = jnp.copy(leaf) if id(leaf) in seen else leaf
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, tree)


def _evaluated(init: Any, apply: Any, x: Any, side: dict[str, Any]) -> Plan:
    """The plan of a leaf: its pair under abstract evaluation, where init sees shapes alone."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(lambda key: _trees(init(key, x, **side)), key)
    run = lambda *given: _result(apply(*given[:3], **given[3]))  # noqa: E731
    y, _ = jax.eval_shape(run, params, state, x, side)
    return Plan(params, state, y)


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
    check_result(pair[0])
    return pair


def _keeping(checked: Any, raw: Any) -> Any:
    """The checked function, which remembers the one that it checks."""
    checked.raw = raw
    return checked


def _check_given(call: str, x: Any) -> None:
    if x is NOTHING:
        raise LayerError(f"net.{call}", "fewer arguments",
                         "pass them all: state is what init gave, {} if the net has none")


def _check_own(layer: Layer) -> None:
    if layer.lent:
        raise LayerError(
            "a call of the whole net, which computes the parameters of its children",
            "one of this child alone, by what they are computed from",
            "take its output by tap(net, path), or call the child of the net without the wrapper "
            "on merge(net, params, state)")


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", np.dtype(bool))
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = dtype == np.uint32 and key.shape in ((2,), (4,))  # as jax.random.PRNGKey makes them
    if not typed and not raw:
        raise LayerError("a key", show(key),
                         "pass jax.random.key(seed), and map over several by vmap")


def _check_call(
    layer: Layer, params: Any, state: Any, x: Any, key: Any, train: Any, side: dict[str, Any],
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
            raise LayerError(f"{kind} as a dict", show(given), "pass what init gave")
    if key is not None:
        _check_key(key)
    if layer.children:
        return  # a program answers for its children's names, and they for their own
    if layer.random and train and key is None:
        raise LayerError("a key when train=True", "none", "pass key=jax.random.key(seed) to apply")
    if not _is_planned(layer, state, x, side):
        return  # there is nothing to plan by; the layer must know its own state
    _check_trees(layer, params, state, x, side)


def _is_planned(layer: Layer, state: Any, x: Any, side: dict[str, Any]) -> bool:
    """Is it known what names the layer's trees have? A stream may lack what `start` has kept."""
    if "params" not in layer._known:
        try:
            layer.plan(x, **side)
        except LayerError:
            if not (state and layer.kept - side.keys()):
                raise
    return "params" in layer._known


def _check_trees(layer: Layer, params: Any, state: Any, x: Any, side: dict[str, Any]) -> None:
    """Refuse names that are missing or foreign in the trees of a leaf."""
    kinds: dict[str, Any] = {"params": params, "state": state}
    for kind, given in kinds.items():
        names = layer._known[kind]
        foreign = given.keys() - names
        if foreign and kind == "state" and layer.start:
            foreign -= _streamed(layer, params, given, x, side)
        if names - given.keys() or foreign:
            remedy = "pass state=, as init gave it" if kind == "state" else "pass what init gave"
            raise LayerError(f"{kind} {listed(names)}", listed(given), remedy)


def _streamed(
    layer: Layer, params: Any, state: State, x: Any, side: dict[str, Any]
) -> frozenset[str]:
    """The names of the state that `start` gives; none if the layer cannot stream."""
    if "streamed" not in layer._known:
        rest = {name: state[name] for name in layer._known["state"] & state.keys()}
        start = functools.partial(layer.start, length=1, **side)  # type: ignore[arg-type]
        try:
            jax.eval_shape(start, params, rest, x)  # which notes the names
        except LayerError:
            if layer.kept - side.keys():
                return frozenset(state)  # `start` was given more; the layer must know its state
            layer._known["streamed"] = frozenset()
    return layer._known["streamed"]


def _on_mesh(tree: Any) -> Any:
    from diffprog.meshes import on_mesh  # which is of no use to most imports of diffprog

    return on_mesh(tree)


def _misfit(
    layer: Layer, params: Params, state: State, x: Any, side: dict[str, Any], error: Exception,
) -> LayerError | None:
    """Why a call failed: on an explicit mesh, or a leaf whose parameters are of another input."""
    from diffprog.meshes import unplaced  # as above

    if misfit := unplaced(error, (params, state, x, side)):
        return misfit
    if layer.children:
        return None
    try:
        return layer.plan(x, **side).difference(params)
    except LayerError as error:
        return error
    except Exception:
        return None  # it fails on shapes as well, so the parameters are not at fault
