"""Initialization: each leaf is drawn from a key that depends on its path alone.

So inserting a layer changes no sibling, and one key gives the same network everywhere. An
initializer is a function ``(key, shape, dtype) -> array`` as in `jax.nn.initializers`, or its name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from diffprog.core.dtypes import is_key, wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.notation import listed, show

# Inlines a jitted function into the program that calls it; since jax 0.12 `True` leaves it to XLA.
INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True  # type: ignore[attr-defined]

Initializer = str | float | Callable[..., jax.Array]

_KINDS = jax.nn.initializers
INITIALIZERS: dict[str, Callable[..., jax.Array]] = {
    "zeros": _KINDS.zeros, "ones": _KINDS.ones,
    "normal": _KINDS.normal(0.02), "truncated_normal": _KINDS.truncated_normal(0.02),
    "lecun_normal": _KINDS.lecun_normal(), "lecun_uniform": _KINDS.lecun_uniform(),
    "glorot_normal": _KINDS.glorot_normal(), "glorot_uniform": _KINDS.glorot_uniform(),
    "he_normal": _KINDS.he_normal(),
    "he_normal_fan_out": _KINDS.variance_scaling(2.0, "fan_out", "normal"),
    "he_uniform": _KINDS.he_uniform(),
    "orthogonal": _KINDS.orthogonal(), "delta_orthogonal": _KINDS.delta_orthogonal(),
}


def fold(key: jax.Array, name: str) -> jax.Array:
    """The key of the child `name`, which depends on no sibling."""
    return _folded(key, *_words(name))


def parameter(
    key: jax.Array, name: str, initializer: Initializer, shape: tuple[int, ...], x: Any
) -> jax.Array:
    """Draw the leaf `name` for input x: float64 if x is, else float32, from its own key.

    The draw is jitted: it compiles once for a shape and equal initializers, and gives the same bits
    whether the caller is eager, jitted, mapped or sharded. The key is computed by a program of its
    own, which all leaves share: inside each draw it would take a third of the compile time.
    """
    draw = _draw_of(initializer)
    if draw is None:
        raise LayerError(f"{name}_init as a function (key, shape, dtype), a standard deviation or "
                         f"a name ({listed(INITIALIZERS)})", show(initializer),
                         "pass 0.02 or jax.nn.initializers.normal(0.02), for example")
    try:
        alike = _Alike(_contents(draw), draw)
    except TypeError:  # the cache is per trace
        return draw(fold(key, name), shape, wide_dtype(x))
    return _drawing(alike, shape, wide_dtype(x))(fold(key, name))


def _draw_of(initializer: Any) -> Callable[..., jax.Array] | None:
    """The function of an initializer: that of a name, or normal with a standard deviation."""
    if isinstance(initializer, str):
        return INITIALIZERS.get(initializer)
    if type(initializer) in (int, float) and initializer > 0:
        return _KINDS.normal(initializer)
    found: Any = initializer if callable(initializer) else None
    return found


@dataclasses.dataclass(frozen=True)
class _Alike:
    """An initializer, equal to those with the same contents, as two calls ``normal(0.02)``."""

    contents: Any
    draw: Callable[..., jax.Array] = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=256)  # an evicted entry frees its program
def _drawing(alike: _Alike, shape: Any, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """The jitted draw of a leaf, one for all equal initializers."""

    def draw(key: jax.Array) -> jax.Array:
        return alike.draw(key, shape, dtype)

    return jax.jit(draw)


def _contents(value: Any, around: tuple[int, ...] = ()) -> Any:
    """The contents of a value, to be compared: code and closure of a function, numbers of an array.

    Two functions made by equal calls are equal; an opaque value equals only itself.
    """
    if id(value) in around:
        return around.index(id(value))  # a cycle
    each = functools.partial(_contents, around=(*around, id(value)))
    if isinstance(value, Tracer):
        raise TypeError("a value that is being traced")
    if isinstance(value, types.FunctionType):
        return (value.__code__, each(value.__defaults__), each(value.__kwdefaults__),
                tuple(each(cell.cell_contents) for cell in value.__closure__ or ()),
                tuple(_read(value.__code__, value.__globals__, each)))
    if isinstance(value, types.MethodType):
        return types.MethodType, each(value.__func__), each(value.__self__)
    if isinstance(value, functools.partial):
        return functools.partial, each(value.func), each(value.args), each(value.keywords)
    if isinstance(value, jax.Array) and is_key(value):
        return str(value.dtype), each(jax.random.key_data(value))
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        digest = hashlib.blake2b(np.asarray(value).tobytes(), digest_size=16).digest()
        return type(value), str(value.dtype), value.shape, digest
    if type(value) in (tuple, list):
        return type(value), *map(each, value)
    if type(value) is dict:
        return dict, *((each(name), each(part)) for name, part in value.items())
    if type(value) in (int, bool, float, complex, str, bytes):
        return type(value), repr(value)  # repr distinguishes 0.0 from -0.0
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return type(value), value


def _read(code: types.CodeType, names: dict[str, Any], each: Callable[[Any], Any]) -> Iterator[Any]:
    """The global values that a function reads; functions and modules equal only themselves."""
    for name in code.co_names:
        value = names.get(name)
        plain = isinstance(value, (int, float, complex, str, bytes, tuple, list, dict, jax.Array,
                                   np.ndarray, np.generic))
        yield each(value) if plain else _Itself(value)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _read(constant, names, each)


class _Itself:
    """A value that equals only itself; it is kept alive, so that its id stays unique."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@functools.partial(jax.jit, inline=INLINE)  # one dispatch for both folds, inlined under a trace
def _folded(key: jax.Array, high: Any, low: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, high), low)


@functools.cache
def _words(name: str) -> tuple[np.uint32, np.uint32]:
    """A hash of the name that is stable across processes; 64 bits, as names collide in 32."""
    high, low = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), "<u4")
    return high, low
