"""Backpropagation, solved: each gradient has the shape of what it is a gradient by."""

import numpy as np


def gradients(
    x: np.ndarray, target: np.ndarray, w1: np.ndarray, w2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    h = np.tanh(x @ w1)
    by_y = h @ w2 - target                                     # (N, O)
    by_h = by_y @ w2.T                                         # (N, H)
    return x.T @ (by_h * (1 - h**2)), h.T @ by_y
