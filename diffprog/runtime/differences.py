"""The difference between saved leaves and those of a net, with likely renames."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from diffprog.core.errors import LayerError
from diffprog.core.notation import show
from diffprog.core.paths import paths

_MOST = 12  # lines of a message


def described(tree: Any) -> dict[str, str]:
    """Path -> dtype and shape of each leaf, or the type of a number."""
    return {path: type(leaf).__name__ if isinstance(leaf, (int, float)) else show(leaf)
            for path, leaf in paths(tree).items()}


def difference(
    what: str, saved: Mapping[str, str], wanted: Mapping[str, str]
) -> LayerError | None:
    """An error with the paths in which two descriptions differ; None if they are equal."""
    lines = list(_lines(saved, wanted))
    if not lines:
        return None
    shown = lines[:_MOST] + [f"and {len(lines) - _MOST} more"] * (len(lines) > _MOST)
    return LayerError(f"{what} with the leaves of this net", f"{len(lines)} that differ",
                      "compose the net that was saved, or rename what differs:\n  "
                      + "\n  ".join(shown))


def _lines(saved: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    """What is missing, what has another name, dtype or shape, and what is left over."""
    unused = {path: kind for path, kind in saved.items() if path not in wanted}
    for path, kind in wanted.items():
        if path in saved and saved[path] != kind:
            yield f"{path}: {kind}, saved as {saved[path]}"
        elif path not in saved:
            same = [other for other, found in unused.items() if found == kind]
            likely = difflib.get_close_matches(path, same, n=1, cutoff=0.5)
            for other in likely:
                del unused[other]
            yield f"{path}: {kind}, " + (f"perhaps saved as {likely[0]}" if likely else "not saved")
    for path, kind in unused.items():
        yield f"{path}: {kind}, saved but not in the net"
