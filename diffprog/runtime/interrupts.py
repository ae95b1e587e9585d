"""Ctrl-C, where a computation must not be halved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def uncut() -> Iterator[None]:
    """A block at whose end Ctrl-C is heard, unless it comes twice: a step must not be halved."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []

    def wait(*given: Any) -> None:
        if came:
            handler(*given)
        came.append(given)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[0])
