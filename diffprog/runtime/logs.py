"""What a run writes down: a line of JSON for each reading, and a bar in the terminal."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

Log = str | pathlib.Path | Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def writer(log: Log | None) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """What is called with each reading: it appends to the file, or is the function that was given.
    """
    if isinstance(log, (str, pathlib.Path)):
        with open(log, "a") as file:

            def write(step: int, metrics: dict[str, float]) -> None:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
                file.flush()  # a killed run keeps what it learned

            yield write
    else:
        yield log or (lambda step, metrics: None)


def bar(steps: int, progress: bool) -> Any:
    """A bar of so many steps, which shows nothing without `progress`."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError("the progress bar needs tqdm: pip install 'diffprog[train]', or "
                              "pass progress=False") from error
        return _NoBar()
    return tqdm(total=steps, disable=not progress, unit="step")


class _NoBar(contextlib.nullcontext):
    def update(self, steps: int) -> None:
        pass

    def set_postfix(self, metrics: Any) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self
