"""The batches that a run takes: endless, and at a position that can be saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from diffprog.core.errors import LayerError
from diffprog.data.batches import Batches, as_batch

_END = object()


class Stream:
    """An iterator of the batches of `data` from a number on, again and again.

    Attributes:
        data: the iterable.
        number: how many batches were taken, those before `first` included.
    """

    def __init__(self, data: Iterable[Any], first: int) -> None:
        self.data, self.number = data, first
        self._iterator = data.begun(first) if isinstance(data, Batches) else iter(data)
        self._ahead: list[Any] = []  # a batch that was looked at and not taken

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = self.peek()
        self._ahead.clear()
        self.number += 1
        return batch

    def peek(self) -> Any:
        """The next batch, which stays the next one."""
        if not self._ahead:
            self._ahead.append(as_batch(self._pulled()))
        return self._ahead[0]

    @property
    def is_ahead(self) -> bool:
        """Whether a batch was looked at and not taken, so that the position is behind it."""
        return bool(self._ahead)

    @property
    def resumable(self) -> bool:
        """Whether another iterator can be moved to the position of this one."""
        return (isinstance(self.data, Batches) or hasattr(self._iterator, "set_state")
                or hasattr(self.data, "load_state_dict"))

    @property
    def position(self) -> Any:
        """What `move` needs besides the number: the state of an iterator of another library.

        No batch may be ahead, as after a step.
        """
        if isinstance(self.data, Batches) or not self.resumable:
            return None
        owner: Any = self._iterator if hasattr(self._iterator, "set_state") else self.data
        state = owner.get_state() if owner is self._iterator else owner.state_dict()
        return {"hex": state.hex()} if isinstance(state, bytes) else {"state": state}

    def move(self, number: int, position: Any) -> None:
        """Go on after batch `number`, at the position of another stream of the same data."""
        self._ahead.clear()
        self.number = number
        if isinstance(self.data, Batches):
            self._iterator = self.data.begun(number)
            return
        state = bytes.fromhex(position["hex"]) if "hex" in position else position["state"]
        iterator: Any = self._iterator
        if hasattr(iterator, "set_state"):
            iterator.set_state(state)
        else:
            data: Any = self.data
            data.load_state_dict(state)
            self._iterator = iter(data)

    def _pulled(self) -> Any:
        """The next batch of the data, begun again where it ended."""
        for _ in range(2):
            if (batch := next(self._iterator, _END)) is not _END:
                return batch
            self._iterator = iter(self.data)
        raise LayerError("a batch for every step", "data that ended",
                         "pass an iterable that can be iterated again, such as batches(...)")
