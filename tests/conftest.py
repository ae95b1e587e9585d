"""Tests compile thousands of programs and run each once: so they are hardly optimized.

A test asks for `optimized` where the compiled program itself, or the rounding of what users run,
is the matter.
"""

import jax
import pytest

jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def optimized():
    """Compile as users do."""
    jax.clear_caches()  # programs that were compiled the other way
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
