"""Batches of what lies in memory; training takes any other iterable of pytrees as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from diffprog.arguments import check_count
from diffprog.errors import LayerError
from diffprog.notation import show

__all__ = ["batches"]


def batches(data: Any, batch_size: int, *, seed: int | None = None) -> Batches:
    """Cut a pytree of arrays into batches along the first axis.

    With a seed the batches are shuffled and endless: every example comes once before any comes
    again, and a batch may reach across that border, so that all have one size and none is lost.
    Without a seed they come once, in order, and the last one may be smaller. Iterating anew starts
    anew, with the same order.

    Args:
        data: arrays with one length, for example ``(x, y)`` or ``{"x": x, "y": y}``.
        batch_size: examples in a batch; positive.
        seed: of the shuffling.

    Raises:
        LayerError: arrays of different lengths.

    Example:
        >>> x = jnp.arange(5)
        >>> [batch.tolist() for batch in dp.batches(x, 2)]
        [[0, 1], [2, 3], [4]]
    """
    check_count("batch_size", batch_size)
    length = examples_in(data)
    return Batches(jax.tree.map(np.asarray, data), batch_size, seed, length)


def examples_in(data: Any) -> int:
    """The length of the first axis of all arrays in a pytree; raise if it is not one."""
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(data)]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) != 1 or 0 in lengths:
        raise LayerError("arrays of one length along the first axis", show(data),
                         "cut them to one length")
    return lengths.pop()


@dataclasses.dataclass(frozen=True)
class Batches:
    """An iterable of batches; see `batches`."""

    data: Any
    batch_size: int
    seed: int | None
    length: int

    def __iter__(self) -> Iterator[Any]:
        for rows in self._in_order() if self.seed is None else self._shuffled(self.seed):
            yield jax.tree.map(lambda a, rows=rows: a[rows], self.data)

    def _in_order(self) -> Iterator[Any]:
        for first in range(0, self.length, self.batch_size):
            yield slice(first, first + self.batch_size)

    def _shuffled(self, seed: int) -> Iterator[Any]:
        draw = np.random.default_rng(seed)
        waiting = np.zeros(0, int)
        while True:
            while len(waiting) < self.batch_size:
                waiting = np.concatenate([waiting, draw.permutation(self.length)])
            rows, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
            yield rows
