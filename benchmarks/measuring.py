"""How the benchmarks measure: CPU time of sides that take turns, and counts that have no noise.

Times are CPU seconds of this process, interleaved, so that a noisy machine disturbs all sides
alike; a ratio is the median over rounds.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def cpu(f: Callable[[], Any]) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def interleaved(
    sides: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Of each side the median of what it returns, and of that / what the first side returns.

    In every round the sides run one after the other; which is the first to run goes round.
    """
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(sides[name]())
    ratios = {name: [a / b for a, b in zip(found[name], found[names[0]], strict=True)]
              for name in names}
    return {name: (statistics.median(found[name]), statistics.median(ratios[name]))
            for name in names}


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> float:
    """The median CPU time of ours / theirs over rounds that take turns in going first."""
    sides = {"theirs": lambda: cpu(theirs), "ours": lambda: cpu(ours)}
    return interleaved(sides, rounds)["ours"][1]


def instructions(compiled: Any) -> int:
    """How many instructions an optimized program has, those inside fusions and loops too."""
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", compiled.as_text(), re.MULTILINE))
