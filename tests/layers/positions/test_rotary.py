"""Rotary positions against complex numbers in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from names import by_name
from support.comparing import drawn
from support.in_numpy import as_complex, speeds

import diffprog as dp

X = drawn(2, 5, 8)


def check(rope, wanted, x=X, positions=None):
    with jax.enable_x64(True):
        at = None if positions is None else jnp.asarray(positions)
        np.testing.assert_allclose(rope(jnp.asarray(x), at), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_pairs_are_rotated_as_complex_numbers(base, interleaved):
    rope = dp.rotary(base, interleaved=interleaved)
    check(rope, as_complex(X, np.arange(5), speeds(8, base), interleaved))
    at = np.array([[3, 0, 7, 1, 1], [900, 0, 2, 5, -4]])
    check(rope, as_complex(X, at, speeds(8, base), interleaved), positions=at)


def test_positions_broadcast_over_the_leading_axes():
    at = np.array([[3], [8]])  # one for each example
    check(dp.rotary(), as_complex(X, np.broadcast_to(at, (2, 5)), speeds(8)), positions=at)
    check(dp.rotary(), as_complex(X[0], np.arange(5), speeds(8)), X[0])


@pytest.mark.slow
def test_only_the_first_features_are_rotated():
    wanted = X.copy()
    wanted[..., :4] = as_complex(X[..., :4], np.arange(5), speeds(4))
    check(dp.rotary(features=4), wanted)
    check(dp.rotary(features=8), as_complex(X, np.arange(5), speeds(8)))
    assert dp.rotary(features=2)(jnp.ones((0, 3, 4))).shape == (0, 3, 4)


@pytest.mark.parametrize("rope", [
    dp.rotary(), dp.rotary(interleaved=True), dp.rotary(features=6),
    dp.rotary(scaling=dp.rope.llama3_scaling(8.0, 64))], ids=repr)
def test_products_depend_on_the_distance_alone_and_norms_are_kept(rope):
    q, k = (jnp.asarray(drawn(8, seed=seed), jnp.float32) for seed in (1, 2))
    far, distance = np.array([[0], [5], [1000], [1_000_000]]), np.array([[0, 1, 7, 300]])
    shape = (4, 4, 8)
    queries = np.asarray(rope(jnp.broadcast_to(q, shape), jnp.asarray(far + distance)))
    keys = np.asarray(rope(jnp.broadcast_to(k, shape), jnp.asarray(far)))
    products = (queries * keys).sum(-1)
    np.testing.assert_allclose(products[1:], products[[0, 0, 0]], rtol=0, atol=5e-6)
    assert np.ptp(products[0]) > 0.1
    np.testing.assert_allclose(np.linalg.norm(queries, axis=-1), np.linalg.norm(q), rtol=1e-6)


def test_position_zero_changes_nothing():
    np.testing.assert_array_equal(dp.rotary()(jnp.asarray(X))[:, 0], jnp.asarray(X)[:, 0])


def test_rotation_is_float32_and_returned_in_the_dtype_of_x():
    x = jnp.asarray(X, jnp.bfloat16)
    y = dp.rotary()(x)
    assert y.dtype == jnp.bfloat16
    wanted = dp.rotary()(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(wanted, np.float32))
    far = jnp.arange(5, dtype=jnp.int32) + 100_000
    exact = as_complex(X, np.arange(5) + 100_000, speeds(8))
    np.testing.assert_allclose(dp.rotary()(jnp.asarray(X), far), exact, rtol=0, atol=5e-4)


def test_gradients_agree():
    dp.gradients.check_gradients(dp.rotary(features=2), X[0, :, :4])


# Repr and equality.

ROPES = [
    "rotary()", "rotary(base=500000.0, features=4)", "rotary(interleaved=True)",
    "rotary(scaling=linear_scaling(2.0))", "rotary(scaling=ntk_scaling(2.0))",
    "rotary(scaling=yarn_scaling(4.0, 2048, beta_fast=16))",
    "rotary(scaling=llama3_scaling(8.0, 8192))",
    "rotary(scaling=longrope_scaling((1.0, 2.0), 4096, factor=2.0))",
]


@pytest.mark.parametrize("text", ROPES)
def test_repr_is_the_call_and_equal_settings_are_equal(text):
    one, other = (eval(text, by_name()) for _ in range(2))
    assert repr(one) == text
    assert one == other and hash(one) == hash(other) and one is not other
    jax.jit(lambda x, rope: rope(x), static_argnums=1)(jnp.ones((3, 4)), one)


def test_ropes_of_other_settings_differ():
    assert len({eval(t, by_name()) for t in ROPES}) == len(ROPES)
