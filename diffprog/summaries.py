"""A net as a table: what goes in and out of every layer, and how many parameters it holds.

Everything is read off the plan, that is, off shapes: a net of a billion parameters is summarized
without allocating one of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from diffprog import tree
from diffprog.layer import Layer, Plan, spec
from diffprog.notation import show

__all__ = ["summary"]


class Row(NamedTuple):
    """One layer: its path, itself, what goes in and out, and its parameters."""

    path: str
    layer: Layer
    input: Any
    output: Any
    parameters: int

    def cells(self) -> tuple[str, ...]:
        """The row as text; of a layer made of layers only the kind is shown."""
        count = self.layer.settings.get("n", "") if self.layer.children else ""
        kind = f"{self.layer.name}{f' x {count}' if count else ''}"
        name = kind if self.layer.children else repr(self.layer)
        parameters = "" if self.layer.bare else f"{self.parameters:,}"
        return self.path, name, show(self.input), show(self.output), parameters


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of a net, in the order of the calls; prints as a table.

    Attributes:
        rows: one for the net and for every layer in it, with subtotals.
        parameters: how many numbers are trained.
        state: how many numbers are carried from call to call.
        bytes: memory that parameters and state take.
    """

    rows: list[Row]
    parameters: int
    state: int
    bytes: int

    def __str__(self) -> str:
        titles = ("path", "layer", "input", "output", "parameters")
        table = [titles, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for *texts, number in table:
            cells = [text.ljust(width) for text, width in zip(texts, widths, strict=False)]
            lines.append("  ".join([*cells, number.rjust(widths[-1])]).rstrip())
        rule = "-" * max(map(len, lines))
        total = (f"parameters {self.parameters:,}   state {self.state:,}   "
                 f"memory {self.bytes / 1e6:,.3f} MB")
        return "\n".join([lines[0], rule, *lines[1:], rule, total])


def summary(net: Layer, x: Any, **side: Any) -> Summary:
    """Path, layer, input, output and parameters of everything in a net, and totals.

    Args:
        net: any layer.
        x: its input, or `jax.ShapeDtypeStruct`s of it.
        side: its side inputs.

    Example:
        >>> net = dp.serial(dp.linear(3), jax.nn.relu)
        >>> print(dp.summary(net, jax.ShapeDtypeStruct((2, 4), jnp.float32)))
        path      layer        input         output        parameters
        -------------------------------------------------------------
                  serial       float32[2,4]  float32[2,3]          15
        linear_0  linear(3)    float32[2,4]  float32[2,3]          15
        relu~0    jax.nn.relu  float32[2,3]  float32[2,3]
        -------------------------------------------------------------
        parameters 15   state 0   memory 0.000 MB
    """
    plan = net.plan(x, **side)
    rows = list(_rows("", net, spec(x), plan, plan.params))
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((plan.params, plan.state)))
    return Summary(rows, tree.count(plan.params), tree.count(plan.state), size)


def _rows(path: str, layer: Layer, x: Any, plan: Plan, params: Any) -> Any:
    """The row of a layer and those of its children; `params` carries the axes of every `repeat`."""
    yield Row(path, layer, x, plan.y, tree.count(params))
    for name, (seen, side) in plan.calls.items():
        child = layer.children[name]
        below = f"{path}/{name}" if path else name
        yield from _rows(below, child, seen, child.plan(seen, **side), params.get(name, {}))
