"""Networks of other libraries as layers, and a layer as a pair of `stax`.

One call turns a network of Flax, Haiku, Equinox or `jax.example_libraries.stax` into a layer, for
`serial`, `repeat`, `mixed`, `fit` and optax. Its parameters are nested dicts under the names of its
library. ``init(key, x)`` draws the parameters that the library draws from this key for zeros of the
shape of x. Libraries are imported on use; ``pip install 'diffprog[interop]'`` installs them all.

Such a layer does not stream, since nothing tells whether it mixes time steps.
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
