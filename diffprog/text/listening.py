"""A function of the host is told what a program writes, while it writes.

The program knows a number in place of the function, so that one program serves all of them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from diffprog.core.errors import LayerError
from diffprog.core.notation import code

T = TypeVar("T")
Callback = Callable[[int, np.ndarray], Any]

_COUNT = itertools.count()


class _Listener:
    """Hands on what comes in the order of the steps, in which a device need not tell it."""

    def __init__(self, callback: Callback) -> None:
        self.callback, self.failed = callback, None
        self.next, self.waiting, self.lock = 0, {}, threading.Lock()

    def hear(self, step: int, tokens: np.ndarray) -> None:
        with self.lock:
            if step < self.next:  # the program runs anew
                self.next, self.waiting = 0, {}
            self.waiting[step] = tokens
            while self.next in self.waiting:
                self._say(self.next, self.waiting.pop(self.next))
                self.next += 1

    def _say(self, step: int, tokens: np.ndarray) -> None:
        if self.failed is None:
            try:
                self.callback(step, tokens)
            except BaseException as error:  # raised where the program was called
                self.failed = error


_listeners: dict[int, _Listener] = {}


def heard(callback: Callback | None, run: Callable[[Any], T]) -> T:
    """``run(listener)``; what the program then tells reaches the callback before this returns.

    Inside of a function that is traced it is told whenever that runs.
    """
    if callback is None:
        return run(None)
    if not callable(callback):
        raise LayerError("callback as a function (step, tokens)", code(callback),
                         "pass lambda step, tokens: print(tokens), for example")
    number = next(_COUNT)
    listener = _listeners[number] = _Listener(callback)
    traced = False
    try:
        found = run(np.int32(number))
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(found))
        if not traced:
            jax.block_until_ready(found)
            jax.effects_barrier()
    finally:
        if not traced:
            del _listeners[number]
    if listener.failed is not None:
        raise listener.failed
    return found


def tell(listener: Any, step: jax.Array, tokens: jax.Array) -> None:
    """Tell the listener, if there is one, the tokens of a step."""
    if listener is not None:
        jax.debug.callback(_hear, listener, step, tokens)


def _hear(number: Any, step: Any, tokens: Any) -> None:
    if listener := _listeners.get(int(number)):
        listener.hear(int(step), np.asarray(tokens))
