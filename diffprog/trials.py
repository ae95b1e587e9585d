"""What a law tries: one layer with its trees and its input, in float64, and how it compares.

In float64 tolerances need no excuse.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog import tree
from diffprog.derivatives import is_float, widened
from diffprog.errors import LayerError
from diffprog.layer import Layer
from diffprog.notation import show
from diffprog.plans import spec

_CLOSE = 1e-9  # float64 results of two ways to compute one thing; rounding gives 1e-13 or less


@dataclasses.dataclass(frozen=True)
class Trial:
    """A layer with its trees, input and outputs in float64, at rest and in training."""

    layer: Layer
    key: jax.Array
    x: Any
    side: dict[str, Any]
    initial: Any  # params and state as init gave them, in float32 where x is no float64
    params: Any
    state: Any
    tolerance: float  # between two ways to compute one thing, as a share of the largest number

    @classmethod
    def of(
        cls, layer: Layer, x: Any, key: jax.Array, side: dict[str, Any], precision: Any = "float64"
    ) -> Trial:
        """Initialize the layer on x in float64; under x64 only."""
        drawn = jax.tree.map(functools.partial(_drawn, key), x)
        wide, beside = jax.tree.map(widened, (drawn, side))
        initial = layer.init(key, wide, **beside)
        params, state = jax.tree.map(widened, initial)
        tolerance = max(_CLOSE, 10 * float(jnp.finfo(precision).eps))
        return cls(layer, key, wide, beside, initial, params, state, tolerance)

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        """``run(params, state, x, side, key, train)``, jitted."""
        return jax.jit(self.eager, static_argnums=5)

    def eager(self, params: Any, state: Any, x: Any, side: Any, key: Any, train: bool) -> Any:
        """The same, not jitted."""
        return self.layer.apply(params, state, x, key=key, train=train, **side)

    def close(self, what: str, got: Any, wanted: Any) -> None:
        """Raise unless two results of the layer agree but for rounding."""
        same(what, got, wanted, self.tolerance)

    @functools.cached_property
    def modes(self) -> list[tuple[Any, bool]]:
        """Key and flag of a call at rest and of one in training; one where both compute the same.

        A layer without randomness is traced in both modes, and the programs are compared.
        """
        both = [(None, False), (self.key, True)]
        if self.layer.random:
            return both
        rest, training = (jax.make_jaxpr(functools.partial(self.eager, key=None, train=train))(
            self.params, self.state, self.x, self.side) for train in (False, True))
        same = str(rest) == str(training) and equal(rest.consts, training.consts)
        return both[:1] if same else both

    @functools.cached_property
    def rest(self) -> Any:
        """Output and state at rest, without a key."""
        return self.run(self.params, self.state, self.x, self.side, None, False)

    @functools.cached_property
    def training(self) -> Any:
        """Output and state in training, with a key."""
        return self.run(self.params, self.state, self.x, self.side, self.key, True)

    def carried(self, side: dict[str, Any]) -> Any:
        """The state of a stream after x; None where the layer cannot stream."""
        shape = jax.tree.leaves(self.x)[0].shape
        if self.layer.start is None or len(shape) < 2:
            return None
        try:
            state = self.layer.start(self.params, self.state, self.x, length=shape[1], **side)
            return self.run(self.params, state, self.x, side, None, False)[1]
        except LayerError:
            return None


def _drawn(key: jax.Array, leaf: Any) -> Any:
    """Random numbers where only a shape was given; zeros for integers."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.random.normal(key, leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def over(mask: Any, a: Any) -> Any:
    """The mask with the trailing axes that a has beyond it."""
    return mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim))


def floats(x: Any) -> list[Any]:
    """The leaves that hold floating-point numbers."""
    return [leaf for leaf in jax.tree.leaves(x) if is_float(leaf)]


def with_floats(x: Any, floats: list[Any]) -> Any:
    """x with others in the places of its floating-point leaves."""
    leaves, structure = jax.tree.flatten(x)
    new = iter(floats)
    return structure.unflatten([next(new) if is_float(leaf) else leaf for leaf in leaves])


def another(leaf: Any) -> Any:
    """Another value of the same kind, which no symmetry of positions or masks maps to this one."""
    if leaf.dtype == jnp.bool_:
        return ~leaf
    return jnp.flip(leaf, -1) * 2 + 1


def same_spec(what: str, wanted: Any, got: Any) -> None:
    """Raise unless two trees of shapes agree."""
    same = jax.tree.structure(wanted) == jax.tree.structure(got) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True))
    if not same:
        raise LayerError(f"{what} as {show(wanted)}", show(got),
                         "let both have one structure, and equal shapes and dtypes")


def equal(a: Any, b: Any) -> bool:
    """Are two trees of one structure equal to the last bit?"""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(u), np.asarray(v), equal_nan=True) for u, v in pairs)


def same(what: str, got: Any, wanted: Any, tolerance: float = 0.0) -> None:
    """Raise unless two trees agree, the difference being a share of the largest number."""
    same_spec(what, spec(wanted), spec(got))
    for path, leaf in tree.paths(wanted).items():
        other, leaf = np.asarray(tree.paths(got)[path]), np.asarray(leaf)
        atol = tolerance * max(1.0, float(np.abs(leaf).max(initial=0)))
        if not np.allclose(other, leaf, rtol=0, atol=atol, equal_nan=True):
            worst = float(np.abs(other - leaf).max())
            where = path or "the output"
            raise LayerError(f"no difference at {where} for {what}", f"one of {worst:.1e}",
                             "look for what the two compute differently")
