"""Patterns of paths: ``*`` stands for one level, ``**`` for any number of levels, none included."""

from __future__ import annotations

import re

__all__ = ["matches"]


def matches(path: str, pattern: str) -> bool:
    """Does a path match a pattern?

    Args:
        path, pattern: levels joined by ``/``; those of a pattern may hold ``*``.

    Example:
        >>> dp.tree.matches("blocks/feed/kernel", "blocks/**"), dp.tree.matches("a/b/c", "a/*")
        (True, False)
    """
    return _fits(path.split("/"), pattern.split("/"))


def _fits(levels: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not levels
    first, *rest = pattern
    if first == "**":
        return any(_fits(levels[i:], rest) for i in range(len(levels) + 1))
    one = "[^/]*".join(map(re.escape, first.split("*")))
    return bool(levels and re.fullmatch(one, levels[0])) and _fits(levels[1:], rest)
