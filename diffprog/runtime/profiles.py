"""A profile of some steps of a run."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import jax

from diffprog.core.arguments import check_count

__all__ = ["trace"]


def trace(folder: str | pathlib.Path, *, after: int, steps: int) -> Trace:
    """An observer that records a profiler trace of some steps; call it after each step.

    The trace begins when `after` steps are taken, ends `steps` later, and waits for the device at
    both ends. TensorBoard, XProf and Perfetto show it. Where a run may stop earlier, ``close()``,
    or a ``with`` block, ends the trace.

    Args:
        folder: of the trace; it is made if it does not exist.
        after: number of steps before the trace; at least 1, since the first step compiles.
        steps: number of steps that are traced; the trace grows with it.

    Returns:
        ``(step, state, metrics)``; the metrics are not used.

    Raises:
        LayerError: `after` or `steps` is not a positive int.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> double = jax.jit(lambda x: 2 * x)
        >>> with dp.runtime.trace(folder, after=2, steps=2) as profile:
        ...     x = jnp.ones(3)
        ...     for number in range(1, 6):
        ...         x = double(x)
        ...         profile(number, x, {})
        >>> len(list(folder.rglob("*.xplane.pb")))
        1
    """
    check_count("after", after)
    check_count("steps", steps)
    return Trace(str(folder), after, steps)


class Trace(contextlib.ExitStack):
    """The observer of `trace`."""

    def __init__(self, folder: str, after: int, steps: int) -> None:
        super().__init__()
        self._folder, self._after, self._steps = folder, after, steps
        self._last: int | None = None  # the last step that is traced, once the trace has begun

    def __call__(self, step: int, state: Any, metrics: dict[str, Any]) -> None:
        if self._last is None and step >= self._after:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self.callback(jax.profiler.stop_trace)
            self._last = step + self._steps
        elif self._last is not None and step >= self._last:
            jax.block_until_ready(state)
            self.close()  # which does nothing if the trace has ended
