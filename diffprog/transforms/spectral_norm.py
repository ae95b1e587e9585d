"""Kernels that stretch no input by more than one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.computed import Computed, Patterns
from diffprog.core.dtypes import joint
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, as_layer
from diffprog.transforms.reparam import check_kernel, length, reparametrized

__all__ = ["spectral_norm"]

_FIRST = 30  # steps of the power iteration at init; one more in each call of training


@factory
def spectral_norm(layer: Any, pattern: Patterns = "**/kernel") -> Layer:
    """Divide kernels by their largest singular value: ``y = f(x; w / |w|_2)``.

    A kernel of more than two axes counts as the matrix (all but the last, last), as in the paper;
    of a convolution this is not the norm of the map between images. The value is found by power
    iteration, whose vector is state, under the name ``#spectral_norm``: it starts with 30 steps and
    makes one in each call of training, following the kernel as it changes; at rest it stays. A
    kernel of zeros stays as it is.

    Args:
        layer: any layer.
        pattern: of the paths of the kernels, or a tuple of several.

    Raises:
        LayerError: at ``init``: a pattern that matches nothing, or a leaf with one axis.

    Example:
        >>> net = dp.spectral_norm(dp.linear(3, bias=False))
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> kernel = dp.tree.merge(net, params, state)[0]["kernel"]
        >>> bool(jnp.isclose(jnp.linalg.norm(kernel, 2), 1, atol=1e-3))
        True

    Source: Miyato, Kataoka, Koyama, Yoshida 2018, arXiv:1802.05957, algorithm 1.
    """

    def carry(kernel: jax.Array) -> jax.Array:
        check_kernel(kernel)
        matrix = kernel.reshape(-1, kernel.shape[-1])
        drawn = jax.random.normal(jax.random.key(0), matrix.shape[-1:], kernel.dtype)
        begin = (drawn / length(drawn)).astype(kernel.dtype)
        return jax.lax.fori_loop(0, _FIRST, _turn, (matrix, begin))[1]

    def use(
        kernel: jax.Array, vector: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        matrix = kernel.reshape(-1, kernel.shape[-1])
        after = _step(matrix, vector) if train else vector
        stretched = length(_product(matrix, after))
        return _divided(kernel, stretched), jax.lax.stop_gradient(after)

    return reparametrized(
        as_layer(layer),
        Computed(lambda key, kernel: kernel, use, pattern, carry=carry, mark="#spectral_norm"),
        lambda layer: spectral_norm(layer, pattern))


def _turn(_: Any, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    matrix, vector = at
    return matrix, _step(matrix, vector)


def _product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """The matrix times a vector, in float32 or wider."""
    wide = joint(matrix.dtype, vector.dtype, jnp.float32)
    return matrix.astype(wide) @ vector.astype(wide)


def _divided(array: jax.Array, by: jax.Array) -> jax.Array:
    """The quotient in the dtype of the array, which stays as it is where the divisor is zero."""
    dtype = joint(array, by)
    return (array.astype(dtype) / jnp.where(by == 0, 1, by).astype(dtype)).astype(array.dtype)


def _step(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """One step of the power iteration; a matrix of zeros keeps the vector as it is."""
    across = _product(matrix, vector)
    back = _product(matrix.conj().T, _divided(across, length(across)))
    found = length(back)
    return jnp.where(found == 0, vector, _divided(back, found).astype(vector.dtype))
