"""Eight examples that every model must be able to memorize."""

import jax
import numpy as np
import optax

import diffprog as dp

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
NET = {"width": 16, "depth": 1, "heads": 2, "hidden": 32}
IDS, SOURCE = DRAW.integers(0, 10, (2, 8, 6))
IDS[:, 0] = np.arange(8)  # sequences with equal prefixes could not be distinguished
MASKED = np.arange(6) % 3 == 1
TRANSLATED = {"x": IDS, "source": SOURCE}
PAIRS = {"x": np.where(MASKED, 10, IDS), "y": (np.where(MASKED, IDS, -100), np.arange(8) % 2)}
LABELLED = {"x": IDS, "y": np.arange(8) % 4}
IMAGES = LABELLED | {"x": DRAW.normal(size=(8, 4, 4, 1)).astype(np.float32)}


def drawn(*shape):
    """Eight examples of four classes."""
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    return x, np.arange(8) % 4


def filled(params):
    """Nonzero parameters, so that no input is multiplied by zero."""
    return jax.tree.map(lambda leaf: 0.5 * np.cos(np.arange(leaf.size) + 1.0).astype(
        np.float32).reshape(leaf.shape), params)


def differs(a, b):
    return bool((abs(a - b) > 1e-5).any())


def learns(net, objective, batch, steps):
    """Assert that `steps` training steps on one batch reduce the loss to nearly zero."""
    step = dp.make_step(net, objective, optax.adam(1e-2))
    fit = dp.fit(step, dp.batches(batch, 8, seed=0), key=KEY, steps=steps, log_every=10,
                 progress=False)
    assert fit.history[-1]["loss"] < 0.05
