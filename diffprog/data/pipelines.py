"""Batches that grain reads, shuffles and changes ahead in threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from diffprog.core.errors import LayerError
from diffprog.core.notation import code
from diffprog.data.batches import Batches, Remainder, batches

__all__ = ["pipeline"]

Transform = Callable[[jax.Array | None, Any], Any]

_AHEAD = 4  # batches that are read ahead, each by a thread of its own


def pipeline(
    data: Any, batch_size: int, *, seed: int | None = None, epochs: int | None = None,
    remainder: Remainder = "keep", transform: Transform | None = None,
) -> Pipeline:
    """`batches` that grain reads ahead in threads, for data on disk and for augmentation.

    Four batches are prepared while the step runs. Shuffling takes no memory, whatever the number of
    examples, and some 15 µs of a thread for each. `fit` begins at the batch of the state's step. An
    iterator is grain's, with ``get_state()``, a dict that JSON takes, and ``set_state(state)``: the
    batches after it are the same, bit for bit. What is read ahead does not count.

    Args:
        data, batch_size, epochs, remainder: as in `batches`. Pass memory-mapped arrays,
            ``np.load("x.npy", mmap_mode="r")``, or the windows of `token_windows`.
        seed: of the shuffling and of `transform`, in [0, 2**32). The order is another than that of
            `batches`.
        transform: ``transform(key, batch) -> batch``, called in the threads; the key depends on the
            seed and the number of the batch alone, and is None without a seed. Compile it:
            ``jax.jit(transform)``.

    Raises:
        ImportError: grain is not installed; it is in the extra ``data``.
        LayerError: as `batches`; a seed out of its range.

    Example:
        >>> import pathlib, tempfile, numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp(), "x.npy")
        >>> np.save(path, np.arange(12.0).reshape(6, 2))
        >>> x = np.load(path, mmap_mode="r")
        >>> data = dp.data.pipeline(x, 2, seed=0, transform=lambda key, batch: 10 * batch)
        >>> iterator = iter(data)
        >>> _, state = next(iterator), iterator.get_state()
        >>> second, again = next(iterator), iter(data)
        >>> again.set_state(state)
        >>> (next(again) == second).all()
        np.True_

    Source: grain, https://google-grain.readthedocs.io.
    """
    _grain()
    if seed is not None and not 0 <= seed < 2**32:
        raise LayerError("seed in [0, 2**32)", str(seed), "take another one")
    if transform is not None and not callable(transform):
        raise LayerError("transform as a function (key, batch)", code(transform),
                         "write lambda key, batch: batch, for example")
    found = batches(data, batch_size, seed=seed, epochs=epochs, remainder=remainder)
    return Pipeline(**vars(found), transform=transform)


@dataclasses.dataclass(frozen=True, repr=False)
class Pipeline(Batches):
    """An iterable of batches that grain reads, made by `pipeline`."""

    transform: Transform | None = None

    def begun(self, number: int) -> Iterator[Any]:
        """The batches from a number on, by an iterator of grain."""
        grain = _grain()
        options = grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)
        iterator = iter(self._rows_of_batches(grain).map_with_index(self._read)
                        .to_iter_dataset(options))
        iterator.set_state({"next_index": self.position(number)})
        return iterator

    def _rows_of_batches(self, grain: Any) -> Any:
        """The rows of each batch, by its number."""
        rows, cut = grain.MapDataset.range(self.length), {
            "batch_size": self.batch_size, "drop_remainder": self.remainder == "drop"}
        if self.seed is None:
            return rows.batch(**cut).repeat(self.epochs)
        # Endless: with None the number of rows overflows in batches of one.
        return rows.shuffle(self.seed).repeat(self.epochs or 2**62 // self.length).batch(**cut)

    def _read(self, number: int, rows: Any) -> Any:
        batch = self.cut(rows)
        if self.transform is None:
            return batch
        key = None if self.seed is None else jax.random.fold_in(
            jax.random.key(self.seed), number % 2**32)
        return self.transform(key, batch)


def _grain() -> Any:
    """The package, which takes seconds to import."""
    try:
        import grain
    except ImportError as error:
        raise ImportError("pipeline reads by grain: pip install 'diffprog[data]', or use "
                          "batches") from error
    return grain
