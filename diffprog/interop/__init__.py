"""Networks of neighbouring libraries as layers, and a layer as the pair of `stax`.

One call makes a layer of a network of Flax, Haiku, Equinox or `jax.example_libraries.stax`. Its
parameters are nested dicts with the names of its own library, and it works wherever a layer does:
in `serial`, `repeat`, `mixed`, `fit`. ``init(key, x)`` draws the same values as the library from
the same key on zeros of the shape of x, and the output is that of the library. Each library is
imported on first use; ``pip install 'diffprog[interop]'`` installs them all.

These layers do not stream, as it is unknown whether a foreign network mixes time steps.
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
