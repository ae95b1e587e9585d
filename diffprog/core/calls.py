"""Objects compared, hashed and pickled by the call that made them.

Numbers, names and arrays are compared by value, functions by their code and closure.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pickle
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from diffprog.core.dtypes import is_key
from diffprog.core.errors import LayerError, signed
from diffprog.core.factories import factory
from diffprog.core.notation import code

# Modules in which a pickle finds functions by name, before the module that they name themselves.
_PUBLIC = ("jax.nn", "jax.numpy", "jax.lax", "jax.nn.initializers", "jax", "numpy")
_BY_VALUE = {"cloudpickle", "dill"}  # picklers that store functions by value


class Called:
    """An object made by a call: equal calls make equal objects, with equal hashes."""

    def call(self) -> functools.partial[Any]:
        """The call that makes an equal object."""
        raise NotImplementedError

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Called):
            return NotImplemented
        with signed(self.__repr__):
            return self is other or (hash(self) == hash(other) and _key(self) == _key(other))

    def __hash__(self) -> int:
        if "_hash" not in vars(self):
            with signed(self.__repr__):
                vars(self)["_hash"] = hash(_key(self))
        return vars(self)["_hash"]

    def __copy__(self) -> Any:
        return self  # it is immutable

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        call = self.call()
        name = _name(call.args[0]) if call.args else None
        if name and _found(*name) is self and not _is_elsewhere(*name):
            return _named, name  # a program, found under the name of its function
        usual = {name: p.default for name, p in inspect.signature(call.func).parameters.items()}
        given = {name: value for name, value in call.keywords.items()
                 if value is not usual.get(name, inspect.Parameter.empty)}
        with signed(self.__repr__):
            return _called, (_maker(call.func), _packed(call.args), _packed(given))


class Identity:
    """A value that equals only itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _key(made: Called) -> Any:
    """The key by which it is compared."""
    if "_known" not in vars(made):
        vars(made)["_known"] = compared(made.call())
    return vars(made)["_known"]


def compared(value: Any, within: tuple[Any, ...] = ()) -> Any:
    """A hashable key, equal for values that are interchangeable as arguments of a call.

    `within` are the functions around it: mutable values in their closures equal only themselves.
    """
    kind, inside = type(value), functools.partial(compared, within=within)
    if isinstance(value, Called):
        return value
    if isinstance(value, functools.partial):
        return kind, inside(value.func), inside(value.args), inside(tuple(value.keywords.items()))
    if isinstance(value, types.FunctionType):
        return _of_function(value, within)
    if isinstance(value, types.MethodType):
        return kind, inside(value.__func__), inside(value.__self__)
    if isinstance(value, tuple) or (isinstance(value, list) and not within):
        return kind, *map(inside, value)
    if isinstance(value, Mapping) and not within:
        return kind, *((inside(name), inside(part)) for name, part in value.items())
    if isinstance(value, (float, complex)):
        return kind, repr(value)  # nan is itself, and -0.0 is not 0.0
    if isinstance(value, (np.ndarray, np.generic, jax.Array)) and _is_known(value):
        return _of_array(value)
    try:
        hash(value)
    except TypeError:
        return Identity(value)
    return kind, value


def _of_function(function: types.FunctionType, within: tuple[Any, ...]) -> Any:
    """Code, module, defaults and closure; a function with other attributes equals only itself."""
    if vars(function).keys() - {"__wrapped__"} or any(function is outer for outer in within):
        return Identity(function)
    try:
        enclosed = tuple(cell.cell_contents for cell in function.__closure__ or ())
    except ValueError:  # an empty cell
        return Identity(function)
    given = enclosed, function.__defaults__, tuple((function.__kwdefaults__ or {}).items())
    return (Identity(function.__code__), Identity(function.__globals__),
            compared(given, (*within, function)))


def _is_known(array: Any) -> bool:
    """Does the array have known values, other than objects?"""
    return not isinstance(array, Tracer) and array.dtype != object


def _of_array(array: Any) -> Any:
    """Bytes, shape, dtype, and whether the dtype is weak, as that of a Python number."""
    weak = getattr(array, "weak_type", False)
    kind = type(array), array.shape, str(array.dtype), weak
    if is_key(array):
        array = jax.random.key_data(array)
    return kind, hashlib.blake2b(np.asarray(array).tobytes(), digest_size=16).digest()


def _called(made_by: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return made_by(*args, **keywords)


def _partial(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return functools.partial(function, *args, **keywords)


def _named(module: str, name: str) -> Any:
    __import__(module)
    return functools.reduce(getattr, name.split("."), sys.modules[module])


class _Pickled:
    """An object that unpickling makes by a call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def _maker(function: Any) -> Any:
    """The function that made a layer, for a pickle: the decorated factory."""
    around = _found(*(_name(function) or ("", "")))
    if around is not function and inspect.unwrap(around) is function:
        return around
    if around is function or not _takes_functions():
        return _packed(function)
    return _Pickled(factory, (function,))


def _packed(value: Any) -> Any:
    """A value that can be pickled: functions by a public name, if they have one."""
    if isinstance(value, (Called, type)):
        return value
    if isinstance(value, functools.partial):
        return _Pickled(_partial, (_packed(value.func), _packed(value.args),
                                   _packed(value.keywords)))
    if isinstance(value, types.MethodType):
        return _Pickled(getattr, (_packed(value.__self__), value.__name__))
    if type(value) in (tuple, list):
        return type(value)(map(_packed, value))
    if type(value) is dict:
        return {name: _packed(part) for name, part in value.items()}
    if not callable(value) or not hasattr(value, "__name__"):
        return value if _takes_functions() else _tried(value)
    for module in _PUBLIC:
        for name, public in vars(sys.modules[module]).items():
            if public is value:
                return _Pickled(_named, (module, name))
    if (name := _name(value)) and _found(*name) is value:
        return value if isinstance(value, types.FunctionType) else _Pickled(_named, name)
    if not _takes_functions():
        raise _nameless(value)
    return value


def _tried(value: Any) -> Any:
    """A value of another kind; raise if pickle refuses it, as it may hold functions."""
    if isinstance(value, (int, float, complex, str, bytes, np.ndarray, np.generic, jax.Array)):
        return value
    try:
        pickle.dumps(value)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise _nameless(value) from error
    return value


def _nameless(value: Any) -> LayerError:
    return LayerError("functions that a module has by name, to be pickled", code(value),
                      "use cloudpickle, which pickles functions by value, or define it by def in a "
                      "module")


def _name(value: Any) -> tuple[str, str] | None:
    """The module of a function and its name there; None if it has none."""
    module, name = (getattr(value, name, None) for name in ("__module__", "__qualname__"))
    return (module, name) if module and name else None


def _is_elsewhere(module: str, name: str) -> bool:
    """May the name refer to something else in the process that loads the pickle?"""
    return module == "__main__" and _takes_functions()


def _found(module: str, name: str) -> Any:
    """The attribute of a loaded module under a dotted name; None if there is none."""
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _takes_functions() -> bool:
    """Does the current pickler store functions by value? It is the first caller outside here."""
    frame = inspect.currentframe()
    while frame and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    asks = frame.f_globals.get("__name__", "") if frame else ""
    return not _BY_VALUE.isdisjoint(asks.split("."))
