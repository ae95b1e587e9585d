"""Norms and histograms of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.training_nets import KEY, examples, sgd

import diffprog as dp

# The edges as the docstring has them.
EDGES = [-(2.0**k) for k in range(4, -17, -1)] + [2.0**k for k in range(-16, 5)]


def observed(params, pattern="**"):
    metrics = {}
    dp.runtime.watch(pattern)(1, params, metrics)
    return metrics


def whole(histogram):
    """The counts of all bins, those left out too."""
    counts, first = np.zeros(len(EDGES) - 1, int), EDGES.index(histogram.edges[0])
    assert histogram.edges == EDGES[first : first + len(histogram.edges)]
    counts[first : first + len(histogram.counts)] = histogram.counts
    return counts


@pytest.mark.parametrize("scale", [1e-4, 0.02, 3.0])
def test_norms_and_counts_are_those_of_numpy(scale):
    x = np.random.default_rng(0).normal(scale=scale, size=(30, 40)).astype(np.float32)
    metrics = observed({"kernel": x})
    histogram = metrics["histogram/kernel"]
    assert metrics["norm/kernel"] == pytest.approx(np.linalg.norm(x.astype(float)), rel=1e-5)
    np.testing.assert_array_equal(whole(histogram), np.histogram(x, EDGES)[0])
    assert histogram.counts[0] and histogram.counts[-1] and sum(histogram.counts) == x.size


def test_every_entry_counts_in_its_bin():
    """On an edge, beyond the last edges, infinite; NaN in no bin."""
    for x, bin_ in [(0.0, 20), (2.0**-16, 21), (-(2.0**-16), 20), (8.0, 40), (-16.0, 0), (16.0, 40),
                    (-8.0, 1), (1e9, 40), (-np.inf, 0), (np.inf, 40)]:
        assert np.flatnonzero(whole(observed({"a": np.array([x, x])})["histogram/a"])) == bin_, x
    metrics = observed({"a": np.array([np.nan, 1.0]), "b": np.array([np.nan])})
    assert sum(metrics["histogram/a"].counts) == 1 and metrics["histogram/b"].counts == [0]
    assert np.isnan(metrics["norm/a"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.complex64])
def test_every_dtype_is_counted_in_float32(dtype):
    """A sum of 4,096 squares of 3 in 16 bits would stop growing, in int8 overflow."""
    x = jnp.full(4096, 3, dtype)
    metrics = observed({"a": x * 1j if dtype == jnp.complex64 else x})
    assert metrics["norm/a"] == 192 and metrics["histogram/a"] == ([4096], [2.0, 4.0])


def test_a_pattern_selects_parameters_of_a_training_state():
    x, _ = examples()
    state = sgd().init(KEY, x)
    metrics = {"loss": 0.5}
    dp.runtime.watch("**/kernel")(1, state, metrics)
    kernels = dp.tree.select(state.params, "**/kernel")
    assert list(metrics) == ["loss", *(f"{kind}/{path}" for path in kernels
                                       for kind in ("norm", "histogram"))]
    for path, leaf in kernels.items():
        assert metrics[f"norm/{path}"] == pytest.approx(float(jnp.linalg.norm(leaf)), rel=1e-6)


def test_a_pattern_that_matches_nothing_raises():
    with pytest.raises(dp.LayerError, match="wants a pattern that matches a path"):
        observed({"kernel": jnp.ones(2)}, "**/kernels")


def test_strict_promotion_and_float64():
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        assert observed({"a": jnp.array([1e-300, 3.0])})["norm/a"] == 3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_have_the_range_of_float32(scale):
    """The square of 1e-30 is zero in float32, and that of 1e30 infinite."""
    metrics = observed({"a": np.full(4, scale, np.float32)})
    assert metrics["norm/a"] == pytest.approx(2 * scale, rel=1e-6)
