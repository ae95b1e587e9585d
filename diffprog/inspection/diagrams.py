"""A net as a diagram of its dataflow.

An arrow connects two layers if the input of one is computed from the output of the other. Code
between them that does more than move numbers is a node of its own.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import jax

from diffprog.core.arguments import check_count
from diffprog.core.layer import Layer
from diffprog.core.nets import unwrapped
from diffprog.core.notation import clip, show
from diffprog.core.plans import spec
from diffprog.inspection.dataflow import Step, Value, Wiring, wiring
from diffprog.inspection.flowcharts import Box, Flowchart, Node, Place

__all__ = ["diagram"]


def diagram(net: Layer, x: Any, *, levels: int | None = None, **side: Any) -> str:
    """A net as Mermaid text: its layers, and arrows with the shapes that pass between them.

    Arrows are found by tracing: a residual sum is a node "+" with two arrows, and other code
    between layers is a node with the names of its operations. Named layers and copies (`repeat`,
    `heads`, `ensemble`) are boxes, with the shapes of one copy inside. Dotted arrows are side
    inputs, and parameters read by other layers. A layer that is called twice is drawn twice, the
    second time marked "again". The call is at inference, and nothing is computed. GitHub renders
    the text in a code block ``mermaid``.

    Args:
        net: any layer.
        x: its input, or `jax.ShapeDtypeStruct`s of it.
        levels: how many levels of nested boxes are opened; deeper ones are single nodes. None opens
            all; 1 or 2 suit large nets.
        side: its side inputs.

    Raises:
        LayerError: as the net does.

    Example:
        >>> net = dp.residual(dp.linear(4) >> jnp.tanh)
        >>> print(dp.inspection.diagram(net, jax.ShapeDtypeStruct((2, 4), jnp.float32)))
        flowchart TD
            n0(["x"])
            n1["linear(4)"]
            n2["jax.nn.tanh"]
            n3(("#43;"))
            n4(["y"])
            n0 -->|"float32[2,4]"| n1
            n1 -->|"float32[2,4]"| n2
            n0 -->|"float32[2,4]"| n3
            n2 -->|"float32[2,4]"| n3
            n3 -->|"float32[2,4]"| n4
    """
    if levels is not None:
        check_count("levels", levels)
    y = net.plan(x, **side).y
    given = spec({name: value for name, value in side.items() if value is not None})
    chart = Flowchart()
    begins = {name: chart.sheet.node([name], "end") for name in ("x", *given)}
    call = _Call("", net, spec(x), given)
    places = _Artist(chart).draw(
        call, _each(begins.pop("x"), x), {name: _each(begins[name], given[name]) for name in given},
        chart.sheet, levels)
    end = chart.sheet.node(["y"], "end")
    for place, leaf in zip(places, jax.tree.leaves(y), strict=True):
        chart.arrow(place, end, show(leaf))
    return str(chart)


Places = list[Place | None]  # the origin of each array of an input; None for constants


class _Call(NamedTuple):
    """A call of a layer on these inputs.

    `name` is its name in the parent, if that says more than its `repr`; `again` marks a second
    call.
    """

    path: str
    layer: Layer
    x: Any
    side: dict[str, Any]
    name: str = ""
    again: bool = False


class _Artist:
    """Draws a net, in the order of the calls."""

    def __init__(self, chart: Flowchart) -> None:
        self.chart = chart
        self.drawn: dict[str, Place] = {}  # path -> the first drawing of a layer

    def draw(
        self, call: _Call, xs: Places, sides: dict[str, Places], box: Box, levels: int | None
    ) -> Places:
        """Draw a layer into the box, and return the origins of its outputs."""
        y = jax.tree.leaves(call.layer.plan(call.x, **call.side).y)
        core = _core(call)
        made = core.layer.children and core.layer.rebuild
        inside = wiring(core.layer, core.x, core.side) if made else None
        if inside and not any(step.call for step in inside.steps):
            inside = None  # its children are called where the trace does not show it
        words = [*filter(None, [call.name]), *core.copies]
        if not words and inside and call.path and core.layer.factory is None:
            words = [core.layer.name]  # a program of the user's
        title = ": ".join(words) + " (again)" * (call.again and bool(words))
        if not inside or (title and levels == 0):
            if core.copies and not inside and levels != 0:
                box, title = box.box(title), ""
            text = "" if inside else clip(f"{core.layer!r}{core.note}", 60)
            node = box.node([*filter(None, [title, text])], "closed" if inside else "layer")
            self.drawn.setdefault(call.path, node)
            self._enter("", xs, call.x, node)
            for name, places in sides.items():
                self._enter(name, places, call.side[name], node)
            return [node for _ in y]
        if title:
            box, levels = box.box(title), None if levels is None else levels - 1
            self.drawn.setdefault(call.path, box)
        for name in sorted(sides.keys() - core.side.keys()):  # side inputs that a copy does not get
            self._enter(name, sides[name], call.side[name], box)
        for _ in range(core.solved):
            xs = [None for _ in xs] + xs
        found = self._wire(call.path, core, inside, xs, sides, box, levels)
        more = itertools.repeat(found[-1])  # a tap returns more than the layer in it
        return [place for place, _ in zip(itertools.chain(found, more), y, strict=False)]

    def _wire(
        self, path: str, core: _Core, inside: Wiring, xs: Places, sides: dict[str, Places],
        box: Box, levels: int | None,
    ) -> Places:
        """Draw the inside of a layer made of layers."""
        for values, places in [(inside.x, xs), *((inside.side[n], sides[n]) for n in core.side)]:
            for value, place in zip(values, places, strict=True):
                value.place = place
        called = set[str]()
        for step in inside.steps:
            begins = [self._place(path, value) for value, _ in step.taken]
            if step.call:
                name, x, side = step.call
                child = core.layer.children[name]
                shown = "" if _says_nothing(name, child, core.layer) else name
                below = f"{path}/{name}" if path else name
                given = iter(begins)
                own = [next(given) for _ in jax.tree.leaves(x)]
                beside = {n: [next(given) for _ in jax.tree.leaves(side[n])] for n in sorted(side)}
                ends = self.draw(_Call(below, child, x, side, shown, name in called), own, beside,
                                 box, levels)
                called.add(name)
            else:
                ends = [self._operations(step, begins, box)] * len(step.given)
            for value, place in zip(step.given, ends, strict=True):
                if value:
                    value.place = place
        return [self._place(path, value) for value in inside.y]

    def _operations(self, step: Step, begins: Places, box: Box) -> Node:
        """Draw operations between calls: a symbol, or the names of at most three."""
        shown = step.names if len(step.names) < 4 else [*step.names[:3], "..."]
        symbol = len(shown) == 1 and not shown[0].isidentifier()
        node = box.node([", ".join(shown)], "symbol" if symbol else "operation")
        for place, (value, shape) in zip(begins, step.taken, strict=True):
            role = "params" if value and value.root.params else ""
            self.chart.arrow(place, node, show(shape), role)
        return node

    def _place(self, path: str, value: Value | None) -> Place | None:
        """The origin of an array of the layer at this path."""
        if value is None or not value.root.params:
            return value and value.root.place
        parts = [*filter(None, [path]), *value.root.params.split("/")]
        above = ["/".join(parts[:i]) for i in range(len(parts), 0, -1)]
        return next((self.drawn[p] for p in above if p in self.drawn), None)

    def _enter(self, name: str, begins: Places, given: Any, end: Place) -> None:
        """Draw the arrows into a layer, for a side input of this name or x."""
        for place, shape in zip(begins, jax.tree.leaves(given), strict=True):
            named = isinstance(place, Node) and place.label == [name]  # its input node
            self.chart.arrow(place, end, show(shape), name, named)


class _Core(NamedTuple):
    """The innermost layer of wrappers, its inputs, its copies, and a note for its `repr`.

    Each of the `solved` fixed points around it adds an iterate z before x, without an origin.
    """

    layer: Layer
    x: Any
    side: dict[str, Any]
    copies: list[str]
    note: str
    solved: int = 0


def _core(call: _Call) -> _Core:
    core = _Core(call.layer, call.x, call.side, [], "")
    for wrapper, wraps, x, side in unwrapped(call.layer, call.x, call.side):
        if wraps.order == "time" and not wraps.layer.children:
            break  # a cell without children is drawn as one node
        copies, note = core.copies, core.note
        if wraps.times > 1 or wraps.order in ("depth", "width"):
            copies = [*copies, f"{wrapper.name} \N{MULTIPLICATION SIGN} {wraps.times}"]
        elif wraps.order in ("time", "fixed point"):
            copies = [*copies, wrapper.name]
        if wraps.dtype is not None:
            note = f" in {jax.numpy.dtype(wraps.dtype).name}"
        solved = core.solved + (wraps.order == "fixed point")
        core = _Core(wraps.layer, x, side, copies, note, solved)
    return core


def _says_nothing(name: str, layer: Layer, parent: Layer) -> bool:
    """Is the name of a child just its kind, or an argument of its parent?"""
    numbered = re.fullmatch(rf"{re.escape(layer.name)}[_~]\d+", name)
    return bool(numbered) or name == layer.name or name in parent.settings


def _each(place: Place, tree: Any) -> Places:
    return [place for _ in jax.tree.leaves(tree)]
