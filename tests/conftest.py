"""What test files ask for by name."""

import jax
import pytest


@pytest.fixture
def quick_compilation():
    """Programs are hardly optimized: where thousands run once each, compiling is all the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
