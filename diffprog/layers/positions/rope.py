"""Scaling rules of rotary positions, for sequences longer than those in training.

Each rule is a function ``(base, features) -> (frequencies, magnitude)`` of the number of rotated
features. It returns the frequency of each pair, in radians per step, and the factor of cosines and
sines. The repr of a rule is its call, and rules with equal settings are equal.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from diffprog.core import notation
from diffprog.core.arguments import check_count, check_positive
from diffprog.core.errors import LayerError
from diffprog.layers.positions.rotary import frequencies

__all__ = [
    "linear_scaling", "llama3_scaling", "longrope_scaling", "ntk_scaling", "yarn_scaling",
]


class _Scaling:
    """The base class of the rules."""

    def __repr__(self) -> str:
        return notation.call(type(self), vars(self))


@dataclasses.dataclass(frozen=True, repr=False)
class linear_scaling(_Scaling):
    """Position interpolation: ``frequency[i] / factor`` for all pairs.

    Args:
        factor: length of the sequences relative to those in training; positive.

    Example:
        >>> dp.rotary(scaling=dp.rope.linear_scaling(4.0))
        rotary(scaling=linear_scaling(4.0))

    Source: Chen et al. 2023, arXiv:2306.15595, section 2.3.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor)

    def __call__(self, base: float, features: int) -> tuple[np.ndarray, float]:  # noqa: D102
        return frequencies(base, features) / self.factor, 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class ntk_scaling(_Scaling):
    """NTK-aware scaling of the base: ``base * factor**(D / (D - 2))``, with D rotated features.

    The frequency of the first pair stays, and that of the last is divided by `factor`.

    Args:
        factor: length of the sequences relative to those in training; positive.

    Example:
        >>> frequencies, magnitude = dp.rope.ntk_scaling(8.0)(10000.0, 4)
        >>> [round(float(f), 6) for f in frequencies]
        [1.0, 0.00125]

    Source: bloc97 2023, "NTK-aware scaled RoPE"; Peng et al. 2023, arXiv:2309.00071, section 3.1.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor)

    def __call__(self, base: float, features: int) -> tuple[np.ndarray, float]:  # noqa: D102
        if features == 2:  # one pair, the first, whose frequency stays
            return frequencies(base, features), 1.0
        scaled = base * self.factor ** (features / (features - 2))
        return frequencies(scaled, features), 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class yarn_scaling(_Scaling):
    """YaRN, interpolation of slow pairs: ``frequency[i] * (s[i] + (1 - s[i]) / factor)``.

    A pair that makes more than `beta_fast` turns in `original_length` steps keeps its frequency,
    s = 1. That of a pair with fewer than `beta_slow` turns is divided by `factor`, s = 0. Between
    them s falls linearly with the index of the pair, as in the code of the authors. The magnitude
    sharpens the attention weights.

    Args:
        factor: length of the sequences relative to those in training; positive.
        original_length: time steps in training; positive.
        beta_fast: number of turns above which a pair is fast; positive.
        beta_slow: number of turns below which a pair is slow; positive.
        attention_factor: the magnitude of cosines and sines; ``0.1 ln(factor) + 1`` if None.

    Example:
        >>> frequencies, magnitude = dp.rope.yarn_scaling(4.0, 2048)(10000.0, 8)
        >>> [round(float(f), 5) for f in frequencies], round(magnitude, 4)
        ([1.0, 0.1, 0.00625, 0.00025], 1.1386)

    Source: Peng et al. 2023, arXiv:2309.00071, sections 3.2 and 3.4.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor, original_length=self.original_length,
                        beta_fast=self.beta_fast, beta_slow=self.beta_slow)

    def __call__(self, base: float, features: int) -> tuple[np.ndarray, float]:  # noqa: D102
        def pair(turns: float) -> float:
            """The fractional index of the pair with so many turns in the original length."""
            wavelength = self.original_length / (2 * math.pi * turns)
            return features * math.log(wavelength) / (2 * math.log(base))

        first = max(math.floor(pair(self.beta_fast)), 0)
        last = min(math.ceil(pair(self.beta_slow)), features - 1)
        pairs = np.arange(features // 2)
        ramp = (pairs - first) / max(last - first, 1e-3)  # a step if first == last
        slow = np.clip(ramp, 0, 1)  # 1 - s, (features / 2,)
        speeds = frequencies(base, features)
        magnitude = self.attention_factor
        if magnitude is None:
            magnitude = 0.1 * math.log(max(self.factor, 1)) + 1
        return speeds * (1 - slow) + speeds / self.factor * slow, magnitude


@dataclasses.dataclass(frozen=True, repr=False)
class llama3_scaling(_Scaling):
    """Interpolation of slow pairs in Llama 3.1: ``frequency[i] * (s[i] + (1 - s[i]) / factor)``.

    A pair that makes more than `high_frequency_factor` turns in `original_length` steps keeps its
    frequency, s = 1. That of a pair with fewer than `low_frequency_factor` turns is divided by
    `factor`, s = 0. Between them s grows linearly with the number of turns.

    Args:
        factor: length of the sequences relative to those in training; positive.
        original_length: time steps in training; positive.
        low_frequency_factor: number of turns below which a pair is slow.
        high_frequency_factor: number of turns above which a pair is fast; larger than
            `low_frequency_factor`.

    Example:
        >>> frequencies, magnitude = dp.rope.llama3_scaling(8.0, 8192)(500000.0, 8)
        >>> [float(f"{f:.3g}") for f in frequencies]
        [1.0, 0.0376, 0.000525, 6.65e-06]

    Source: Grattafiori et al. 2024 (Llama 3), arXiv:2407.21783; the rule is that of the code
    released with Llama 3.1.
    """

    factor: float
    original_length: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self) -> None:
        _check_positive(factor=self.factor, original_length=self.original_length)
        if not self.low_frequency_factor < self.high_frequency_factor:
            raise LayerError("low_frequency_factor below high_frequency_factor", repr(self),
                             "pass 1 and 4, those of Llama 3.1")

    def __call__(self, base: float, features: int) -> tuple[np.ndarray, float]:  # noqa: D102
        low, high = self.low_frequency_factor, self.high_frequency_factor
        speeds = frequencies(base, features)
        turns = self.original_length * speeds / (2 * math.pi)
        fast = np.clip((turns - low) / (high - low), 0, 1)  # s, (features / 2,)
        return speeds * fast + speeds / self.factor * (1 - fast), 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class longrope_scaling(_Scaling):
    """LongRoPE, a searched factor for each pair: ``frequency[i] / factors[i]``.

    A model has two such tuples, for short and for long sequences. The caller picks one, because a
    stream cannot rotate its past keys again when it grows long.

    Args:
        factors: one positive number for each pair.
        original_length: time steps in training; at least 2.
        factor: length of the sequences relative to those in training; positive.
        attention_factor: the magnitude of cosines and sines; if None,
            ``sqrt(1 + ln(factor) / ln(original_length))`` for a `factor` above 1, else 1.

    Example:
        >>> frequencies, magnitude = dp.rope.longrope_scaling((1.0, 5.0), 4096, 32.0)(10000.0, 4)
        >>> [round(float(f), 6) for f in frequencies], round(magnitude, 4)
        ([1.0, 0.002], 1.1902)

    Source: Ding et al. 2024, arXiv:2402.13753, section 3; the magnitude as in the models released
    with it (Phi-3).
    """

    factors: tuple[float, ...]
    original_length: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))  # a list has no hash
        _check_positive(**{f"factors[{i}]": f for i, f in enumerate(self.factors)},
                        factor=self.factor)
        check_count("original_length", self.original_length, least=2)

    def __call__(self, base: float, features: int) -> tuple[np.ndarray, float]:  # noqa: D102
        if len(self.factors) != features // 2:
            raise LayerError(f"{features // 2} factors, one for each pair", f"{len(self.factors)}",
                             "pass the factors that were searched for heads of this size")
        magnitude = self.attention_factor
        if magnitude is None:
            grown = math.log(max(self.factor, 1)) / math.log(self.original_length)
            magnitude = math.sqrt(1 + grown)
        return frequencies(base, features) / np.asarray(self.factors), magnitude


def _check_positive(**numbers: Any) -> None:
    for name, number in numbers.items():
        check_positive(name, number, "pass 8.0, for example")
