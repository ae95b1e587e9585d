"""What JAX writes into a jaxpr in another way from version to version: read here alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a scan's arguments are constants, and how many its carry."""
    if "ft_in" in params:  # from jax 0.12 on: trees of constants, carry and xs
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]
