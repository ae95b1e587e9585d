"""Networks of neighbouring libraries as layers, and a layer as the pair of `stax`.

A network of Flax, Haiku, Equinox or `jax.example_libraries.stax` becomes a layer in one call. Its
parameters are then nested dicts under the names that its own library gives them, and everything
that takes a layer takes it: `serial`, `repeat`, `mixed`, `fit`, optax. ``init(key, x)`` draws what
the library draws from that key on zeros of the shape of x, and y is what the library computes.
Each library is imported where it is used; ``pip install 'diffprog[interop]'`` installs them all.

No such layer streams: of a foreign network it is not known whether it mixes positions in time.
"""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.interop.equinox import from_equinox
from diffprog.interop.haiku import from_haiku
from diffprog.interop.linen import from_linen
from diffprog.interop.nnx import from_nnx
from diffprog.interop.stax import from_stax, to_stax

__all__ = [
    "from_equinox", "from_haiku", "from_linen", "from_nnx", "from_stax", "to_stax",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
