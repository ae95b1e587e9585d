"""The part of a layer's record that checks and streams read: `layer` imports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from diffprog.core.computed import Own
from diffprog.core.plans import Params, Plan, State


class Record(Protocol):
    """The fields of a `Layer` that checks and streams read."""

    @property
    def start(self) -> Callable[..., State] | None: ...
    @property
    def children(self) -> Mapping[str, Record]: ...
    @property
    def random(self) -> bool: ...
    @property
    def side(self) -> frozenset[str]: ...
    @property
    def kept(self) -> frozenset[str]: ...
    @property
    def computed(self) -> tuple[Own, ...]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def lent(self) -> Record | None: ...
    @property
    def _shaped(self) -> Callable[[Any, dict[str, Any]], tuple[Params, State]]: ...
    @property
    def _carried(self) -> Callable[..., State]: ...
    def plan(self, x: Any, **side: Any) -> Plan:
        """Shapes and dtypes on x."""
        ...
