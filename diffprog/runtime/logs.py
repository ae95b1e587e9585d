"""Logs of training: JSON lines in a file, and a progress bar in the terminal."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

Write = Callable[[int, dict[str, float]], None]
Log = str | pathlib.Path | Write


@contextlib.contextmanager
def writer(log: Log | None) -> Iterator[Write]:
    """The function that logs a reading: it appends to the file `log`, or is `log` itself."""
    if isinstance(log, (str, pathlib.Path)):
        with open(log, "a") as file:

            def write(step: int, metrics: dict[str, float]) -> None:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
                file.flush()  # so that a killed run keeps its log

            yield write
    else:
        yield log or (lambda step, metrics: None)


def bar(steps: int, progress: bool) -> Any:
    """A progress bar of `steps` steps; shows nothing if `progress` is False."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError("the progress bar needs tqdm: pip install 'diffprog[train]', or "
                              "pass progress=False") from error
        return _NoBar()
    return tqdm(total=steps, disable=not progress, unit="step")


class _NoBar(contextlib.nullcontext):
    """The bar without tqdm."""

    def update(self, steps: int) -> None:
        pass

    def set_postfix(self, metrics: Any) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self
