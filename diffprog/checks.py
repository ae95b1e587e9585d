"""Running the laws that every layer keeps on any layer, the library's and one's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from diffprog.errors import LayerError, signed
from diffprog.laws import LAWS
from diffprog.layer import as_layer
from diffprog.trials import Trial

__all__ = ["check"]

_TIME = {"nothing depends on the future", "streaming equals all at once"}


class Report(NamedTuple):
    """The laws that a layer was found to keep, and what they could not look at."""

    laws: list[str]
    untried: list[str]

    def __str__(self) -> str:
        untried = f"; not tried: {', '.join(self.untried)}" if self.untried else ""
        return f"{len(self.laws)} laws hold: {', '.join(self.laws)}{untried}"


def check(
    layer: Any, x: Any, *, key: jax.Array | None = None, batched: bool = True,
    causal: bool = False, smooth: bool = True, precision: Any = "float64", **side: Any,
) -> Report:
    """Run the laws that every layer keeps on this one, and report all that fail at once.

    Args:
        layer: any layer, or a plain function.
        x: its input; a `jax.ShapeDtypeStruct` stands for random numbers.
        key: of parameters, inputs and randomness; ``jax.random.key(0)`` if None.
        batched: the first axis of x holds examples that must not mix at rest.
        causal: the second axis is time; nothing may depend on what comes later, and chunk by chunk
            must equal all at once.
        smooth: False where the layer has no gradient at zero or at x.
        precision: the dtype in which the layer computes whatever x is, as `mixed` does; results are
            compared to it, and finite differences are left out.
        side: side inputs, with a first axis of examples.

    Returns:
        The names of the laws that hold, and the side inputs that were not given.

    Raises:
        LayerError: one error that lists every law that fails, and how.

    Example:
        >>> report = dp.check(dp.linear(3), jax.ShapeDtypeStruct((2, 4), jnp.float32))
        >>> "gradients agree" in report.laws
        True
    """
    layer = as_layer(layer)
    side = {name: value for name, value in side.items() if value is not None}
    left_out = {"examples do not mix"} if not batched else set()
    left_out |= _TIME if not causal else set()
    left_out |= {"gradients agree"} if precision != "float64" else set()
    left_out |= {"gradients agree", "gradients are finite"} if not smooth else set()
    laws = {name: law for name, law in LAWS.items() if name not in left_out}
    failures = []
    with jax.enable_x64(True):
        try:
            own = jax.random.key(0) if key is None else key
            trial = Trial.of(layer, x, own, side, precision)
        except Exception as error:
            failures.append(f"\n  init works on shapes alone: {type(error).__name__}: {error}")
        else:
            for name, law in laws.items():
                try:
                    law(trial)
                except Exception as error:
                    failures.append(f"\n  {name}: {type(error).__name__}: {error}")
    if failures:
        with signed(layer.__repr__):
            raise LayerError("every law of a layer kept", f"{len(failures)} broken",
                             f"mend it by these:{''.join(failures)}")
    return Report(list(laws), sorted(layer.side - side.keys()))
