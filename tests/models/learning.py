"""Eight examples that every model must learn by heart."""

import jax
import numpy as np
import optax

import diffprog as dp

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
NET = {"width": 16, "depth": 1, "heads": 2, "hidden": 32}
IDS, SOURCE = DRAW.integers(0, 10, (2, 8, 6))
IDS[:, 0] = np.arange(8)  # what begins alike cannot be told apart
HIDDEN = np.arange(6) % 3 == 1
TRANSLATED = {"x": IDS, "source": SOURCE}
PAIRS = {"x": np.where(HIDDEN, 10, IDS), "y": (np.where(HIDDEN, IDS, -100), np.arange(8) % 2)}
LABELLED = {"x": IDS, "y": np.arange(8) % 4}
IMAGES = LABELLED | {"x": DRAW.normal(size=(8, 4, 4, 1)).astype(np.float32)}


def drawn(*shape):
    """Eight examples of four classes."""
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    return x, np.arange(8) % 4


def filled(params):
    """Parameters of which none is zero, so that nothing is hidden behind one."""
    return jax.tree.map(lambda leaf: 0.5 * np.cos(np.arange(leaf.size) + 1.0).astype(
        np.float32).reshape(leaf.shape), params)


def differs(a, b):
    return bool((abs(a - b) > 1e-5).any())


def learns(net, objective, batch, steps):
    """Assert that so many steps on one batch leave next to no loss."""
    step = dp.make_step(net, objective, optax.adam(1e-2))
    fit = dp.fit(step, dp.batches(batch, 8, seed=0), key=KEY, steps=steps, log_every=10,
                 progress=False)
    assert fit.history[-1]["loss"] < 0.05
