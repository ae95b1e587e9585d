"""Derivatives: curvature, gradients of single examples, agreement of three ways."""

from __future__ import annotations

from typing import Any

from diffprog.core.synonyms import unknown

# Written by tests/names.py --write.
from diffprog.gradients.agreement import check_gradients
from diffprog.gradients.curvature import fisher_product, gauss_newton_product, hessian_product
from diffprog.gradients.per_example import (
    per_example_gradient_norms,
    per_example_gradients,
    tangent_kernel,
)

__all__ = [
    "check_gradients", "fisher_product", "gauss_newton_product", "hessian_product",
    "per_example_gradient_norms", "per_example_gradients", "tangent_kernel",
]
# To here.


def __getattr__(name: str) -> Any:
    raise unknown(__name__, name)
