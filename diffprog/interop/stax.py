"""Pairs of `jax.example_libraries.stax`, as also used by `numpyro.module`, from and to layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.core.notation import code, listed
from diffprog.core.plans import Params, State, remember, spec
from diffprog.interop.foreign import foreign, named, plain, unnamed

__all__ = ["from_stax", "to_stax"]


@factory
def from_stax(pair: Any, *, training: Any = None) -> Layer:
    """A pair of `jax.example_libraries.stax`: ``y = apply_fun(params, x)``.

    Indices of its tuples become names: the parameters of ``stax.serial(stax.Dense(8),
    stax.Relu, stax.Dense(3))`` are ``0/0``, ``0/1``, ``2/0`` and ``2/1``.

    Args:
        pair: ``(init_fun, apply_fun)``.
        training: the same pair constructed for training, since stax fixes the mode in the
            constructor. The layer is then random, and `pair` receives a constant key in inference,
            because `stax.Dropout` requires one in both modes. None if both modes are the same.

    Raises:
        LayerError: `pair` or `training` is not a pair of functions.

    Example:
        >>> from jax.example_libraries import stax
        >>> net = dp.interop.from_stax(stax.Dense(3))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> sorted(params), net(params, jnp.ones((2, 4))).shape
        (['0', '1'], (2, 3))
    """
    for given in (pair,) if training is None else (pair, training):
        if not (isinstance(given, tuple) and len(given) == 2 and all(map(callable, given))):
            raise LayerError("a pair (init_fun, apply_fun) of stax", code(given),
                             "call its constructor: stax.Dense(3)")

    def drawn(key: jax.Array, x: Any) -> Any:
        return pair[0](key, jax.tree.map(lambda a: a.shape, x))[1]

    @remember
    def like(x: Any, side: dict[str, Any]) -> Any:
        return jax.eval_shape(lambda: drawn(jax.random.key(0), x))

    def draw(key: jax.Array, x: Any) -> tuple[Params, State]:
        return named(drawn(key, x), _names), {}

    def apply(params: Params, state: State, x: Any, key: Any, train: bool) -> tuple[Any, State]:
        tree = unnamed(params, like(spec(x), {}), _names)
        if training is None:
            return pair[1](tree, x), state
        rng = jax.random.key(0) if key is None else key
        _, apply_fun = training if train else pair
        return apply_fun(tree, x, rng=rng), state

    return foreign("stax", draw, apply, random=training is not None)


def to_stax(layer: Any, *, train: bool = False) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The pair ``(init_fun, apply_fun)`` of a layer, for `stax` and `numpyro.module`.

    ``init_fun(rng, input_shape)`` returns ``(output_shape, params)`` for the shape of a float32
    input, or a tuple of such shapes; a size of -1 is open. ``apply_fun(params, inputs, rng=None,
    **side)`` returns y.

    Args:
        layer: a layer without state, or a plain function.
        train: the mode of all calls, fixed in advance as in stax; with True, `apply_fun` requires
            `rng` if the layer is random.

    Raises:
        LayerError: from init_fun, if the layer has state.

    Example:
        >>> init_fun, apply_fun = dp.interop.to_stax(dp.linear(3))
        >>> shape, params = init_fun(jax.random.key(0), (-1, 4))
        >>> shape, apply_fun(params, jnp.ones((2, 4))).shape
        ((-1, 3), (2, 3))
    """
    layer = as_layer(layer)

    def init_fun(rng: jax.Array, input_shape: Any) -> tuple[Any, Params]:
        small, large = _arrays(input_shape, 2), _arrays(input_shape, 3)
        plan = layer.plan(small)
        if plan.state:
            raise LayerError("a layer without state", f"state {listed(plan.state)}",
                             "use net.init and net.apply: pairs of stax have no state")
        shape = jax.tree.map(_open_shape, plan.y, layer.plan(large).y)
        return shape, layer.init(rng, small)[0]

    def apply_fun(params: Params, inputs: Any, *, rng: jax.Array | None = None, **side: Any) -> Any:
        return layer.apply(params, {}, inputs, key=rng, train=train, **side)[0]

    return init_fun, apply_fun


def _names(path: Any) -> tuple[str, ...]:
    return plain(path) or ("0",)  # for parameters that are one array


def _arrays(shape: Any, size: int) -> Any:
    """The input of a shape, or of a tuple of shapes, with `size` in place of -1."""
    if not all(isinstance(n, int) for n in shape):
        return tuple(_arrays(inner, size) for inner in shape)
    return jax.ShapeDtypeStruct(tuple(size if n == -1 else n for n in shape), jnp.float32)


def _open_shape(small: Any, large: Any) -> tuple[int, ...]:
    """The shape of an output, with -1 for each size that depends on the open size of the input."""
    return tuple(n if n == m else -1 for n, m in zip(small.shape, large.shape, strict=True))
