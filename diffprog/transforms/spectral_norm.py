"""Spectral normalization: kernels with a largest singular value of one."""

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

_FIRST = 30  # steps of the power iteration at init; each training call does one more


@factory
def spectral_norm(layer: Any, pattern: Patterns = "**/kernel") -> Layer:
    """Divide kernels by their largest singular value: ``y = f(x; w / |w|_2)``.

    A kernel with more than two axes is reshaped to a matrix, all axes but the last by the last, as
    in the paper; for a convolution this is not the norm of the map between images. The singular
    value is estimated by power iteration, whose vector is state under the name ``#spectral_norm``:
    30 steps at ``init`` and one in each training call, so that it follows the kernel. In inference
    it does not change. A kernel of zeros is not divided.

    Args:
        layer: any layer.
        pattern: paths of the kernels, or a tuple of several patterns.

    Raises:
        LayerError: at ``init``, for a pattern that matches nothing, or a leaf with one axis.

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
        matrix = kernel.reshape(-1, kernel.shape[-1])                    # (in, out)
        drawn = jax.random.normal(jax.random.key(0), matrix.shape[-1:], kernel.dtype)
        unit = (drawn / length(drawn)).astype(kernel.dtype)              # (out,)
        return jax.lax.fori_loop(0, _FIRST, _loop_step, (matrix, unit))[1]

    def use(
        kernel: jax.Array, vector: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        matrix = kernel.reshape(-1, kernel.shape[-1])
        vector = _power_step(matrix, vector) if train else vector
        singular_value = length(_product(matrix, vector))
        return _divided(kernel, singular_value), jax.lax.stop_gradient(vector)

    return reparametrized(
        as_layer(layer),
        Computed(lambda key, kernel: kernel, use, pattern, carry=carry, mark="#spectral_norm"),
        lambda layer: spectral_norm(layer, pattern))


def _loop_step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    matrix, vector = carry
    return matrix, _power_step(matrix, vector)


def _power_step(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """One step of the power iteration, ``normalize(W^T normalize(W v))``; W = 0 keeps v."""
    left = _product(matrix, vector)                                      # (in,)
    right = _product(matrix.conj().T, _divided(left, length(left)))      # (out,)
    size = length(right)
    return jnp.where(size == 0, vector, _divided(right, size).astype(vector.dtype))


def _product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """The matrix times a vector, in float32 or wider."""
    wide = joint(matrix.dtype, vector.dtype, jnp.float32)
    return matrix.astype(wide) @ vector.astype(wide)


def _divided(array: jax.Array, by: jax.Array) -> jax.Array:
    """``array / by`` in the dtype of the array; a divisor of zero counts as one."""
    dtype = joint(array, by)
    return (array.astype(dtype) / jnp.where(by == 0, 1, by).astype(dtype)).astype(array.dtype)
