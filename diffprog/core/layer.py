"""The layer: a pair of pure functions over a tree of parameters.

``init(key, x)`` returns ``(params, state)``; ``apply(params, state, x)`` returns ``(y, state)``.
Every layer has this signature, so layers compose to layers, and `jax.jit`, `jax.grad` and
`jax.vmap` apply to them unwrapped. The record around the pair describes how the layer is called and
what is inside; `guards` checks each call.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax

from diffprog.core import guards, notation
from diffprog.core.arguments import check_count
from diffprog.core.calls import Called
from diffprog.core.computed import Own
from diffprog.core.errors import LayerError, signed
from diffprog.core.factories import bound
from diffprog.core.notation import listed
from diffprog.core.plans import Params, Plan, State
from diffprog.core.streams import carrying

__all__ = ["Layer", "stateless"]

# Fields that describe the functions, and their values once the functions are replaced.
_OF_FUNCTIONS = {
    "planner": None, "rebuild": None, "within": None, "wraps": None, "weighs": None,
    "factory": None, "settings": {}}

Order = Literal["once", "depth", "width", "time", "fixed point"]


class Wraps(NamedTuple):
    """What a wrapper runs, as `summary`, `diagram`, `gradient_flow` and `generate` read it.

    Attributes:
        layer: what is wrapped.
        times: how many copies there are, each with parameters of its own.
        order: how they run. "depth": each on the result of the one before; "width": side by side on
            the same input; "time": on each time step; "fixed point": on the pair (z, x) until z
            stays; "once": as it is.
        dtype: to which inputs are cast; None leaves them.
    """

    layer: Layer
    times: int = 1
    order: Order = "once"
    dtype: Any = None


class Weighs(NamedTuple):
    """How an attention layer returns its weights, for `tap`.

    Attributes:
        apply: as that of the layer, with ``(y, weights)`` in place of y; the weights are
            (..., heads, query, key).
        keys: ``(state, steps) -> int``, the number of keys of a stream that takes `steps` steps.
    """

    apply: Callable[..., tuple[tuple[Any, Any], State]]
    keys: Callable[[State, int], int]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layer(Called):
    """A pair of pure functions; ``init, apply = layer``.

    Equal calls of a factory make equal layers, so a function that is jitted with the net as a
    static argument is compiled once for them. A layer is pickled as its call; with a lambda or a
    local function inside, pickling needs `cloudpickle`.

    Attributes:
        init: ``(key, x, **side) -> (params, state)``; x is a pytree of arrays or
            `jax.ShapeDtypeStruct`, of which only shapes and dtypes are read.
        apply: ``(params, state, x, *, key=None, train=False, **side) -> (y, state)``.
        start: ``(params, state, x, *, length, **side) -> state``, what streaming carries; None
            promises that the layer does not mix positions in time.
        children: the layers inside, under the names that their parameters have in the trees.
        rebuild: ``(children) -> Layer``, the same layer made of other children.
        within: ``f -> Layer``, the same layer around ``f(part)`` of each layer in it, for a layer
            that passes parameters on unchanged.
        wraps: the layer that a wrapper runs, and how often; None if it is no wrapper.
        weighs: how an attention layer returns its weights; None for all others.
        bare: True if it never has parameters or state.
        random: may `apply` use a key?
        side: the names of the side inputs that the layer takes.
        kept: those of them that a stream keeps from its `start`, so that they need not be passed
            again; all others belong to the chunk with which they are passed.
        planner: ``(x, side) -> Plan`` of layers made of layers; None evaluates the pair.
        casts: does it cast parameters where it uses them? Then `mixed` passes them as they are
            stored; to others it passes them in its dtype.
        computed: what `reparam` did to its trees, and `pin` to the mode in which they are read, the
            outermost first; wrappers pass it on.
        stacks: how many leading axes its trees have for copies of what it wraps.
        dtype: in which a program that reads this child's parameters sees them; None is as stored.
        lent: the layer of which this one is a view, as a layer that computes its parameters shows
            its children: to be inspected and composed anew, but not to be called on parameters
            that are not computed yet. None is a layer of its own, as an edited view is.
        name: the kind; unnamed children are numbered by it.
        settings: argument -> value, for `repr` and errors; never in the trees.
        factory: the function whose call `repr` shows.
        choice: ``(x, side) -> str``, how `apply` computes such an input; for `summary`.

    `dataclasses.replace` makes a record with other functions. The fields that describe the old
    functions (planner, rebuild, within, wraps, weighs, settings, factory) are reset, unless they
    are passed too.

    Example:
        >>> net = dp.linear(3)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> net(params, jnp.ones((2, 4))).shape
        (2, 3)
    """

    # The functions.
    init: Callable[..., tuple[Params, State]]
    apply: Callable[..., tuple[Any, State]]
    start: Callable[..., State] | Any = None
    # What is inside.
    children: Mapping[str, Layer] = dataclasses.field(default_factory=dict)
    rebuild: Callable[[Mapping[str, Layer]], Layer] | None = None
    within: Callable[[Callable[[Layer], Layer]], Layer] | None = None
    wraps: Wraps | None = None
    weighs: Weighs | None = None
    # How it is called.
    bare: bool = False
    random: bool = False
    side: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    planner: Callable[[Any, dict[str, Any]], Plan] | None = None
    casts: bool = False
    # Its trees.
    computed: tuple[Own, ...] = ()
    stacks: int = 0
    dtype: Any = None
    lent: Layer | None = None
    # How it is shown.
    name: str = "layer"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    factory: Callable[..., Layer] | None = None
    choice: Callable[[Any, dict[str, Any]], str] | None = None
    # What the record keeps for itself.
    _call: Callable[[], Layer] | None = None
    _made: dict[str, Any] = dataclasses.field(default_factory=dict)
    _planned: Callable[[Any, dict[str, Any]], Plan] = dataclasses.field(init=False)
    _shaped: Callable[[Any, dict[str, Any]], tuple[Params, State]] = dataclasses.field(init=False)
    _carried: Callable[..., State] = dataclasses.field(init=False)

    # For ``>>`` and ``**`` alone: wiring, which imports this module, sets them.
    chain: ClassVar[Callable[..., Layer]]
    serial: ClassVar[Callable[..., Layer]]

    def __post_init__(self) -> None:
        # A record made by `dataclasses.replace` gets the checked functions of the old one.
        said = self._said()
        init, apply, start = functions = (said["init"], said["apply"], said["start"])
        made = self._made or said
        stale = functions != (made["init"], made["apply"], made["start"])
        vars(self).update({name: nothing for name, nothing in _OF_FUNCTIONS.items()
                           if stale and getattr(self, name) is made[name]}, _made=made)
        if self.lent and (stale or self._differs(self.lent)):
            vars(self).update(lent=None)  # an edited view is a layer of its own
        planned, shaped = guards.guarded_plans(self, self.planner, init, apply)
        checked = {
            "init": guards.guarded_init(self, init),
            "apply": guards.guarded_apply(self, apply),
            "start": start and guards.guarded_start(self, start),
            "_planned": planned, "_shaped": shaped, "_carried": carrying(start),
        }
        vars(self).update(checked)  # the fields are frozen from here on

    def call(self) -> functools.partial[Layer]:
        """The call that makes an equal layer, of its factory, `program`, or `Layer`."""
        if self.lent:
            return functools.partial(view, self.lent)
        said = self._said()
        if all(value is self._made[name] for name, value in said.items()):
            if self._call:
                return functools.partial(self._call)
            if self.factory:
                return bound(self.factory, self.settings)
        return functools.partial(Layer, **{
            name: value for name, value in said.items() if value is not _UNSAID[name]})

    def described(self, function: Callable[..., Layer], settings: Mapping[str, Any]) -> Layer:
        """The layer, shown as the call ``function(**settings)``."""
        name = function.__name__ if self.name == "layer" else self.name
        made_by = inspect.unwrap(function)
        return dataclasses.replace(
            self, name=name, factory=made_by, settings=settings, _made={}, _call=None)

    def known_by(self, call: Callable[[], Layer]) -> Layer:
        """The layer, compared and pickled by this call."""
        return dataclasses.replace(self, _call=call, _made={})

    def rebuilt(self, children: Mapping[str, Layer]) -> Layer:
        """The layer with other children; itself if it has none, or they are the same."""
        children = {name: child.lent or child for name, child in children.items()}
        if self.rebuild:
            return self.rebuild(children)
        changed = [name for name, child in self.children.items() if children[name] is not child]
        if changed:
            raise LayerError(f"rebuild, to make it with another {listed(changed)}", "none",
                             "pass rebuild=lambda children: ...: dataclasses.replace resets it "
                             "with other functions, unless it is passed too")
        return self

    def _said(self) -> dict[str, Any]:
        """All fields, with the unchecked functions."""
        said = {name: getattr(self, name) for name in _UNSAID}
        return {name: getattr(f, "raw", f) if name in ("init", "apply", "start") else f
                for name, f in said.items()}

    def _differs(self, other: Layer) -> bool:
        """Do the records differ in anything but functions and children?"""
        own = {"init", "apply", "start", "children", "lent"}
        return any(getattr(self, field.name) is not getattr(other, field.name)
                   for field in dataclasses.fields(self)
                   if field.name[0] != "_" and field.name not in own)

    def plan(self, x: Any, **side: Any) -> Plan:
        """Shapes and dtypes of parameters, state and output on x, by abstract evaluation.

        Example:
            >>> dp.linear(3).plan(jax.ShapeDtypeStruct((2, 4), jnp.float32)).y.shape
            (2, 3)
        """
        return self._planned(x, side)

    def __call__(
        self, params: Params, x: Any = guards.NOTHING, *, state: State | None = None,
        key: jax.Array | None = None, **side: Any,
    ) -> Any:
        """The output at inference: ``apply(params, state, x)[0]``."""
        with signed(self.__repr__):
            guards.check_short_form(x, side)
        return self.apply(params, {} if state is None else state, x, key=key, **side)[0]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.init, self.apply))

    def __rshift__(self, other: Any) -> Layer:
        return Layer.chain(self, other)

    def __rrshift__(self, other: Any) -> Layer:
        return Layer.chain(other, self)

    def __pow__(self, times: int) -> Layer:
        check_count("the exponent of a layer", times)
        return Layer.serial(*[self] * times)

    def __repr__(self) -> str:
        own = vars(self) if self.factory or self.settings else self._made
        factory, settings = own["factory"], own["settings"]
        with signed(lambda: self.name):
            if factory is as_layer:
                return notation.code(settings["f"])
            if factory:
                return notation.call(factory, settings)
            shown = settings or self.children
            return f"{self.name}({', '.join(notation.keywords(shown))})" if shown else self.name


# The fields and their defaults.
_UNSAID = {field.name: field.default for field in dataclasses.fields(Layer)
           if field.name[0] != "_"}


def stateless(
    init: Callable[[jax.Array, Any], Params] | None, forward: Callable[..., Any], *,
    casts: bool = False, name: str | None = None,
) -> Layer:
    """A layer without state: ``y = forward(params, x)`` with ``params = init(key, x)``.

    Args:
        init: ``(key, x) -> params``, where x has shapes and dtypes only; None for no parameters.
        forward: ``(params, x) -> y``; its keyword-only arguments are the side inputs it takes.
        casts: does `forward` cast parameters to the dtype of x itself? See `mixed`.
        name: the kind; the name of `forward` if not given.

    Example:
        >>> def forward(params, x):
        ...     return params["scale"] * x
        >>> scaling = dp.stateless(lambda key, x: {"scale": jnp.ones(x.shape[-1])}, forward)
        >>> params, state = scaling.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> scaling(params, jnp.ones((2, 3))).shape
        (2, 3)
    """
    again = functools.partial(stateless, init, forward, name=name, casts=casts)
    return Layer(
        init=lambda key, x, **side: ({} if init is None else init(key, x), {}),
        apply=lambda params, state, x, *, key=None, train=False, **side: (
            forward(params, x, **side), state),
        name=name or notation.name_of(forward),
        bare=init is None,
        side=notation.keyword_only(forward), casts=casts,
        _call=again,
    )


def check_layer(net: Any, call: str) -> None:
    """Raise unless `net`, the first argument of `call`, is a layer."""
    if not isinstance(net, Layer):
        raise LayerError(f"a net, as in {call}", notation.code(net),
                         "pass the layer whose init made the parameters")


def as_layer(f: Any) -> Layer:
    """A layer as it is; a view as the layer behind it; a function as the layer ``y = f(x)``."""
    if isinstance(f, Layer):
        return f.lent or f
    guards.check_composable(f)
    plain = stateless(None, lambda params, x: f(x), name=notation.name_of(f))
    return plain.described(as_layer, {"f": f})


def around(
    layer: Layer, again: Callable[[Layer], Layer], *, times: int = 1, order: Order = "once",
) -> dict[str, Any]:
    """The fields of a wrapper of `layer`: `again` wraps another layer in the same way."""
    return {"rebuild": lambda children: again(layer.rebuilt(children)),
            "within": lambda f: again(f(layer)),
            "wraps": Wraps(layer, times, order)}


def computing(layer: Layer, again: Callable[[Layer], Layer]) -> dict[str, Any]:
    """`around` for a wrapper that computes the layer's parameters: its children are views."""
    return {**around(layer, again),
            "children": {name: view(child) for name, child in layer.children.items()}}


def view(layer: Layer) -> Layer:
    """The layer, to be inspected but not called, in a wrapper that computes its parameters."""
    children = {name: view(child) for name, child in layer.children.items()}
    return dataclasses.replace(layer, lent=layer.lent or layer, children=children)
