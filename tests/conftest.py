"""Tests compile thousands of programs and run each once: so they are hardly optimized.

A test asks for `optimized` where the compiled program itself, or the rounding of what users run,
is the matter.
"""

import collections

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


def pytest_terminal_summary(terminalreporter):
    """Print what the random nets were made of, over all processes."""
    drawn = collections.Counter()
    for report in terminalreporter.stats.get("passed", ()):
        for name, counts in getattr(report, "user_properties", ()):
            drawn.update(counts if name == "drawn" else {})
    if drawn:
        parts = ", ".join(f"{name} {count}" for name, count in drawn.most_common())
        terminalreporter.write_line(f"random nets under every law: {parts}")
