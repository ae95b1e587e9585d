"""`gelu` against x * Phi(x) by math.erf."""

import math

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp

POINTS = [-30.0, -6.0, -3.0, -1.0, -0.5, -1e-8, 0.0, 1e-8, 0.3, 1.0, 2.0, 5.0, 40.0]


def normal(x):
    """Phi(x): the probability that a standard normal number is below x."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_it_is_exact():
    with jax.enable_x64(True):
        y = dp.gelu(jnp.array(POINTS, jnp.float64))
        assert y.dtype == jnp.float64
        # The approximation by tanh is off by 4e-4.
        np.testing.assert_allclose(y, [x * normal(x) for x in POINTS], rtol=0, atol=1e-14)


def test_it_holds_in_float32_and_bfloat16():
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
        x = jnp.array(POINTS, dtype)
        y = dp.gelu(x)
        assert y.dtype == dtype
        wanted = [v * normal(v) for v in np.asarray(x, np.float64)]
        np.testing.assert_allclose(
            np.asarray(y, np.float64), wanted, rtol=tolerance, atol=tolerance)


def test_its_derivative():
    density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    with jax.enable_x64(True):
        got = jax.vmap(jax.grad(dp.gelu))(jnp.array(POINTS, jnp.float64))
        wanted = [normal(x) + x * density(x) for x in POINTS]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13)
