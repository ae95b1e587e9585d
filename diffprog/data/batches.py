"""Batches of what lies in memory; training takes any other iterable of pytrees as well."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_count, held
from diffprog.core.errors import LayerError
from diffprog.core.notation import code, show

__all__ = ["batches"]


def batches(
    data: Any, batch_size: int, *, seed: int | None = None, epochs: int | None = None
) -> Batches:
    """Cut a pytree of arrays into batches along the first axis.

    With a seed the batches are shuffled, and endless unless `epochs` are given: every example comes
    once before any comes again, and a batch may reach across that border, so that all have one size
    and none is lost. Without a seed they come in order, and the last one may be smaller. Iterating
    anew starts anew, with the same order; `fit` begins at the batch of the state's step.

    Args:
        data: arrays with one length, for example ``(x, y)`` or ``{"x": x, "y": y}``. What NumPy
            reads is one too, such as a list of labels, a table or tensor of another library; a
            structured array is a dict of its fields.
        batch_size: examples in a batch; positive.
        seed: of the shuffling.
        epochs: how often each example comes in all, the last batch being what is left; None is
            without end, and once without a seed.

    Raises:
        LayerError: arrays of different lengths.

    Example:
        >>> x = jnp.arange(5)
        >>> [batch.tolist() for batch in dp.batches(x, 2)]
        [[0, 1], [2, 3], [4]]
        >>> sorted(sum((batch.tolist() for batch in dp.batches(x, 2, seed=0, epochs=1)), []))
        [0, 1, 2, 3, 4]
    """
    check_count("batch_size", batch_size)
    if epochs is not None:
        check_count("epochs", epochs)
    data = arrays(data)
    for leaf in jax.tree.leaves(data, is_leaf=_is_list):
        if isinstance(leaf, list):
            raise LayerError("arrays with an axis of examples", show(leaf),
                             "convert it: np.asarray(x)")
    length = examples_in(data)
    times = epochs if epochs or seed is not None else 1
    return Batches(jax.tree.map(np.asarray, data), batch_size, seed, times, length)


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
    """An iterable of batches, `epochs` being None if they are endless; see `batches`."""

    data: Any
    batch_size: int
    seed: int | None
    epochs: int | None
    length: int

    def __repr__(self) -> str:
        return (f"batches({show(self.data)}, {self.batch_size}, seed={self.seed}, "
                f"epochs={self.epochs})")

    def __iter__(self) -> Iterator[Any]:
        return self.begun(0)

    def begun(self, number: int) -> Iterator[Any]:
        """The batches from that number on, counted over as many rounds as it takes."""
        if count := self.count:
            number %= count
        for rows in itertools.islice(self._rows(), number, None):
            yield jax.tree.map(lambda a, rows=rows: a[rows], self.data)

    @property
    def count(self) -> int | None:
        """How many batches there are; None if they are endless."""
        if self.epochs is None:
            return None
        if self.seed is None:
            return self.epochs * -(-self.length // self.batch_size)
        return -(-self.epochs * self.length // self.batch_size)

    def _rows(self) -> Iterator[Any]:
        return self._in_order() if self.seed is None else self._shuffled(self.seed)

    def _in_order(self) -> Iterator[Any]:
        for _ in range(self.epochs or 1):
            for first in range(0, self.length, self.batch_size):
                yield slice(first, first + self.batch_size)

    def _shuffled(self, seed: int) -> Iterator[Any]:
        draw = np.random.default_rng(seed)
        waiting, left = np.zeros(0, int), self.epochs
        while True:
            while len(waiting) < self.batch_size and left != 0:
                waiting = np.concatenate([waiting, draw.permutation(self.length)])
                left = None if left is None else left - 1
            if not len(waiting):
                return
            rows, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
            yield rows


def check_batches(name: str, data: Any) -> None:
    """Raise for what is no series of batches: one of them alone, or what gives none."""
    alone = isinstance(data, Mapping) or (
        isinstance(data, tuple) and any(hasattr(part, "shape") for part in data))
    if alone or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise LayerError(f"{name} as batches, one after another", show(data) if alone else
                         code(data), "pass batches(data, batch_size), or [batch] for a single one")


def check_ends(name: str, data: Any) -> None:
    """Raise for batches without end, which nothing can go through."""
    check_batches(name, data)
    if isinstance(data, Batches) and data.count is None:
        raise LayerError(f"{name} that ends", "endless batches(..., seed=...)",
                         "write batches(..., epochs=1)")


def as_batch(batch: Any) -> Any:
    """A batch as training takes it: arrays of numbers, with the dtypes that JAX will hold."""
    batch = arrays(batch)
    for leaf in jax.tree.leaves(batch, is_leaf=_is_list):
        if isinstance(leaf, (list, str)) or not _is_number(getattr(leaf, "dtype", type(leaf))):
            raise LayerError("a batch of arrays of numbers", show(leaf),
                             "convert it by np.asarray, and what is no number to one")
    return held(batch)


def arrays(tree: Any) -> Any:
    """A pytree in which what NumPy reads as an array is one: lists of labels, tables, tensors.

    A structured array becomes a dict of its fields. Lists in lists stay as they are: they may be
    of several lengths.
    """
    return jax.tree.map(_array, tree, is_leaf=_is_list)


def _is_list(x: Any) -> bool:
    """Is it a list of labels or numbers, or of such lists, and no list of arrays?"""
    return isinstance(x, list) and bool(x) and all(
        isinstance(leaf, (int, float, complex, str, np.generic)) for leaf in jax.tree.leaves(x))


def _is_number(dtype: Any) -> bool:
    number = not jnp.issubdtype(dtype, np.character) and (
        jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))
    return number or jnp.issubdtype(dtype, jax.dtypes.extended)


def _array(leaf: Any) -> Any:
    if isinstance(leaf, list):
        return leaf if any(isinstance(part, list) for part in leaf) else np.asarray(leaf)
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)) and hasattr(leaf, "__array__"):
        leaf = np.asarray(leaf)
    if isinstance(leaf, np.ndarray) and leaf.dtype.names:
        return {name: _array(leaf[name]) for name in leaf.dtype.names}
    return leaf
