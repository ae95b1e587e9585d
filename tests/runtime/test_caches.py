"""The cache of compiled programs."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax._src import monitoring

import diffprog as dp


@pytest.fixture
def hits():
    """The events of JAX's cache, in order: hits and misses."""
    found = []

    def listen(event, **_):
        if event.startswith("/jax/compilation_cache/cache_"):
            found.append(event.rpartition("cache_")[2])

    monitoring.register_event_listener(listen)
    before = jax.config.jax_compilation_cache_dir
    yield found
    monitoring.unregister_event_listener(listen)
    dp.runtime.compilation_cache(before)


def test_a_program_is_compiled_once_for_all_runs(tmp_path, hits):
    """Also after another program was compiled without a cache, which JAX remembers."""
    one = jnp.ones(3)
    dp.runtime.compilation_cache(None)
    jax.jit(lambda x: x + 1)(one)
    assert hits == []
    dp.runtime.compilation_cache(tmp_path / "cache")
    for _ in range(2):
        jax.clear_caches()  # as a new process has none in memory
        assert jax.device_get(jax.jit(lambda x: 2 * x + 3)(one)).sum() == 15
    assert hits == ["misses", "hits"]
    assert len([name for name in os.listdir(tmp_path / "cache") if name.endswith("-cache")]) == 1
    dp.runtime.compilation_cache(None)
    jax.clear_caches()
    assert jax.device_get(jax.jit(lambda x: 2 * x + 3)(one)).sum() == 15
    assert hits == ["misses", "hits"]
