"""Transfer of batches to the device ahead of their use."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from diffprog.core.arguments import check_count
from diffprog.data.batches import as_batch, check_batches

__all__ = ["prefetch"]


def prefetch(data: Iterable[Any], size: int = 2) -> Iterator[Any]:
    """Iterate over `data` with the next `size` batches on their way to the device.

    A transfer is only begun, so that it overlaps the step, and batches are prepared while the
    device computes. An error of the data is raised after the batches before it. If the iterator of
    the data has ``get_state`` and ``set_state``, so has this one: the position is that of the last
    batch that was returned, not of those ahead. The data must not write into a batch that it has
    returned.

    Args:
        data: an iterable of batches, as `fit` takes it.
        size: number of batches ahead; positive. Each takes memory of the device.

    Raises:
        LayerError: data is no iterable of batches, or a batch holds no numbers.

    Example:
        >>> x = jnp.arange(5)
        >>> [batch.tolist() for batch in dp.data.prefetch(dp.batches(x, 2))]
        [[0, 1], [2, 3], [4]]
    """
    check_batches("data", data)
    check_count("size", size)
    source = iter(data)
    return (_Resumable if hasattr(source, "get_state") else _Ahead)(source, size)


class _Ahead(Iterator[Any]):
    """The batches of an iterator, transferred ahead."""

    def __init__(self, source: Any, size: int) -> None:
        self.source, self.size = source, size
        self.ready: collections.deque[Any] = collections.deque()
        self.end: Exception | None = None  # with which the source ended

    def __next__(self) -> Any:
        while self.end is None and len(self.ready) <= self.size:
            try:
                self.ready.append(self.read())
            except Exception as error:  # StopIteration too
                self.end = error
        if not self.ready:
            raise self.end or StopIteration
        return self.ready.popleft()

    def read(self) -> Any:
        """The next batch of the source, on its way to the device."""
        return jax.device_put(as_batch(next(self.source)))


class _Resumable(_Ahead):
    """The same for an iterator with positions; each batch is kept with the position behind it."""

    def __init__(self, source: Any, size: int) -> None:
        super().__init__(source, size)
        self.state = source.get_state()

    def __next__(self) -> Any:
        batch, self.state = super().__next__()
        return batch

    def read(self) -> Any:
        """The next batch, and the position behind it."""
        return super().read(), self.source.get_state()

    def get_state(self) -> Any:
        """The position behind the last batch that was returned."""
        return self.state

    def set_state(self, state: Any) -> None:
        """Go on from a position."""
        self.source.set_state(state)
        self.state, self.end = state, None
        self.ready.clear()
