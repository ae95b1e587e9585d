"""Callbacks: a Python function receives the tokens of a running program, step by step.

The program receives the number of a listener instead of the function, so that one compiled program
serves all functions.
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
    """Calls a function with the steps in order; a device may deliver them in any order."""

    def __init__(self, callback: Callback) -> None:
        self.callback, self.error = callback, None
        self.next, self.waiting, self.lock = 0, {}, threading.Lock()

    def receive(self, step: int, tokens: np.ndarray) -> None:
        with self.lock:
            if step < self.next:  # a new run of the program
                self.next, self.waiting = 0, {}
            self.waiting[step] = tokens
            while self.next in self.waiting:
                self._call(self.next, self.waiting.pop(self.next))
                self.next += 1

    def _call(self, step: int, tokens: np.ndarray) -> None:
        if self.error is None:
            try:
                self.callback(step, tokens)
            except BaseException as error:  # raised again by `with_callback`
                self.error = error


_listeners: dict[int, _Listener] = {}


def with_callback(callback: Callback | None, run: Callable[[Any], T]) -> T:
    """``run(listener)``; all calls of the callback are over when it returns.

    Inside a traced function the callback is called at each run of the traced program.
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
        result = run(np.int32(number))
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(result))
        if not traced:
            jax.block_until_ready(result)
            jax.effects_barrier()
    finally:
        if not traced:
            del _listeners[number]
    if listener.error is not None:
        raise listener.error
    return result


def emit(listener: Any, step: jax.Array, tokens: jax.Array) -> None:
    """Send the tokens of a step to the listener; nothing if it is None."""
    if listener is not None:
        jax.debug.callback(_receive, listener, step, tokens)


def _receive(number: Any, step: Any, tokens: Any) -> None:
    if listener := _listeners.get(int(number)):
        listener.receive(int(step), np.asarray(tokens))
