"""Measurements of the benchmarks: CPU times of interleaved sides, and counts of instructions.

Times are CPU seconds of this process. The sides to compare run in turn in each round, so noise of
the machine affects all of them alike; a ratio is the median over the rounds.
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
    """For each side, the median of its values, and that of their ratios to those of the first side.

    Each round runs all sides; the side that runs first changes from round to round.
    """
    names = list(sides)
    values: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(rounds):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            values[name].append(sides[name]())
    ratios = {name: [a / b for a, b in zip(values[name], values[names[0]], strict=True)]
              for name in names}
    return {name: (statistics.median(values[name]), statistics.median(ratios[name]))
            for name in names}


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> float:
    """The median over rounds of the CPU time of `ours` over that of `theirs`."""
    sides = {"theirs": lambda: cpu(theirs), "ours": lambda: cpu(ours)}
    return interleaved(sides, rounds)["ours"][1]


def instructions(compiled: Any) -> int:
    """The number of instructions of an optimized program, with those inside fusions and loops."""
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", compiled.as_text(), re.MULTILINE))
