"""Backpropagation by hand, in NumPy, through a net of two layers.

    h = tanh(x W1),    y = h W2,    L = sum((y - target)^2) / 2

The chain rule goes backwards: first the gradient by y, then by W2 and h, then by W1. No `jax.grad`.
"""

import numpy as np


def gradients(
    x: np.ndarray, target: np.ndarray, w1: np.ndarray, w2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """x (N, I), target (N, O), w1 (I, H), w2 (H, O) -> the gradients of L by w1 and w2."""
    raise NotImplementedError
