"""Ctrl-C, and the signal to end, during a computation that must finish."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name)]


@contextlib.contextmanager
def terminable(wanted: bool) -> Iterator[None]:
    """A block in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does, if `wanted`."""
    if not (wanted and hasattr(signal, "SIGTERM") and _is_main()):
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """A block that handles Ctrl-C, and SIGTERM if it has a handler, at its end.

    The second signal interrupts at once.
    """
    handlers = {number: handler for number in _SIGNALS
                if callable(handler := signal.getsignal(number))}
    if not handlers or not _is_main():
        yield
        return
    received: list[Any] = []

    def defer(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            handlers[number](number, frame)  # type: ignore[operator]

    for number in handlers:
        signal.signal(number, defer)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        handlers[received[0]](received[0], None)  # type: ignore[operator]


def _is_main() -> bool:
    """Whether this is the thread that gets signals."""
    return threading.current_thread() is threading.main_thread()
