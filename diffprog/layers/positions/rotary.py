"""Rotary position embedding (RoPE): pairs of features are rotated by the position.

The inner product of a rotated query and a rotated key depends on the distance of their positions
alone. A rule ``(base, features) -> (frequencies, magnitude)`` sets the frequency of each pair.
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
from diffprog.core.dtypes import is_int, wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.notation import show

__all__ = ["rotary"]

Rule = Callable[[float, int], tuple[np.ndarray, float]]


def rotary(
    base: float = 10000.0, *, features: int | None = None, interleaved: bool = False,
    scaling: Rule | None = None,
) -> Rotary:
    """Rotate pair i of D features at position t by the angle ``t * base**(-2i/D)``.

    With c and s the cosine and sine of the angle of pair i,
    ``y[i] = c x[i] - s x[i + D/2]`` and ``y[i + D/2] = s x[i] + c x[i + D/2]``.

    Angles are computed in fixed point, modulo a turn, so that the product of a query at position t
    and a key at position u depends on t - u alone, however large t and u are. The "dynamic" scaling
    of some models is not supported: it rotates past keys again as the sequence grows, which a
    stream cannot do.

    Args:
        base: wavelengths grow from 2 pi steps towards 2 pi * base steps; above 1.
        features: number of rotated features, the first ones; even; all if None.
        interleaved: False pairs features i and i + D/2 (GPT-NeoX, Llama), True 2i and 2i + 1
            (the paper).
        scaling: a rule for sequences longer than those in training: `linear_scaling`,
            `ntk_scaling`, `yarn_scaling`, `llama3_scaling`, `longrope_scaling`, or a function
            ``(base, features) -> (frequencies, magnitude)`` in NumPy. Cosines and sines are
            multiplied by the magnitude.

    Returns:
        ``rope(x, positions=None)``: x (..., time, features) -> the same, computed in float32 or
        wider and returned in the dtype of x. Positions are ints that broadcast to (..., time), by
        default 0, 1, 2, .... `self_attention` takes it as `rotary`, and carries the positions in a
        stream.

    Raises:
        LayerError: the number of rotated features is odd, or larger than the features of x.

    Example:
        >>> rope = dp.rotary()
        >>> q, k = jnp.ones((1, 4)), jnp.arange(4.0).reshape(1, 4)
        >>> score = lambda t, u: jnp.vdot(rope(q, jnp.array([t])), rope(k, jnp.array([u])))
        >>> bool(jnp.allclose(score(3, 1), score(1003, 1001), atol=1e-5))
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
    """The function of x and positions that `rotary` returns; equal if its settings are equal."""

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
            raise LayerError(f"at least the {features} rotated features", show(x),
                             "give x more features, or rotate fewer")
        _check_pairs(features, f"{features} in {show(x)}")
        if positions is None:
            positions = jnp.arange(x.shape[-2], dtype=jnp.int32)
        _check_positions(positions, x)

        rule = self.scaling or _unscaled
        speeds, magnitude = rule(self.base, features)  # (features / 2,)
        wide = wide_dtype(x)
        positions = jax.lax.broadcast_to_rank(positions, x.ndim - 1)  # (... or 1..., time)
        angle = angles(positions, speeds, wide)  # (... or 1..., time, features / 2)
        cos, sin = (_times(f(angle), magnitude) for f in (jnp.cos, jnp.sin))
        rotated = x[..., :features].astype(wide)  # (..., time, features)
        if self.interleaved:
            a, b = rotated[..., ::2], rotated[..., 1::2]  # (..., time, features / 2)
        else:
            a, b = jnp.split(rotated, 2, -1)  # (..., time, features / 2)
        a, b = a * cos - b * sin, a * sin + b * cos
        if self.interleaved:
            y = jnp.stack([a, b], -1).reshape(rotated.shape)  # (..., time, features)
        else:
            y = jnp.concatenate([a, b], -1)  # (..., time, features)
        y = y.astype(x.dtype)
        return y if features == x.shape[-1] else jnp.concatenate([y, x[..., features:]], -1)


def frequencies(base: float, features: int, first: int = 0) -> np.ndarray:
    """The frequency of each pair, radians per step: ``base**(-2i/D)``, i from `first`, (D / 2,)."""
    return base ** (-2 * (np.arange(features // 2) + first) / features)


def angles(
    positions: jax.Array, speeds: np.ndarray, dtype: Any, phase: Any = 0.0
) -> jax.Array:
    """``positions[..., None] * speeds``, modulo 2 pi, in radians; `phase`, in turns, is added.

    A product in float32 loses digits at large positions. Positions are ints, so the angle is
    computed in fixed point instead: an int counts units of 2**-32 of a turn (2**-64 in float64),
    and its overflow drops whole turns. The difference of two angles is then the same at any
    position.
    """
    fixed = jnp.int64 if dtype == jnp.float64 else jnp.int32
    units = 2.0 ** jnp.iinfo(fixed).bits  # units in a turn

    def to_fixed(turns: Any) -> np.ndarray:
        fraction = turns - np.floor(turns + 0.5)  # in [-1/2, 1/2)
        counts = np.rint(fraction * units).astype(np.int64).astype(fixed)
        return counts.reshape((1,) * positions.ndim + (-1,))

    angle = positions.astype(fixed)[..., None] * to_fixed(np.asarray(speeds) / (2 * math.pi))
    if np.any(phase):
        angle = angle + to_fixed(np.asarray(phase))
    return angle.astype(dtype) * (2 * math.pi / units)


def check_base(base: Any) -> None:
    """Raise unless `base` is a number above 1."""
    if not is_number(base) or not base > 1:
        raise LayerError("base above 1", repr(base), "pass 10000.0, for example")


def _times(a: jax.Array, magnitude: float) -> jax.Array:
    return a if magnitude == 1 else a * magnitude


def _unscaled(base: float, features: int) -> tuple[np.ndarray, float]:
    return frequencies(base, features), 1.0


def _check_pairs(features: int, got: str) -> None:
    if features % 2 or features == 0:
        raise LayerError("an even number of rotated features", got,
                         "choose an even number: features are rotated in pairs")


def _check_positions(positions: Any, x: Any) -> None:
    try:
        fits = is_int(positions) and (
            jnp.broadcast_shapes(positions.shape, x.shape[:-1]) == x.shape[:-1])
    except ValueError:
        fits = False
    if not fits:
        raise LayerError(f"positions as ints that broadcast to {x.shape[:-1]}", show(positions),
                         "pass one for each step of x (..., time, features)")
