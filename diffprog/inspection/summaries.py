"""A net as a table: the input, output, parameters and cost of each layer.

Shapes suffice: a net of a billion parameters is summarized without allocating or compiling any.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax

from diffprog.core.computed import Mapped
from diffprog.core.layer import Layer
from diffprog.core.nets import is_window, silenced, unwrapped
from diffprog.core.notation import show
from diffprog.core.paths import count
from diffprog.core.plans import blank, spec, step_by_step
from diffprog.inspection.costs import flops
from diffprog.inspection.receptive import Field, Reach, Ways, behind, repeated
from diffprog.inspection.tables import table

__all__ = ["summary"]


_Calls = tuple[tuple[str, int], ...]  # names of children, each with the number of its call


class Row(NamedTuple):
    """One call of a layer.

    Attributes:
        path: of the layer in the net; a layer called twice has two rows.
        layer: the layer.
        input: shapes of the input.
        output: shapes of the output.
        parameters: number of parameters; 0 in all calls but the first.
        bytes: memory of its parameters and state.
        flops: floating-point operations at inference, over all copies and repetitions.
        field: the receptive field of a convolution or a pool in the net's input, and its stride;
            None for other layers.
        choice: the implementation, for a layer that chooses one by platform, shape and dtype, such
            as attention; empty for others.
    """

    path: str
    layer: Layer
    input: Any
    output: Any
    parameters: int
    bytes: int
    flops: float
    field: Field | None
    choice: str

    def cells(self) -> tuple[str, ...]:
        """The row as text, with only the kind of a layer made of layers."""
        copies = _copies(self.layer)
        kind = f"{self.layer.name} x {copies}" if copies > 1 else self.layer.name
        return (
            self.path, kind if self.layer.children else repr(self.layer),
            show(self.input), show(self.output),
            "" if self.layer.bare else f"{self.parameters:,}",
            "" if self.layer.bare else _short(self.bytes, "B"), _short(self.flops),
            *(map(_sides, self.field) if self.field else ("", "")), self.choice,
        )


class Kind(NamedTuple):
    """Totals of all layers of one kind, without the layers inside them."""

    calls: int
    parameters: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of a net, in the order of the calls; prints as a table.

    Attributes:
        rows: one for the net and for every call of a layer in it, with subtotals.
        kinds: kind of layer -> totals of all layers of that kind.
        parameters: number of parameters, including frozen ones.
        state: number of entries of the state.
        bytes: memory of parameters and state.
        flops: floating-point operations of one call at inference, as XLA counts them.
    """

    rows: list[Row]
    kinds: dict[str, Kind]
    parameters: int
    state: int
    bytes: int
    flops: float

    def __str__(self) -> str:
        titles = ("path", "layer", "input", "output", "parameters", "bytes", "FLOPs", "field",
                  "stride", "computed by")
        lines = table([titles, *(row.cells() for row in self.rows)], left=4)
        kinds = [("kind", "calls", "parameters", "FLOPs")]
        kinds += [(name, f"{kind.calls}", f"{kind.parameters:,}", _short(kind.flops))
                  for name, kind in self.kinds.items()]
        rule = "-" * max(map(len, lines))
        total = (f"parameters {self.parameters:,}   state {self.state:,}   "
                 f"memory {_short(self.bytes, 'B')}   FLOPs {_short(self.flops)}")
        return "\n".join([lines[0], rule, *lines[1:], rule, *table(kinds, left=1), rule, total])


def summary(net: Layer, x: Any, **side: Any) -> Summary:
    """A table of the layers of a net: path, input, output, parameters and cost, and totals.

    FLOPs are those of a call at inference, as XLA counts them before optimization: a multiply-add
    counts two, the body of a scan counts for each iteration, and transcendental functions do not
    count. Of several branches the most expensive counts, of branches by platform the one for the
    default backend, and of `fixed_point` one iteration. Receptive fields and total strides of
    convolutions and pools are in positions of the net's input; where branches meet, the field is
    their union.

    Args:
        net: any layer.
        x: its input, or `jax.ShapeDtypeStruct`s of it.
        side: its side inputs.

    Example:
        >>> net = dp.serial(dp.linear(3), jax.nn.relu)
        >>> print(dp.summary(net, jax.ShapeDtypeStruct((2, 4), jnp.float32)))
        path      layer        input         output        parameters  bytes  FLOPs
        ---------------------------------------------------------------------------
                  serial       float32[2,4]  float32[2,3]          15   60 B     60
        linear_0  linear(3)    float32[2,4]  float32[2,3]          15   60 B     54
        relu~0    jax.nn.relu  float32[2,3]  float32[2,3]                         6
        ---------------------------------------------------------------------------
        kind    calls  parameters  FLOPs
        linear      1          15     54
        relu        1           0      6
        ---------------------------------------------------------------------------
        parameters 15   state 0   memory 60 B   FLOPs 60
    """
    plan = net.plan(x, **side)
    reader = _Reader()
    rows, _ = reader.read((), net, spec(x), spec(side), (plan.params, plan.state), Reach(), 1)
    kinds = {name: kind for name, kind in reader.kinds.items() if kind.parameters or kind.flops}
    return Summary(rows, kinds, count(plan.params), count(plan.state),
                   rows[0].bytes, rows[0].flops)


class _Reader:
    """Reads a net once, in the order of the calls.

    The children of a program return zeros and add their own rows, so that only the program's own
    arithmetic is left to count.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {}
        self._read: dict[_Calls, tuple[list[Row], Reach | None]] = {}

    def read(self, calls: _Calls, *given: Any) -> tuple[list[Row], Reach | None]:
        """The rows of a layer and all layers inside, and the reach after it.

        `calls` lead to the layer and key a cache, as a deep net is read in several passes.
        """
        if calls not in self._read:
            def evaluate() -> None:
                self._read[calls] = self._rows(calls, *given)

            step_by_step(evaluate)
        return self._read[calls]

    def _rows(
        self, calls: _Calls, layer: Layer, x: Any, side: dict[str, Any], trees: tuple[Any, Any],
        reach: Reach | None, times: int,
    ) -> tuple[list[Row], Reach | None]:
        """`trees` have the axes of each `repeat` around the layer, `times` is their product."""
        core = _core(layer, x, side)
        inside = _Inside(self, calls, core, trees, reach, times * core.runs)
        own = times * core.around + inside.flops()
        made_of_layers = bool(inside.children)
        self._count(core.layer.name, 0 if made_of_layers else count(trees[0]), own)
        after = inside.after()
        row = Row(
            "/".join(name for name, _ in calls), layer, x, layer.plan(x, **side).y,
            count(trees[0]),
            sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(trees)),
            own + sum(rows[0].flops for rows in inside.below),
            after.field if after and is_window(core.layer) else None,
            core.layer.choice(core.x, core.side) if core.layer.choice else "")
        beyond_time = None if core.timed and layer.start else after
        return [row, *itertools.chain(*inside.below)], beyond_time

    def _count(self, name: str, parameters: int, own: float) -> None:
        kind = self.kinds.get(name, Kind(0, 0, 0.0))
        self.kinds[name] = Kind(kind.calls + 1, kind.parameters + parameters, kind.flops + own)


class _Inside:
    """One run of the innermost layer of wrappers, whose children add their rows to `below`."""

    def __init__(
        self, reader: _Reader, calls: _Calls, core: _Core, trees: tuple[Any, Any],
        reach: Reach | None, times: int,
    ) -> None:
        self.reader, self.calls, self.core, self.trees = reader, calls, core, trees
        self.before, self.times = reach, times
        self.plan = core.layer.plan(core.x, **core.side)
        self.children = core.layer.children if core.layer.rebuild else {}
        self.ways = Ways(reach)
        self.below: list[list[Row]] = []
        self.called: list[str] = []
        self.through: Reach | None = reach  # the reach of the output of one run

    def flops(self) -> float:
        """The layer's own operations, over all its runs, without those of its children."""
        layer = self.core.layer
        quiet = silenced(layer, self._call) if self.children else layer

        def run(params: Any, state: Any, x: Any, side: Any) -> Any:
            self.ways.put(x, self.before)
            y, state = quiet.apply(params, state, x, **side)
            self.through = self.ways.get(y)
            return y, state

        return self.times * flops(
            run, self.plan.params, self.plan.state, self.core.x, self.core.side)

    def after(self) -> Reach | None:
        """The reach after the layer; call `flops` first."""
        layer, depth = self.core.layer, self.core.depth
        if layer.children:
            return repeated(self.before, self.through, depth)
        return repeated(self.before, behind(layer, self.core.x, self.plan.y, self.before), depth)

    def _call(self, name: str, child: Layer, params: Any, x: Any, side: dict[str, Any]) -> Any:
        """Zeros in place of the child's output; its rows are added."""
        own = ({}, {}) if name in self.called else tuple(
            tree.get(name, {}) for tree in self.trees)
        self.called.append(name)
        rows, after = self.reader.read(
            (*self.calls, (name, self.called.count(name))), child, spec(x), spec(side),
            own, self.ways.get(x), self.times * self._at_once(name, x))
        self.below.append(rows)
        # Without it, XLA would remove operations on zeros, and those that only compute the input.
        y, _ = jax.lax.optimization_barrier((blank(rows[0].output), (params, x, side)))
        self.ways.put(y, after)
        return y

    def _at_once(self, name: str, x: Any) -> int:
        """The number of copies that run at once: `hyper` runs its target for each example."""
        if name != "target" or Mapped not in map(type, self.core.layer.computed):
            return 1
        whole, part = (jax.tree.leaves(given)[0].size for given in (self.core.x, x))
        return whole // max(part, 1)


class _Core(NamedTuple):
    """The innermost layer of wrappers, and how one call of the whole runs it.

    It runs `runs` times on inputs of these shapes, `depth` of them in sequence, and over time steps
    if `timed`; `around` are the operations of the wrappers themselves, as for computed parameters.
    """

    layer: Layer
    x: Any
    side: dict[str, Any]
    runs: int
    depth: int
    timed: bool
    around: float


def _core(layer: Layer, x: Any, side: dict[str, Any]) -> _Core:
    core = _Core(layer, x, side, runs=1, depth=1, timed=False, around=0.0)
    for wrapper, wraps, inner_x, inner_side in unwrapped(layer, x, side):
        runs, depth, timed, around = core.runs, core.depth, core.timed, core.around
        if wraps.order == "time":
            timed, runs = True, runs * jax.tree.leaves(core.x)[0].shape[1]
        elif wraps.order == "once" and wraps.dtype is None:
            # Operations of the wrapper itself, as for computed parameters.
            around += runs * (_of_call(wrapper, core.x, core.side)
                              - _of_call(wraps.layer, inner_x, inner_side))
        runs *= wraps.times
        depth *= wraps.times if wraps.order == "depth" else 1
        core = _Core(wraps.layer, inner_x, inner_side, runs, depth, timed, around)
    return core


def _copies(layer: Layer) -> int:
    """The number of copies that wrappers make of the innermost layer."""
    return layer.wraps.times * _copies(layer.wraps.layer) if layer.wraps else 1


def _of_call(layer: Layer, x: Any, side: dict[str, Any]) -> float:
    """The operations of a call at inference."""
    plan = layer.plan(x, **side)
    return flops(lambda params, state, x, side: layer.apply(params, state, x, **side)[0],
                 plan.params, plan.state, x, side)


def _short(number: float, unit: str = "") -> str:
    """Three digits and a prefix, ``1.23 M``; numbers below a thousand without one."""
    prefixes = iter(" kMGTPE")
    prefix = next(prefixes)
    while abs(number) >= 999.5:
        number, prefix = number / 1000, next(prefixes)
    return f"{number:.3g} {prefix.strip()}{unit}".rstrip()


def _sides(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides if len(set(sides)) > 1 else sides[:1]))
