"""Parts of jaxprs that differ between versions of JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan."""
    if "ft_in" in params:  # from jax 0.12 on: trees of constants, carry and xs
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]
