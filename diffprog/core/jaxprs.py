"""What is read in jaxprs, the programs that JAX traces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax


def programs(equation: Any) -> Iterator[Any]:
    """The programs inside an equation, such as the body of a loop."""
    for part in jax.tree.leaves(list(equation.params.values())):
        program = getattr(part, "jaxpr", part)
        if hasattr(program, "eqns"):
            yield program


def primitives(program: Any) -> set[str]:
    """The names of the primitives in a program and in all programs inside."""
    names = {equation.primitive.name for equation in program.eqns}
    return names.union(*(primitives(inner) for equation in program.eqns
                         for inner in programs(equation)))


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan."""
    if "ft_in" in params:  # from jax 0.12 on: trees of constants, carry and xs
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]
