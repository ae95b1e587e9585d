"""Norms of numbers whose squares overflow or underflow, and of single numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import drawn

import diffprog as dp

EPS = 1e-5


def standardized(x, axes, mean=True):
    """The formula, in float64."""
    centered = x - x.mean(axes, keepdims=True) if mean else x
    return centered / jnp.sqrt((centered**2).mean(axes, keepdims=True) + EPS)


# The layer, train, and the formula on x of shape (3, 5, 4).
NORMS = {
    "layer_norm": (dp.layer_norm(), False, lambda x: standardized(x, -1)),
    "rms_norm": (dp.rms_norm(), False, lambda x: standardized(x, -1, mean=False)),
    "group_norm": (dp.group_norm(2, dims=1), False, lambda x: standardized(
        x.reshape(3, 5, 2, 2), (1, 3)).reshape(x.shape)),
    "instance_norm": (dp.instance_norm(dims=1), False, lambda x: standardized(x, 1)),
    "batch_norm": (dp.batch_norm(), True, lambda x: standardized(x, (0, 1))),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e5, 1e14, 1e20, 1e30])
def test_accuracy_is_independent_of_the_magnitude(name, size):
    """Output and gradient in float32 equal those of the formula in float64."""
    norm, train, formula = NORMS[name]
    x, ct = drawn(3, 5, 4).clip(-2, 2), drawn(3, 5, 4, seed=1)
    narrow = (x * size).astype(np.float32)
    params, state = norm.init(jax.random.key(0), narrow)
    run = lambda x: norm.apply(params, state, x, train=train)[0]  # noqa: E731
    y, back = jax.jit(lambda x, ct: (run(x), jax.vjp(run, x)[1](ct)[0]))(
        narrow, ct.astype(np.float32))
    with jax.enable_x64(True):
        wanted, pull = jax.vjp(formula, jnp.asarray(narrow, float))
        slope, = pull(jnp.asarray(ct))
    for got, right in ((y, wanted), (back, slope)):
        np.testing.assert_allclose(got, right, rtol=0, atol=2e-5 * np.abs(right).max())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e20, 1e38])
@pytest.mark.parametrize("norm", [
    dp.layer_norm(), dp.rms_norm(), dp.group_norm(1, dims=0),
], ids=repr)
def test_large_numbers_are_normalized(size, norm):
    x = jnp.array([[3.0, 1.0, -1.0, -3.0]]) * size
    wanted = np.array([[3.0, 1.0, -1.0, -3.0]]) / 5**0.5
    params, _ = norm.init(jax.random.key(0), x)
    np.testing.assert_allclose(norm(params, x), wanted, rtol=1e-6)


@pytest.mark.parametrize("norm", [dp.layer_norm(), dp.rms_norm()], ids=repr)
def test_scaling_by_powers_of_two_is_exact(norm):
    """Numbers above 2**16 are scaled by powers of two, without rounding; eps is negligible here."""
    x = jnp.asarray(drawn(4, 7) * 2.0**14, jnp.float32)
    params, _ = norm.init(jax.random.key(0), x)
    wanted = np.asarray(norm(params, x))
    assert np.abs(x).max() < 2**16
    for power in (8, 30, 100):
        np.testing.assert_array_equal(norm(params, x * 2.0**power), wanted)


def test_the_gradient_at_a_large_constant_depends_on_eps():
    norm, x = dp.layer_norm(), jnp.full((1, 4), 2.0**60)
    params, _ = norm.init(jax.random.key(0), x)
    y, back = jax.vjp(lambda x: norm(params, x), x)
    assert not y.any()
    slope, = back(jnp.array([[1.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(slope, np.array([[0.75, -0.25, -0.25, -0.25]]) / EPS**0.5, rtol=1e-5)
    assert np.isfinite(jax.jit(lambda x: norm(params, x))(jnp.full((1, 4), 1e38))).all()


def test_the_running_statistics_of_large_numbers():
    norm, x = dp.batch_norm(), jnp.array([[1e12], [3e12]])
    params, state = norm.init(jax.random.key(0), x)
    _, state = norm.apply(params, state, x, train=True)
    np.testing.assert_allclose(state["mean"], 0.2e12, rtol=1e-6)
    np.testing.assert_allclose(state["var"], 0.2e24, rtol=1e-5)


@pytest.mark.parametrize(("norm", "shape"), [
    (dp.layer_norm(), (3, 1)), (dp.instance_norm(), (2, 1, 1, 3)),
    (dp.instance_norm(dims=1), (2, 1, 3)), (dp.group_norm(3, dims=0), (2, 3)),
    (dp.group_norm(4), (2, 1, 1, 4))], ids=repr)
def test_a_single_number_raises(norm, shape):
    """The output would be the bias for all x."""
    params = {"scale": jnp.ones(shape[-1]), "bias": jnp.ones(shape[-1])}
    for call in (lambda: norm(params, jnp.ones(shape)), lambda: norm.plan(jnp.ones(shape)),
                 lambda: dp.serial(norm).init(jax.random.key(0), jnp.ones(shape))):
        with pytest.raises(dp.LayerError, match="wants several"):
            call()


def test_rms_norm_of_a_single_number_is_its_sign():
    norm, x = dp.rms_norm(), jnp.array([[4.0], [-7.0]])
    params, _ = norm.init(jax.random.key(0), x)
    np.testing.assert_allclose(norm(params, x), [[1.0], [-1.0]], rtol=1e-5)


@pytest.mark.parametrize("norm", [dp.group_norm(2, dims=1), dp.instance_norm(dims=1)], ids=repr)
def test_an_empty_sequence_has_a_finite_gradient(norm):
    x = jnp.zeros((2, 0, 4))
    params, _ = norm.init(jax.random.key(0), jnp.ones((2, 3, 4)))
    y, slope = jax.value_and_grad(lambda params: norm(params, x).sum())(params)
    assert float(y) == 0
    chex.assert_tree_all_finite(slope)
