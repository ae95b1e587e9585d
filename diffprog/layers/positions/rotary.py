"""Rotary positions: queries and keys are turned by angles that grow with the position.

The product of two turned vectors depends on the distance of their positions alone. How fast each
pair of features turns is a rule ``(base, features) -> (frequencies, magnitude)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core import notation
from diffprog.core.arguments import check_array, check_count, is_number
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.notation import show

__all__ = ["rotary"]

Rule = Callable[[float, int], tuple[np.ndarray, float]]


def rotary(
    base: float = 10000.0, *, features: int | None = None, interleaved: bool = False,
    scaling: Rule | None = None,
) -> Rotary:
    """Turn pair i of D features by ``t * base**(-2i/D)``, t being the position.

    With c and s the cosine and sine of the angle of pair i,
    ``y[i] = c x[i] - s x[i + D/2]`` and ``y[i + D/2] = s x[i] + c x[i + D/2]``.

    Angles are counted in whole parts of a turn, so that the product of a query turned at t and a
    key turned at u depends on t - u alone, however large t and u are. The "dynamic" scaling of some
    models is not offered: as the sequence grows it turns anew what is past, which no stream can.

    Args:
        base: wavelengths grow from 2 pi steps towards 2 pi * base steps; above 1.
        features: how many turn, the first ones; even; all if None.
        interleaved: False pairs features i and i + D/2 (GPT-NeoX, Llama), True 2i and 2i + 1
            (the paper).
        scaling: a rule for sequences longer than those trained on: `linear_scaling`, `ntk_scaling`,
            `yarn_scaling`, `llama3_scaling`, `longrope_scaling`, or a function
            ``(base, features) -> (frequencies, magnitude)`` in NumPy, where cosines and sines are
            multiplied by the magnitude.

    Returns:
        ``rope(x, positions=None)``: x (..., time, features) -> the same, computed in float32 or
        wider, in the dtype of x. Positions are ints that broadcast to (..., time), 0, 1, 2, ... if
        not given. `self_attention` takes it as `rotary`; by itself it keeps no place in a stream.

    Raises:
        LayerError: the features that turn are odd in number, or more than x has.

    Example:
        >>> rope = dp.rotary()
        >>> q, k = jnp.ones((1, 4)), jnp.arange(4.0).reshape(1, 4)
        >>> turned = lambda t, u: jnp.vdot(rope(q, jnp.array([t])), rope(k, jnp.array([u])))
        >>> bool(jnp.allclose(turned(3, 1), turned(1003, 1001), atol=1e-5))
        True

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2.
    """
    check_base(base)
    if features is not None:
        check_count("features", features)
        _check_pairs(features, f"features={features}")
    return Rotary(base, features, interleaved, scaling)


@dataclasses.dataclass(frozen=True, repr=False)
class Rotary:
    """What `rotary` makes: a function of x and positions; equal if made of equal numbers."""

    base: float
    features: int | None
    interleaved: bool
    scaling: Rule | None

    def __repr__(self) -> str:
        return notation.call(rotary, vars(self))

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        check_array(x, rank=2, axes="(..., time, features)")
        features = x.shape[-1] if self.features is None else self.features
        if features > x.shape[-1]:
            raise LayerError(f"at least the {features} features that turn", show(x),
                             "give more features, or turn fewer")
        _check_pairs(features, f"{features} in {show(x)}")
        if positions is None:
            positions = jnp.arange(x.shape[-2], dtype=jnp.int32)
        _check_positions(positions, x)
        rule = self.scaling or _unscaled
        speeds, magnitude = rule(self.base, features)
        wide = joint(x.dtype, jnp.float32)
        turn = angles(jax.lax.broadcast_to_rank(positions, x.ndim - 1), speeds, wide)
        cos, sin = (f(turn) if magnitude == 1 else f(turn) * magnitude for f in (jnp.cos, jnp.sin))
        turning = x[..., :features].astype(wide)
        if self.interleaved:
            a, b = turning[..., ::2], turning[..., 1::2]
        else:
            a, b = jnp.split(turning, 2, -1)
        a, b = a * cos - b * sin, a * sin + b * cos
        if self.interleaved:
            y = jnp.stack([a, b], -1).reshape(turning.shape)
        else:
            y = jnp.concatenate([a, b], -1)
        y = y.astype(x.dtype)
        return y if features == x.shape[-1] else jnp.concatenate([y, x[..., features:]], -1)


def frequencies(base: float, features: int, first: int = 0) -> np.ndarray:
    """How far pair i turns in a step, in radians: ``base**(-2i/D)``, counted from `first`."""
    return base ** (-2 * (np.arange(features // 2) + first) / features)


def angles(
    positions: jax.Array, speeds: np.ndarray, dtype: Any, ahead: Any = 0.0
) -> jax.Array:
    """``positions[..., None] * speeds`` in radians, less whole turns; `ahead` in turns is added.

    Positions are ints, so an angle is kept as an int that counts parts of a turn, 2**32 of them
    (2**64 in float64): where it overflows it has gone round. So the difference of two angles is
    the same at any position, which products of float32 lose where positions are large.
    """
    whole = jnp.int64 if dtype == jnp.float64 else jnp.int32
    parts = 2.0 ** jnp.iinfo(whole).bits

    def count(turns: Any) -> np.ndarray:
        part = turns - np.floor(turns + 0.5)  # in [-1/2, 1/2)
        counts = np.rint(part * parts).astype(np.int64).astype(whole)
        return counts.reshape((1,) * positions.ndim + (-1,))

    turned = positions.astype(whole)[..., None] * count(np.asarray(speeds) / (2 * math.pi))
    if np.any(ahead):
        turned = turned + count(np.asarray(ahead))
    return turned.astype(dtype) * (2 * math.pi / parts)


def check_base(base: Any) -> None:
    """Raise unless `base` is a number above 1."""
    if not is_number(base) or not base > 1:
        raise LayerError("base above 1", repr(base), "pass 10000.0, the usual one")


def _unscaled(base: float, features: int) -> tuple[np.ndarray, float]:
    return frequencies(base, features), 1.0


def _check_pairs(features: int, got: str) -> None:
    if features % 2 or features == 0:
        raise LayerError("an even number of features that turn", got,
                         "choose an even number: features turn in pairs")


def _check_positions(positions: Any, x: Any) -> None:
    ints = hasattr(positions, "dtype") and jnp.issubdtype(positions.dtype, jnp.integer)
    try:
        fits = ints and jnp.broadcast_shapes(positions.shape, x.shape[:-1]) == x.shape[:-1]
    except ValueError:
        fits = False
    if not fits:
        raise LayerError(f"positions as ints that broadcast to {x.shape[:-1]}", show(positions),
                         "give one to each step of x (..., time, features)")
