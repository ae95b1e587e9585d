"""Checks of arguments and inputs that many layers share, with the same message everywhere."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffprog.core.dtypes import is_float, is_int
from diffprog.core.errors import LayerError
from diffprog.core.notation import show

_FORBIDDEN = "/*@~#"  # they have a meaning in paths
_NUMPY = (np.ndarray, np.generic)


def check_array(x: Any, rank: int = 0, axes: str = "", *, floating: bool = True) -> None:
    """Raise unless x is one array with at least `rank` axes, of floats if `floating`."""
    if not is_array(x):
        remedy = "convert it: jnp.asarray(x)" if hasattr(x, "dtype") else (
            "pick one part of it with a lambda")
        raise LayerError("one array", show(x), remedy)
    if len(x.shape) < rank:
        wanted = "at least 1 axis" if rank == 1 else f"at least {rank} axes"
        raise LayerError(f"{wanted} {axes}".rstrip(), show(x), "add the missing axes")
    if floating and not is_float(x):
        raise LayerError("floating-point input", show(x), "convert it: x.astype(jnp.float32)")


def is_array(x: Any) -> bool:
    """Does it have a shape, and a dtype that JAX knows? Tensors of other libraries do not."""
    try:
        return hasattr(x, "shape") and jnp.issubdtype(x.dtype, np.generic)
    except (AttributeError, TypeError):
        return False


def check_ints(
    name: str, value: Any, remedy: str = "", *, shape: tuple[int, ...] | None = None
) -> None:
    """Raise unless `value` is an array of integers, and of `shape` if that is given."""
    if not is_int(value) or shape not in (None, value.shape):
        wanted = f"{name} as ints" if shape is None else f"{name} as ints of shape {shape}"
        raise LayerError(wanted, "none" if value is None else show(value),
                         remedy or f"convert them: {name}.astype(jnp.int32)")


def check_features(wanted: int, x: Any) -> None:
    """Raise unless the last axis of x has the size that the parameters were made for."""
    if x.shape[-1] != wanted:
        raise LayerError(f"{_features(wanted)} on the last axis, as init saw", show(x),
                         "initialize again on input of this shape, or change the layer before")


def check_leaves(params: Any, features: int) -> None:
    """Raise unless each leaf has `features` on its last axis: an axis of 1 would broadcast."""
    if any(leaf.shape[-1] != features for leaf in params.values()):
        raise LayerError(f"params of {_features(features)}", show(params),
                         "pass what init returned")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless `value` is an int, of Python or NumPy, and at least `least`."""
    wanted = f"{name} as an int of at least {least}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise LayerError(wanted, show(value), "pass a Python int")
    if int(value) < least:
        raise LayerError(wanted, repr(value), f"pass {least} or more")


def check_copies(n: Any) -> None:
    """Raise unless `n`, the number of copies, is a positive int."""
    if callable(n):
        raise LayerError("n as an int of at least 1", show(n),
                         "give the number first, as in repeat(3, layer)")
    check_count("n", n)


def known(size: Any) -> bool:
    """Is a size a number? A symbolic size of `jax.export` cannot be compared."""
    return isinstance(size, int)


def at_most(size: Any, most: Any) -> bool:
    """Is a size at most `most`, for all values of its symbolic parts?"""
    try:
        return bool(size <= most)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def check_steps(length: Any) -> None:
    """Raise unless the `length` of a stream is a positive int, or symbolic under `jax.export`."""
    from jax.export import is_symbolic_dim  # a heavy import

    if not is_symbolic_dim(length):
        check_count("length", length)


def check_fraction(name: str, value: Any) -> None:
    """Raise unless `value` is a number, of Python or NumPy, in [0, 1)."""
    if not is_number(value):
        raise LayerError(f"{name} in [0, 1)", show(value), "pass a number, a Python float")
    if not 0 <= value < 1:
        raise LayerError(f"{name} in [0, 1)", repr(value), "pass a fraction, not a percentage")


def check_positive(name: str, value: Any, remedy: str) -> None:
    """Raise unless `value` is a positive number, of Python or NumPy."""
    if not is_number(value) or not value > 0:
        raise LayerError(f"{name} as a positive number", show(value), remedy)


def is_number(value: Any) -> bool:
    """Is it a real number of Python or NumPy? An array of JAX is not, as it may be traced."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain_numbers(value: Any) -> Any:
    """An option with NumPy scalars, also those in tuples, converted to Python's.

    A NumPy scalar has a dtype, which would widen an x of 16 bits.
    """
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return tuple(map(plain_numbers, value)) if type(value) is tuple else value


def check_names(names: Iterable[str]) -> None:
    """Raise for names with characters that have a meaning in path patterns."""
    for name in names:
        if not name or name.startswith("_") or any(sign in name for sign in _FORBIDDEN):
            raise LayerError(f"a name without leading _ and {' '.join(_FORBIDDEN)}", repr(name),
                             "rename it: these characters have a meaning in paths")


def donated(state: Any) -> bool:
    """Was an array of the tree donated to a step?"""
    return any(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and
               leaf.is_deleted() for leaf in jax.tree.leaves(state))


def check_kept(state: Any) -> None:
    """Raise if the state, or a state that contains it, was donated to a step."""
    if donated(state):
        raise given_up()


def given_up() -> LayerError:
    """The error for a state that was donated to a step."""
    return LayerError("a state that was not donated", "one that was donated to a later step",
                      "keep a copy, jax.tree.map(jnp.copy, state), or continue from the state "
                      "that the step returned: make_step(..., donate=False) keeps all states")


def held(x: Any) -> Any:
    """A pytree with NumPy arrays in the dtypes that JAX uses; ints saturate at the limits.

    Code that reads the dtype of x, such as tolerances, must not see a float64 that JAX makes a
    float32. And with 32-bit ints JAX takes an id of 2**32 + 3 as 3, another class or row of a
    table; the largest int is out of range instead, and gives NaN. This works only before JAX gets
    the array: a jitted function of your own receives the 3.
    """
    return jax.tree.map(_held, x)


def arrays(tree: Any) -> Any:
    """The pytree with NumPy arrays converted to JAX arrays, after `held`.

    NumPy arrays have no `at`, and operations on them return NumPy arrays.
    """
    def array(a: Any) -> Any:
        if not isinstance(a, _NUMPY):
            return a
        check_numbers(a)
        return jnp.asarray(_held(a))

    numpy = any(isinstance(leaf, _NUMPY) for leaf in jax.tree.leaves(tree))
    return jax.tree.map(array, tree) if numpy else tree  # keeps the order of a dict


def check_numbers(a: np.ndarray[Any, Any] | np.generic) -> None:
    """Raise for a NumPy array of text, dates, objects or records."""
    if a.dtype.names or a.dtype.hasobject or a.dtype.kind in "SUMm":
        raise LayerError("an array of numbers", show(a),
                         "convert it: encode text as ints, and stack the columns of a table")


def as_int32(ids: Any) -> jax.Array:
    """Ints as int32, saturated at the limits."""
    ids = _held(ids)
    kind, least, most = jnp.iinfo(ids.dtype), -(2**31), 2**31 - 1
    if kind.min < least or kind.max > most:
        ids = jnp.clip(ids, max(kind.min, least), min(kind.max, most))
    return jnp.asarray(ids, jnp.int32)


def _held(a: Any) -> Any:
    if not isinstance(a, _NUMPY) or not np.issubdtype(a.dtype, np.number):
        return a
    dtype = jax.dtypes.canonicalize_dtype(a.dtype)
    if dtype == a.dtype:
        return a
    if np.issubdtype(dtype, np.integer):
        a = np.clip(a, np.iinfo(dtype).min, np.iinfo(dtype).max)
    return a.astype(dtype)


def _features(count: int) -> str:
    return "1 feature" if count == 1 else f"{count} features"
