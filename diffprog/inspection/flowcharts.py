"""Flowcharts as Mermaid text: nodes in boxes, and arrows between them.

GitHub, GitLab, Jupyter and documentation generators render Mermaid. Labels are quoted, and
characters with a meaning in Mermaid or Markdown are escaped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

_ESCAPES = str.maketrans({
    "#": "#35;", '"': "#quot;", "&": "#amp;", "<": "#lt;", ">": "#gt;", "`": "#96;", "*": "#42;",
    "+": "#43;",  # alone it would start a list in Markdown
})
_OUTLINES = {  # kind of node -> the brackets around its label
    "layer": ("[", "]"), "closed": ("[[", "]]"), "end": ("([", "])"), "operation": ("(", ")"),
    "symbol": ("((", "))"),
}


@dataclasses.dataclass(eq=False)
class Node:
    """A node; its label is lines of text, its kind a key of the outlines."""

    label: list[str]
    kind: str


@dataclasses.dataclass(eq=False)
class Box:
    """A frame with a title around nodes and other boxes."""

    title: str
    inside: list[Node | Box] = dataclasses.field(default_factory=list)

    def node(self, label: list[str], kind: str) -> Node:
        """A new node in the box."""
        self.inside.append(Node(label, kind))
        return self.inside[-1]  # type: ignore[return-value]

    def box(self, title: str) -> Box:
        """A new box in the box."""
        self.inside.append(Box(title))
        return self.inside[-1]  # type: ignore[return-value]


Place = Node | Box


class Flowchart:
    """A flowchart; `str` is its Mermaid text, in the order of drawing."""

    def __init__(self) -> None:
        self.sheet = Box("")
        self._arrows: dict[tuple[Place, Place, bool], list[str]] = {}

    def arrow(
        self, start: Place | None, end: Place, shape: str, role: str = "", silent: bool = False
    ) -> None:
        """An arrow with a shape; dotted if it has a role, which it shows unless `silent`.

        Arrows between the same places become one with all labels; without a start there is none.
        """
        if start is not None:
            labels = self._arrows.setdefault((start, end, bool(role)), [])
            label = f"{role}: {shape}" if role and not silent else shape
            if label not in labels:
                labels.append(label)

    def __str__(self) -> str:
        names: dict[Place, str] = {}
        lines = ["flowchart TD", *_contents(self.sheet, names, "    ")]
        for (start, end, dotted), labels in self._arrows.items():
            line = "-.->" if dotted else "-->"
            lines.append(f"    {names[start]} {line}|{_quoted(labels, ', ')}| {names[end]}")
        return "\n".join(lines)


def _contents(box: Box, names: dict[Place, str], indent: str) -> Iterator[str]:
    """The lines of a box; every place gets a name that is no keyword of Mermaid."""
    for place in box.inside:
        names[place] = name = f"{'n' if isinstance(place, Node) else 'b'}{len(names)}"
        if isinstance(place, Node):
            left, right = _OUTLINES[place.kind]
            yield f"{indent}{name}{left}{_quoted(place.label, '<br>')}{right}"
        else:
            yield f"{indent}subgraph {name}[{_quoted([place.title])}]"
            yield from _contents(place, names, indent + "    ")
            yield f"{indent}end"


def _quoted(lines: list[str], joint: str = "") -> str:
    return f'"{joint.join(line.translate(_ESCAPES) for line in lines)}"'
