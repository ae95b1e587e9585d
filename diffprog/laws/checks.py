"""Running the laws that every layer keeps on any layer, the library's and one's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from diffprog.core.errors import LayerError, signed
from diffprog.core.layer import as_layer
from diffprog.laws.laws import LAWS
from diffprog.laws.trial import Options, Trial

__all__ = ["check"]


class Report(NamedTuple):
    """The laws that a layer was found to keep, and what could not be tried.

    Attributes:
        laws: the names of those that were tried and hold: what each changes was seen to matter.
        untried: law -> why it could not be tried; and side input -> that it was not given.
    """

    laws: list[str]
    untried: dict[str, str]

    def __str__(self) -> str:
        untried = "".join(f"\n  not tried: {name}: {why}" for name, why in self.untried.items())
        return f"{len(self.laws)} laws hold: {', '.join(self.laws)}{untried}"


def check(
    layer: Any, x: Any, *, key: jax.Array | None = None, batched: bool = True,
    causal: bool = False, smooth: bool = True, precision: Any = "float64", **side: Any,
) -> Report:
    """Run the laws that every layer keeps on this one, and report all that fail at once.

    A law counts as held only if what it changes was seen to matter: no layer keeps the law on the
    future behind an embedding that is given one id over and over. Else it is untried, with the
    reason, and another x or more side inputs may help.

    Args:
        layer: any layer, or a plain function.
        x: its input; a `jax.ShapeDtypeStruct` stands for random numbers.
        key: of parameters, inputs and randomness; ``jax.random.key(0)`` if None.
        batched: the first axis of x holds examples that must not mix at rest, and in training
            neither without state or noise.
        causal: the second axis is time; nothing may depend on what comes later, and chunk by chunk
            must equal all at once.
        smooth: False where the layer has no gradient at zero or at x.
        precision: the dtype in which the layer computes whatever x is, as `mixed` does; results are
            compared to it, and finite differences are left out.
        side: side inputs, with a first axis of examples.

    Returns:
        The laws that hold; and those that could not be tried, with the side inputs that were not
        given, each with the reason.

    Raises:
        LayerError: one error that lists every law that fails, and how.

    Example:
        >>> report = dp.check(dp.linear(3), jax.ShapeDtypeStruct((2, 4), jnp.float32))
        >>> "gradients agree" in report.laws
        True
        >>> report.untried["keys matter in training"]
        'it draws nothing'
    """
    layer = as_layer(layer)
    side = {name: value for name, value in side.items() if value is not None}
    options = Options(batched, causal, smooth, precision)
    laws, untried, failures = [], {}, []
    with jax.enable_x64(True):
        try:
            own = jax.random.key(0) if key is None else key
            trial = Trial.of(layer, x, own, side, options)
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
            raise LayerError("every law of a layer kept", f"{len(failures)} broken",
                             f"mend it by these:{''.join(failures)}")
    return Report(laws, untried | dict.fromkeys(sorted(layer.side - side.keys()), "not given"))
