"""How rotary positions are stretched to sequences longer than those that a model was trained on.

Each rule is a function ``(base, features) -> (frequencies, magnitude)`` of how many features turn:
how far each pair turns in a step, in radians, and what cosines and sines are multiplied by. A rule
is shown by the call that made it, and equal to those made of equal numbers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from diffprog.core import notation
from diffprog.core.arguments import check_count, is_number
from diffprog.core.errors import LayerError
from diffprog.layers.positions.rotary import frequencies

__all__ = [
    "linear_scaling", "llama3_scaling", "longrope_scaling", "ntk_scaling", "yarn_scaling",
]


class _Scaling:
    """What the rules have in common."""

    def __repr__(self) -> str:
        return notation.call(type(self), vars(self))


@dataclasses.dataclass(frozen=True, repr=False)
class linear_scaling(_Scaling):
    """Interpolate positions: ``frequency[i] / factor``, all pairs turn as much slower.

    Args:
        factor: how many times longer the sequences may be; positive.

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
    """Enlarge the base: ``base * factor**(D / (D - 2))``, D being how many features turn.

    The fastest pair turns as before, the slowest `factor` times slower.

    Args:
        factor: how many times longer the sequences may be; positive.

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
        if features == 2:  # the one pair is the fastest
            return frequencies(base, features), 1.0
        return frequencies(base * self.factor ** (features / (features - 2)), features), 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class yarn_scaling(_Scaling):
    """Interpolate slow pairs, sharpen attention: ``frequency[i] * (s[i] + (1 - s[i]) / factor)``.

    A pair that turns more than `beta_fast` times in `original_length` steps keeps its frequency,
    s = 1; one that turns less than `beta_slow` times has it divided by `factor`, s = 0; between
    them s falls linearly with the number of the pair, as in the code of the authors.

    Args:
        factor: how many times longer the sequences may be; positive.
        original_length: how many steps the model was trained on.
        beta_fast: turns from which on a pair is fast.
        beta_slow: turns up to which a pair is slow.
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
            """The pair, not always a whole one, that turns so often in the original length."""
            wavelength = self.original_length / (2 * math.pi * turns)
            return features * math.log(wavelength) / (2 * math.log(base))

        first = max(math.floor(pair(self.beta_fast)), 0)
        last = min(math.ceil(pair(self.beta_slow)), features - 1)
        pairs = np.arange(features // 2)
        ramp = (pairs - first) / max(last - first, 1e-3)  # a step if they are equal
        slow = np.clip(ramp, 0, 1)
        speeds = frequencies(base, features)
        magnitude = self.attention_factor
        if magnitude is None:
            magnitude = 0.1 * math.log(max(self.factor, 1)) + 1
        return speeds * (1 - slow) + speeds / self.factor * slow, magnitude


@dataclasses.dataclass(frozen=True, repr=False)
class llama3_scaling(_Scaling):
    """Interpolate slow pairs, as Llama 3.1 does: ``frequency[i] * (s[i] + (1 - s[i]) / factor)``.

    A pair that turns more than `high_frequency_factor` times in `original_length` steps keeps its
    frequency, s = 1; one that turns less than `low_frequency_factor` times has it divided by
    `factor`, s = 0; between them s grows linearly with the number of turns.

    Args:
        factor: how many times longer the sequences may be; positive.
        original_length: how many steps the model was trained on.
        low_frequency_factor: turns up to which a pair is slow.
        high_frequency_factor: turns from which on a pair is fast; larger than the other.

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
                             "pass 1 and 4, as Llama 3.1 has them")

    def __call__(self, base: float, features: int) -> tuple[np.ndarray, float]:  # noqa: D102
        low, high = self.low_frequency_factor, self.high_frequency_factor
        speeds = frequencies(base, features)
        turns = self.original_length * speeds / (2 * math.pi)
        fast = np.clip((turns - low) / (high - low), 0, 1)
        return speeds * fast + speeds / self.factor * (1 - fast), 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class longrope_scaling(_Scaling):
    """Divide each pair by a factor of its own, found by search: ``frequency[i] / factors[i]``.

    A model has two such tuples, for short and for long sequences: the caller picks one, because a
    stream cannot turn its past anew when it grows long.

    Args:
        factors: one positive number for each pair.
        original_length: how many steps the model was trained on; at least 2.
        factor: how many times longer the sequences may be.
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
        object.__setattr__(self, "factors", tuple(self.factors))  # what is compared has a hash
        _check_positive(**{f"factors[{i}]": f for i, f in enumerate(self.factors)},
                        factor=self.factor)
        check_count("original_length", self.original_length, least=2)

    def __call__(self, base: float, features: int) -> tuple[np.ndarray, float]:  # noqa: D102
        if len(self.factors) != features // 2:
            raise LayerError(f"{features // 2} factors, one for each pair", f"{len(self.factors)}",
                             "take those that were searched for heads of this size")
        magnitude = self.attention_factor
        if magnitude is None:
            grown = math.log(max(self.factor, 1)) / math.log(self.original_length)
            magnitude = math.sqrt(1 + grown)
        return frequencies(base, features) / np.asarray(self.factors), magnitude


def _check_positive(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not is_number(number) or not number > 0:
            raise LayerError(f"{name} as a positive number", repr(number), "pass 8.0, for example")
