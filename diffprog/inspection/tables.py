"""Aligned text for summaries and other reports."""

from __future__ import annotations


def table(rows: list[tuple[str, ...]], left: int) -> list[str]:
    """Aligned lines, the first `left` columns to the left; without empty columns."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = [text.ljust(width) if i < left else text.rjust(width)
                 for i, (text, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
