"""Batches of arrays in memory; training accepts any other iterable of pytrees as well."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_count, held
from diffprog.core.errors import LayerError
from diffprog.core.notation import code, show

__all__ = ["batches"]

Remainder = Literal["keep", "drop", "pad"]


def batches(
    data: Any, batch_size: int, *, seed: int | None = None, epochs: int | None = None,
    remainder: Remainder = "keep",
) -> Batches:
    """Cut a pytree of arrays into batches along the first axis.

    With a seed the examples are shuffled anew each epoch, and the batches are endless unless
    `epochs` is given. A batch may span two epochs, so that all batches have one size and no example
    is dropped. Without a seed the batches are in order, and the last may be smaller. Iterating
    again yields the same batches; `fit` begins at the batch of the state's step. ``len`` is the
    number of batches, unless they are endless.

    Args:
        data: arrays of one length, for example ``(x, y)`` or ``{"x": x, "y": y}``. Anything that
            NumPy converts is an array: a list of labels, a table or tensor of another library. A
            structured array becomes a dict of its fields. A memory-mapped array,
            ``np.load("x.npy", mmap_mode="r")``, is read batch by batch.
        batch_size: examples per batch; positive.
        seed: of the shuffling.
        epochs: number of epochs. None is endless with a seed, and one epoch without.
        remainder: what becomes of the examples that fill no batch, at the end of each epoch without
            a seed and of the last one with a seed. "keep" yields them as a smaller batch; "drop"
            leaves them out; "pad" repeats the last example up to `batch_size`. Padded batches are
            dicts, with ``x`` and ``y`` for a pair and ``x`` for one array, and all of them have a
            ``mask``, (batch,), False for the padding, which also clears a ``mask`` of the data.
            Objectives ignore the padding, so that metrics are those of the examples.

    Raises:
        LayerError: arrays of different lengths; `remainder` is none of these; "drop" with fewer
            examples than a batch; "pad" with a tuple of three or more.

    Example:
        >>> x = jnp.arange(5)
        >>> [batch.tolist() for batch in dp.batches(x, 2)]
        [[0, 1], [2, 3], [4]]
        >>> sorted(sum((batch.tolist() for batch in dp.batches(x, 2, seed=0, epochs=1)), []))
        [0, 1, 2, 3, 4]
        >>> list(dp.batches(x, 2, remainder="pad"))[-1]["mask"].tolist()
        [True, False]
    """
    check_count("batch_size", batch_size)
    if epochs is not None:
        check_count("epochs", epochs)
    data = arrays(data)
    for leaf in jax.tree.leaves(data, is_leaf=_is_list):
        if isinstance(leaf, list):
            raise LayerError("arrays with a batch axis", show(leaf),
                             "convert it: np.asarray(x)")
    length = examples_in(data)
    if remainder not in ("keep", "drop", "pad"):
        raise LayerError("remainder out of keep, drop, pad", repr(remainder), "choose one of them")
    if remainder == "pad":
        data = _with_mask(data, length)
    if seed is None and epochs is None:
        epochs = 1
    data = jax.tree.map(np.asarray, data)
    found = Batches(data, batch_size, seed, epochs, length, remainder)
    if found.count == 0:
        raise LayerError(f"at least {batch_size} examples, one batch", str(length),
                         'lower batch_size, or pass remainder="keep"')
    return found


def _with_mask(data: Any, length: int) -> dict[Any, Any]:
    """The data as a dict with a mask of its examples, unless it has one."""
    if isinstance(data, (tuple, list)) and len(data) == 2:
        data = {"x": data[0], "y": data[1]}
    elif isinstance(data, (tuple, list)):
        raise LayerError("data to pad as a dict, a pair (x, y) or one array", show(data),
                         'name the arrays, {"x": x, "y": y}: the mask needs a name too')
    elif not isinstance(data, Mapping):
        data = {"x": data}
    valid = np.ones(length, bool)
    return {**data, "mask": valid if data.get("mask") is None else data["mask"]}


def examples_in(data: Any) -> int:
    """The common length of the first axes in a pytree; raise if there is none."""
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(data)]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) != 1 or 0 in lengths:
        raise LayerError("arrays of one length along the first axis", show(data),
                         "cut them to one length")
    return lengths.pop()


@dataclasses.dataclass(frozen=True)
class Batches:
    """An iterable of batches, made by `batches`; endless if `epochs` is None."""

    data: Any
    batch_size: int
    seed: int | None
    epochs: int | None
    length: int
    remainder: Remainder = "keep"

    def __repr__(self) -> str:
        return (f"{type(self).__name__.lower()}({show(self.data)}, {self.batch_size}, "
                f"seed={self.seed}, epochs={self.epochs}, remainder={self.remainder!r})")

    def __iter__(self) -> Iterator[Any]:
        return self.begun(0)

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError(f"{self!r} has no length: it is endless without epochs")
        return self.count

    def __bool__(self) -> bool:
        return True  # endless batches are true as well, though they have no length

    def begun(self, number: int) -> Iterator[Any]:
        """The batches from a number on; numbers continue over repeated iterations."""
        return map(self.cut, itertools.islice(self._rows(), self.position(number), None))

    def position(self, number: int) -> int:
        """The number of a batch within one iteration."""
        return number % self.count if self.count else number

    def cut(self, rows: Any) -> Any:
        """The batch of these rows, ints or a slice, padded to the batch size if asked."""
        batch = jax.tree.map(lambda a: a[rows], self.data)
        if self.remainder != "pad":
            return batch
        missing = self.batch_size - len(batch["mask"])
        padded = jax.tree.map(
            lambda a: np.concatenate([a, np.repeat(a[-1:], missing, 0)]) if missing else a, batch)
        padded["mask"][self.batch_size - missing :] = False
        return padded

    @property
    def count(self) -> int | None:
        """The number of batches; None if they are endless."""
        if self.epochs is None:
            return None
        repeats, length = ((self.epochs, self.length) if self.seed is None else
                           (1, self.epochs * self.length))
        short = 0 if self.remainder == "drop" else self.batch_size - 1
        return repeats * ((length + short) // self.batch_size)

    def _rows(self) -> Iterator[Any]:
        return self._in_order() if self.seed is None else self._shuffled(self.seed)

    def _in_order(self) -> Iterator[Any]:
        end = self.length - self.length % self.batch_size if self.remainder == "drop" else (
            self.length)
        for _ in range(self.epochs or 1):
            for first in range(0, end, self.batch_size):
                yield slice(first, first + self.batch_size)

    def _shuffled(self, seed: int) -> Iterator[Any]:
        rng = np.random.default_rng(seed)
        waiting, epochs_left = np.zeros(0, int), self.epochs
        while True:
            while len(waiting) < self.batch_size and epochs_left != 0:
                waiting = np.concatenate([waiting, rng.permutation(self.length)])
                epochs_left = None if epochs_left is None else epochs_left - 1
            if not len(waiting) or (self.remainder == "drop" and len(waiting) < self.batch_size):
                return
            rows, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
            yield rows


def check_batches(name: str, data: Any) -> None:
    """Raise unless data is an iterable of batches; a single batch is not."""
    single = isinstance(data, Mapping) or (
        isinstance(data, tuple) and any(hasattr(part, "shape") for part in data))
    if single or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise LayerError(f"{name} as an iterable of batches", show(data) if single else code(data),
                         "pass batches(data, batch_size), or [batch] for a single one")


def check_ends(name: str, data: Any) -> None:
    """Raise for endless batches, which cannot be iterated to the end."""
    check_batches(name, data)
    if isinstance(data, Batches) and data.count is None:
        raise LayerError(f"{name} that ends", "endless batches(..., seed=...)",
                         "write batches(..., epochs=1)")


def as_batch(batch: Any) -> Any:
    """A batch for training: arrays of numbers, with dtypes that JAX represents."""
    batch = arrays(batch)
    for leaf in jax.tree.leaves(batch, is_leaf=_is_list):
        if isinstance(leaf, (list, str)) or not _is_number(getattr(leaf, "dtype", type(leaf))):
            raise LayerError("a batch of arrays of numbers", show(leaf),
                             "convert it by np.asarray, and strings to numbers")
    return held(batch)


def arrays(tree: Any) -> Any:
    """The pytree with lists of labels, tables and tensors converted to NumPy arrays.

    A structured array becomes a dict of its fields. Nested lists stay as they are, since they may
    be ragged.
    """
    return jax.tree.map(_array, tree, is_leaf=_is_list)


def _is_list(x: Any) -> bool:
    """Whether x is a possibly nested list of labels or numbers, rather than of arrays."""
    return isinstance(x, list) and bool(x) and all(
        isinstance(leaf, (int, float, complex, str, np.generic)) for leaf in jax.tree.leaves(x))


def _is_number(dtype: Any) -> bool:
    """Whether a dtype is one of numbers, booleans or keys."""
    if jnp.issubdtype(dtype, np.character):
        return False
    return any(jnp.issubdtype(dtype, kind)
               for kind in (jnp.number, jnp.bool_, jax.dtypes.extended))


def _array(leaf: Any) -> Any:
    if isinstance(leaf, list):
        return leaf if any(isinstance(part, list) for part in leaf) else np.asarray(leaf)
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)) and hasattr(leaf, "__array__"):
        leaf = np.asarray(leaf)
    if isinstance(leaf, np.ndarray) and leaf.dtype.names:
        return {name: _array(leaf[name]) for name in leaf.dtype.names}
    return leaf
