"""`check`: run the laws on any layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from diffprog.core.errors import LayerError, signed
from diffprog.core.layer import as_layer
from diffprog.laws.laws import LAWS
from diffprog.laws.trial import Options, Symmetry, Trial

__all__ = ["check"]


class Report(NamedTuple):
    """The laws that hold, and those that could not be tried.

    Attributes:
        laws: names of the laws that were tried and hold.
        untried: law -> the reason why it could not be tried; and side input -> "not given".
    """

    laws: list[str]
    untried: dict[str, str]

    def __str__(self) -> str:
        untried = "".join(f"\n  not tried: {name}: {why}" for name, why in self.untried.items())
        return f"{len(self.laws)} laws hold: {', '.join(self.laws)}{untried}"


def check(
    layer: Any, x: Any, *, key: jax.Array | None = None, batched: bool = True,
    causal: bool = False, symmetry: Symmetry | None = None, smooth: bool = True,
    precision: Any = "float64", **side: Any,
) -> Report:
    """Run the laws that every layer must keep, and raise one error for all broken ones.

    A law holds only if its change of the input matters to the output: causality says nothing about
    an embedding whose ids are all equal. Otherwise it is left out and reported with the reason;
    another x, or more side inputs, may make it possible to try it.

    Args:
        layer: any layer, or a plain function.
        x: its input; a `jax.ShapeDtypeStruct` is replaced by random numbers.
        key: PRNG key of parameters, inputs and noise; ``jax.random.key(0)`` if None.
        batched: the first axis of x is a batch axis, whose examples must not mix in inference, nor
            in training unless the layer has state or noise.
        causal: the second axis is time: no output may depend on later inputs, and a stream in
            chunks must equal one call.
        symmetry: what a permutation of the steps, the second axis of x, does to the output:
            "equivariant" permutes it too, "invariant" does not change it; None claims nothing.
        smooth: False if the layer has no gradient at zero or at x.
        precision: the dtype in which the layer computes whatever the dtype of x, as in `mixed`.
            Results are compared in that precision, without finite differences.
        side: side inputs, with a batch axis.

    Returns:
        The laws that hold; and, with reasons, those that could not be tried and the side inputs
        that were not given.

    Raises:
        LayerError: one error that lists each broken law with its own error.

    Example:
        >>> report = dp.check(dp.linear(3), jax.ShapeDtypeStruct((2, 4), jnp.float32))
        >>> "gradients agree" in report.laws
        True
        >>> report.untried["keys matter in training"]
        'the layer is not random'
    """
    layer = as_layer(layer)
    side = {name: value for name, value in side.items() if value is not None}
    if symmetry not in (None, "equivariant", "invariant"):
        raise LayerError("symmetry out of equivariant, invariant, or None", repr(symmetry),
                         "say what permuted steps do to the output")
    options = Options(batched, causal, symmetry, smooth, precision)
    laws, untried, failures = [], {}, []
    with jax.enable_x64(True):
        try:
            key = jax.random.key(0) if key is None else key
            trial = Trial.of(layer, x, key, side, options)
        except Exception as error:
            failures.append(f"\n  init works on shapes alone: {type(error).__name__}: {error}")
        else:
            for name, law in LAWS.items():
                try:
                    if reason := law(trial):
                        untried[name] = reason
                    else:
                        laws.append(name)
                except Exception as error:
                    failures.append(f"\n  {name}: {type(error).__name__}: {error}")
    if failures:
        with signed(layer.__repr__):
            raise LayerError("every law of a layer to hold", f"{len(failures)} broken",
                             f"correct these:{''.join(failures)}")
    return Report(laws, untried | dict.fromkeys(sorted(layer.side - side.keys()), "not given"))
