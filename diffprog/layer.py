"""A layer is a pair of pure functions over a tree of parameters; nothing else exists.

``init(key, x)`` makes ``(params, state)``; ``apply(params, state, x)`` gives ``(y, state)``. Both
have one signature for every layer, so a layer made of layers is a layer, and `jax.jit`, `jax.grad`
and `jax.vmap` work on it unwrapped. Around the pair stands a record that says how the layer is
called, what is in it, and what it may be given. What authors write is checked here, once: every
`init` and `apply` that a record holds refuses what it cannot understand, by name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from diffprog import notation, tree
from diffprog.errors import LayerError, check_count, sign
from diffprog.notation import listed, show
from diffprog.plans import KEPT, Params, Plan, State, remember, spec

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """A pair of pure functions; ``init, apply = layer``.

    Attributes:
        init: ``(key, x, **side) -> (params, state)``; x is a pytree of arrays or
            `jax.ShapeDtypeStruct`, of which only shapes and dtypes are read.
        apply: ``(params, state, x, *, key=None, train=False, **side) -> (y, state)``.
        start: ``(params, state, x, *, length, **side) -> state``, what streaming carries; None
            promises that the layer does not mix positions in time. The state keeps `memory` and
            `memory_mask`; all other side inputs belong to the chunk with which they are given.
        children: the layers inside, under the names that their parameters have in the trees.
        rebuild: ``(children) -> Layer``, the same layer made of other children.
        name: the kind; unnamed children are numbered by it.
        settings: argument -> value, for `repr`, errors and summaries; never in the trees.
        bare: True of what never has parameters or state.
        random: may `apply` use a key?
        side: the names of the side inputs that the layer takes.
        planner: ``(x, side) -> Plan`` of layers made of layers, which remembers; None evaluates
            the pair.
        choice: ``(x, side) -> str``, how `apply` computes an input of these shapes, where it may
            choose; for `summary`.
        factory: the function whose call `repr` shows.

    Example:
        >>> net = dp.linear(3)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> net(params, jnp.ones((2, 4))).shape
        (2, 3)
    """

    init: Callable[..., tuple[Params, State]]
    apply: Callable[..., tuple[Any, State]]
    start: Callable[..., State] | Any = None
    children: Mapping[str, Layer] = dataclasses.field(default_factory=dict)
    rebuild: Callable[[Mapping[str, Layer]], Layer] | None = None
    name: str = "layer"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bare: bool = False
    random: bool = False
    side: frozenset[str] = frozenset()
    planner: Callable[[Any, dict[str, Any]], Plan] | None = None
    choice: Callable[[Any, dict[str, Any]], str] | None = None
    factory: Callable[..., Layer] | None = None
    _planned: Callable[[Any, dict[str, Any]], Plan] = dataclasses.field(init=False)
    _names: dict[str, frozenset[str]] = dataclasses.field(init=False, default_factory=dict)

    serial: ClassVar[Callable[..., Layer]]  # `combinators` sets it: what >> and ** are made of

    def __post_init__(self) -> None:
        # A record made by `dataclasses.replace` holds the checked functions of the old one.
        init, apply, start = (getattr(f, "raw", f) for f in (self.init, self.apply, self.start))
        checked = {
            "init": _guarded_init(self, init),
            "apply": _guarded_apply(self, apply),
            "start": start and _guarded_start(self, start),
            "_planned": self.planner or remember(functools.partial(_evaluate, init, apply)),
        }
        for field, value in checked.items():
            object.__setattr__(self, field, value)

    def plan(self, x: Any, **side: Any) -> Plan:
        """Shapes and dtypes of parameters, state and output on x, by abstract evaluation.

        Example:
            >>> dp.linear(3).plan(jax.ShapeDtypeStruct((2, 4), jnp.float32)).y.shape
            (2, 3)
        """
        try:
            plan = self._planned(_inputs(x), _inputs(self._taken(side)))
        except Exception as error:
            sign(error, repr(self), x)
            raise
        self._names.update(params=frozenset(plan.params), state=frozenset(plan.state))
        return plan

    def __call__(
        self, params: Params, x: Any = inspect.Parameter.empty, *, state: State | None = None,
        key: jax.Array | None = None, **side: Any,
    ) -> Any:
        """Inference, y alone: ``apply(params, state, x)[0]``."""
        if x is inspect.Parameter.empty:
            error = LayerError("net(params, x)", "one argument",
                               "inside a program call its child, layers.<name>(x)")
        elif side.pop("train", False):
            error = LayerError("net.apply for training", "train=True in the short form",
                               "the short form would lose the new state")
        else:
            return self.apply(params, {} if state is None else state, x, key=key, **side)[0]
        sign(error, repr(self))
        raise error

    def __iter__(self) -> Iterator[Any]:
        return iter((self.init, self.apply))

    def __rshift__(self, other: Any) -> Layer:
        return Layer.serial(*_links(self), *_links(as_layer(other)))

    def __rrshift__(self, other: Any) -> Layer:
        return as_layer(other) >> self

    def __pow__(self, times: int) -> Layer:
        check_count("the exponent of a layer", times)
        return Layer.serial(*[self] * times)

    def __repr__(self) -> str:
        if self.factory is as_layer:
            return notation.code(self.settings["f"])
        if self.factory:
            return notation.call(self.factory, self.settings)
        shown = self.settings or self.children
        return f"{self.name}({', '.join(notation.keywords(shown))})" if shown else self.name

    def _taken(self, given: dict[str, Any]) -> dict[str, Any]:
        """The side inputs that are there; None is absent, and what nobody takes is refused."""
        given = {name: value for name, value in given.items() if value is not None}
        if foreign := given.keys() - self.side:
            raise LayerError(f"only side inputs that it takes ({listed(self.side)})",
                             listed(foreign), "leave it out, or add a layer that takes it")
        return given


def stateless(
    init: Callable[[jax.Array, Any], Params] | None, forward: Callable[..., Any], *,
    name: str | None = None,
) -> Layer:
    """The short form of authors: ``y = forward(params, x)`` with ``params = init(key, x)``.

    Args:
        init: ``(key, x) -> params``, where x has shapes and dtypes alone; None for no parameters.
        forward: ``(params, x) -> y``; its keyword-only arguments are the side inputs it takes.
        name: the kind; the name of `forward` if not given.

    Example:
        >>> def forward(params, x):
        ...     return params["scale"] * x
        >>> scaling = dp.stateless(lambda key, x: {"scale": jnp.ones(x.shape[-1])}, forward)
        >>> params, state = scaling.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> scaling(params, jnp.ones((2, 3))).shape
        (2, 3)
    """
    parameters = inspect.signature(forward).parameters.values()
    return Layer(
        init=lambda key, x, **side: ({} if init is None else init(key, x), {}),
        apply=lambda params, state, x, *, key=None, train=False, **side: (
            forward(params, x, **side), state),
        name=name or forward.__name__.strip("<>_"),
        bare=init is None,
        side=frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
    )


def as_layer(f: Any) -> Layer:
    """A layer as it is; a plain function of one input as the layer ``y = f(x)``."""
    if isinstance(f, Layer):
        return f
    if re.search(r"\bLayer\b", str(getattr(f, "__annotations__", {}).get("return"))):
        raise LayerError("a layer", f"the function {f.__name__}", f"call it: {f.__name__}(...)")
    if isinstance(f, (tuple, list)):
        raise LayerError("a layer", show(f), "write serial(a, b) for a sequence of layers, "
                         "and Layer(init, apply) for a pair of functions")
    if not callable(f) or isinstance(f, type):
        raise LayerError("a layer or a function of one input", show(f),
                         "for example dp.linear(8) or jax.nn.relu")
    name = getattr(getattr(f, "func", f), "__name__", type(f).__name__).strip("<>_")
    return described(stateless(None, lambda params, x: f(x), name=name), as_layer, {"f": f})


def factory(function: Callable[P, Layer]) -> Callable[P, Layer]:
    """Let the layers that `function` makes show the call that made them, in `repr` and errors."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Layer:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            layer = function(*args, **kwargs)
        except LayerError as error:
            sign(error, notation.call(function, bound.arguments))
            raise
        return described(layer, function, bound.arguments)

    return make


def described(layer: Layer, function: Callable[..., Layer], settings: Mapping[str, Any]) -> Layer:
    """The layer with the call ``function(**settings)`` as its description."""
    name = function.__name__ if layer.name == "layer" else layer.name
    made_by = inspect.unwrap(function)
    return dataclasses.replace(layer, name=name, factory=made_by, settings=settings)


def rebuilt(layer: Layer, children: Mapping[str, Layer]) -> Layer:
    """The layer with other children; a leaf has none and stays as it is."""
    return layer.rebuild(children) if layer.rebuild else layer


def _links(layer: Layer) -> tuple[Any, ...]:
    """What ``>>`` chains: the layers of an unnamed serial, or the layer itself."""
    unnamed = layer.factory is inspect.unwrap(Layer.serial) and not layer.settings["named"]
    return tuple(layer.settings["layers"]) if unnamed else (layer,)


def _evaluate(init: Any, apply: Any, x: Any, side: dict[str, Any]) -> Plan:
    """The plan of a leaf: its pair under abstract evaluation, where init sees shapes alone."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(lambda key: _trees(init(key, x, **side)), key)
    run = lambda *given: _result(apply(*given[:3], **given[3]))  # noqa: E731
    y, _ = jax.eval_shape(run, params, state, x, side)
    return Plan(params, state, y)


def _guarded_init(layer: Layer, raw: Any) -> Any:
    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        try:
            _check_key(key)
            layer.plan(x, **side)  # whatever is wrong with x shows here, before anything is drawn
            return raw(key, _inputs(x), **_inputs(layer._taken(side)))
        except Exception as error:
            sign(error, repr(layer), x)
            raise

    init.raw = raw  # type: ignore[attr-defined]
    return init


def _guarded_apply(layer: Layer, raw: Any) -> Any:
    def apply(
        params: Params, state: State, x: Any, *, key: jax.Array | None = None,
        train: bool = False, **side: Any,
    ) -> tuple[Any, State]:
        try:
            side = layer._taken(side)
            _check_call(layer, params, state, x, key, train, side)
            return _result(raw(params, state, x, key=key, train=train, **side))
        except Exception as error:
            wrong = None if isinstance(error, LayerError) else _misfit(layer, params, x, side)
            sign(wrong or error, repr(layer), x)
            if wrong:
                raise wrong from error
            raise

    apply.raw = raw  # type: ignore[attr-defined]
    return apply


def _guarded_start(layer: Layer, raw: Any) -> Any:
    def start(params: Params, state: State, x: Any, *, length: Any = None, **side: Any) -> State:
        try:
            check_count("length", length)
            side = layer._taken(side)
            _check_call(layer, params, state, x, None, False, side)
            carried = raw(params, state, x, length=length, **side)
            layer._names["streamed"] = layer._names.get("streamed", frozenset()) | carried.keys()
            return carried
        except Exception as error:
            sign(error, repr(layer), x)
            raise

    start.raw = raw  # type: ignore[attr-defined]
    return start


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", np.dtype(bool))
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ()
    raw = dtype == np.uint32 and key.shape in ((2,), (4,))  # as jax.random.PRNGKey makes them
    if not typed and not raw:
        raise LayerError("a key", show(key), "pass jax.random.key(seed); map over several by vmap")


def _check_call(
    layer: Layer, params: Any, state: Any, x: Any, key: Any, train: Any, side: dict[str, Any],
) -> None:
    """Refuse what would be silently wrong: another net's trees, a traced flag, a missing key."""
    if not isinstance(train, bool):
        raise LayerError("train as a Python bool", show(train), "under jax.jit make it static: "
                         "jax.jit(net.apply, static_argnames='train')")
    if isinstance(params, tuple) and len(params) == 2:
        raise LayerError("params alone", "the pair (params, state)",
                         "unpack it: params, state = net.init(key, x)")
    for kind, given in (("params", params), ("state", state)):
        if not isinstance(given, dict):
            raise LayerError(f"{kind} as a dict", show(given), "pass what init gave")
    if layer.children:
        return  # a program answers for its children's names, and they for their own
    if layer.random and train and key is None:
        raise LayerError("a key when train=True", "none", "pass key=jax.random.key(seed) to apply")
    if "params" not in layer._names:
        try:
            layer.plan(x, **side)
        except LayerError:
            if not (state and layer.side & (KEPT - side.keys())):
                raise
            return  # there is nothing to plan by; the layer must know its own state
    kinds: dict[str, Any] = {"params": params, "state": state}
    for kind, given in kinds.items():
        names = layer._names[kind]
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
    if "streamed" not in layer._names:
        rest = {name: state[name] for name in layer._names["state"] & state.keys()}
        start = functools.partial(layer.start, length=1, **side)  # type: ignore[arg-type]
        try:
            jax.eval_shape(start, params, rest, x)  # which notes the names
        except LayerError:
            if layer.side & (KEPT - side.keys()):
                return frozenset(state)  # `start` may have been given more; the layer must know
            layer._names["streamed"] = frozenset()
    return layer._names["streamed"]


def _misfit(layer: Layer, params: Params, x: Any, side: dict[str, Any]) -> LayerError | None:
    """Why a leaf failed, if it is that its parameters were made for another input."""
    if layer.children:
        return None
    try:
        return tree.compare("params", layer.plan(x, **side).params, params)
    except LayerError as error:
        return error
    except Exception:
        return None  # it fails on shapes as well, so the parameters are not at fault


def _trees(pair: Any) -> tuple[Params, State]:
    two = isinstance(pair, tuple) and len(pair) == 2
    if not (two and isinstance(pair[0], dict) and isinstance(pair[1], dict)):
        raise LayerError("init to return (params, state), two dicts", show(pair),
                         "an empty dict stands for none")
    return pair


def _result(pair: Any) -> tuple[Any, State]:
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], dict)):
        raise LayerError("apply to return (y, state)", show(pair),
                         "return the state that came if it does not change")
    if pair[0] is None:
        raise LayerError("a result", "None", "end the function with return")
    if any(isinstance(leaf, Layer) for leaf in jax.tree.leaves(pair[0])):
        raise LayerError("arrays as a result", f"the layer {pair[0]!r}", "use that layer itself")
    return pair


def _inputs(x: Any) -> Any:
    """Shapes and dtypes of what the caller gave; what has none is refused."""
    if isinstance(x, (tuple, list)) and x and all(isinstance(n, int) for n in x):
        raise LayerError("an array or a jax.ShapeDtypeStruct", f"the tuple {x}",
                         f"write jax.ShapeDtypeStruct({tuple(x)}, jnp.float32)")
    for leaf in jax.tree.leaves(x):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise LayerError("arrays or jax.ShapeDtypeStructs", show(leaf), "use jnp.asarray")
    return spec(x)
