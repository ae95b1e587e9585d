"""Rotary positions: complex numbers in NumPy, and rules for long sequences from their papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import drawn
from refusing import expect

import diffprog as dp

X = drawn(2, 5, 8)


def turned(x, positions, speeds, interleaved=False, magnitude=1.0):
    """Each pair as a complex number, multiplied by ``exp(i t f)``; x (..., time, features)."""
    pairs = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (
        slice(0, pairs), slice(pairs, None))
    z = x[..., first] + 1j * x[..., second]
    z = z * np.exp(1j * np.asarray(positions)[..., None] * speeds) * magnitude
    y = np.zeros_like(x)
    y[..., first], y[..., second] = z.real, z.imag
    return y


def speeds(dims, base=10000.0):
    return np.array([base ** (-2 * i / dims) for i in range(dims // 2)])


def gives(rope, wanted, x=X, positions=None):
    with jax.enable_x64(True):
        at = None if positions is None else jnp.asarray(positions)
        np.testing.assert_allclose(rope(jnp.asarray(x), at), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_pairs_are_turned_as_complex_numbers(base, interleaved):
    rope = dp.rotary(base, interleaved=interleaved)
    gives(rope, turned(X, np.arange(5), speeds(8, base), interleaved))
    at = np.array([[3, 0, 7, 1, 1], [900, 0, 2, 5, -4]])
    gives(rope, turned(X, at, speeds(8, base), interleaved), positions=at)


def test_positions_broadcast_over_the_leading_axes():
    at = np.array([[3], [8]])  # one for each example, whatever the axis of x is
    gives(dp.rotary(), turned(X, np.broadcast_to(at, (2, 5)), speeds(8)), positions=at)
    gives(dp.rotary(), turned(X[0], np.arange(5), speeds(8)), X[0])


def test_only_the_first_features_turn():
    wanted = X.copy()
    wanted[..., :4] = turned(X[..., :4], np.arange(5), speeds(4))
    gives(dp.rotary(features=4), wanted)
    gives(dp.rotary(features=8), turned(X, np.arange(5), speeds(8)))
    assert dp.rotary(features=2)(jnp.ones((0, 3, 4))).shape == (0, 3, 4)


@pytest.mark.parametrize("rope", [
    dp.rotary(), dp.rotary(interleaved=True), dp.rotary(features=6),
    dp.rotary(scaling=dp.llama3_scaling(8.0, 64))], ids=repr)
def test_products_depend_on_the_distance_alone_and_lengths_are_kept(rope):
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


def test_it_computes_in_float32_and_gives_the_dtype_of_x():
    x = jnp.asarray(X, jnp.bfloat16)
    y = dp.rotary()(x)
    assert y.dtype == jnp.bfloat16
    wanted = dp.rotary()(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(wanted, np.float32))
    far = jnp.arange(5, dtype=jnp.int32) + 100_000
    exact = turned(X, np.arange(5) + 100_000, speeds(8))
    np.testing.assert_allclose(dp.rotary()(jnp.asarray(X), far), exact, rtol=0, atol=5e-4)


def test_gradients_agree():
    dp.check_gradients(dp.rotary(features=2), X[0, :, :4])


# Rules for long sequences.

def of(rule, base, dims):
    found, magnitude = rule(base, dims)
    assert found.shape == (dims // 2,)
    return found, magnitude


def test_linear_and_ntk_scaling():
    found, magnitude = of(dp.linear_scaling(4.0), 500.0, 16)
    np.testing.assert_allclose(found, speeds(16, 500.0) / 4, rtol=1e-14)
    assert magnitude == 1
    gives(dp.rotary(scaling=dp.linear_scaling(4.0)),  # as if the positions were 4 times nearer
          turned(X, np.arange(5) / 4, speeds(8)))
    found, magnitude = of(dp.ntk_scaling(4.0), 500.0, 16)
    np.testing.assert_allclose(found, speeds(16, 500.0 * 4 ** (16 / 14)), rtol=1e-14)
    np.testing.assert_allclose(found[[0, -1]], speeds(16, 500.0)[[0, -1]] / [1, 4], rtol=1e-14)
    assert magnitude == 1
    assert of(dp.ntk_scaling(4.0), 500.0, 2)[0] == 1


# Pair -> frequency, for a base of 10000, 128 dims, 2048 steps and a factor of 10, in the tests of
# Hugging Face transformers (tests/utils/test_modeling_rope_utils.py).
YARN = {0: 1.0, 8: 3.1623e-01, 16: 1.0e-01, 17: 8.3479e-02, 20: 4.8136e-02, 28: 1.0101e-02,
        36: 1.5746e-03, 40: 4.3007e-04, 41: 2.7384e-04, 50: 7.4989e-05, 63: 1.1548e-05}
LLAMA3 = {0: 1.0, 8: 3.1623e-01, 30: 1.3335e-02, 31: 1.0730e-02, 32: 7.7785e-03, 35: 2.8248e-03,
          39: 5.7363e-04, 40: 3.4539e-04, 41: 2.7384e-04, 50: 7.4989e-05, 63: 1.1548e-05}


@pytest.mark.parametrize(("rule", "published", "magnitude"), [
    (dp.yarn_scaling(10.0, 2048), YARN, 0.1 * math.log(10) + 1),
    (dp.llama3_scaling(10.0, 2048), LLAMA3, 1.0),
])
def test_frequencies_are_the_published_ones(rule, published, magnitude):
    found, got = of(rule, 10000.0, 128)
    np.testing.assert_allclose(found[list(published)], list(published.values()), rtol=5e-5)
    assert got == magnitude


def test_llama3_scaling_pair_by_pair():
    """The three cases of the code released with Llama 3.1, by wavelength, and its numbers."""
    wanted = []
    for f in speeds(128, 500000.0):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            wanted.append(f)
        elif wavelength > 8192 / 1:
            wanted.append(f / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            wanted.append((1 - smooth) * f / 8 + smooth * f)
    found, _ = of(dp.llama3_scaling(8.0, 8192), 500000.0, 128)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert len({round(w / f, 6) for w, f in zip(wanted, speeds(128, 500000.0), strict=True)}) > 5


def test_yarn_scaling_pair_by_pair():
    def pair(turns, dims, base, length):
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    for dims, base, length, factor, fast, slow in ((64, 1e4, 4096, 16.0, 32, 1),
                                                   (16, 5e5, 256, 2.0, 8, 2)):
        low = max(math.floor(pair(fast, dims, base, length)), 0)
        high = min(math.ceil(pair(slow, dims, base, length)), dims - 1)
        wanted = []
        for i, f in enumerate(speeds(dims, base)):
            kept = 1 - min(max((i - low) / (high - low), 0), 1)
            wanted.append(f / factor * (1 - kept) + f * kept)
        rule = dp.yarn_scaling(factor, length, beta_fast=fast, beta_slow=slow)
        np.testing.assert_allclose(of(rule, base, dims)[0], wanted, rtol=1e-12)
    assert of(dp.yarn_scaling(4.0, 64, attention_factor=0.5), 1e4, 8)[1] == 0.5
    assert of(dp.yarn_scaling(0.5, 64), 1e4, 8)[1] == 1
    step, _ = of(dp.yarn_scaling(4.0, 2, beta_fast=1.0), 1e4, 4)  # no pair between fast and slow
    np.testing.assert_allclose(step, speeds(4) / [1, 4])


def test_longrope_scaling():
    rule = dp.longrope_scaling([1.0, 2.0, 3.0, 4.0], 4096, 32.0)
    found, magnitude = of(rule, 10000.0, 8)
    np.testing.assert_allclose(found, speeds(8) / [1, 2, 3, 4], rtol=1e-14)
    assert magnitude == math.sqrt(1 + math.log(32) / math.log(4096))
    wanted = turned(X, np.arange(5), found, magnitude=magnitude)
    gives(dp.rotary(scaling=rule), wanted)
    assert of(dp.longrope_scaling((1, 1), 4096), 1e4, 4)[1] == 1
    assert of(dp.longrope_scaling((1, 1), 4096, 2.0, attention_factor=0.7), 1e4, 4)[1] == 0.7


def test_a_rule_of_ones_own():
    rope = dp.rotary(scaling=lambda base, features: (np.full(features // 2, 3.0), 2.0))
    gives(rope, turned(X, np.arange(5), np.full(4, 3.0), magnitude=2.0))


# Values.

ROPES = [
    "rotary()", "rotary(base=500000.0, features=4)", "rotary(interleaved=True)",
    "rotary(scaling=linear_scaling(2.0))", "rotary(scaling=ntk_scaling(2.0))",
    "rotary(scaling=yarn_scaling(4.0, 2048, beta_fast=16))",
    "rotary(scaling=llama3_scaling(8.0, 8192))",
    "rotary(scaling=longrope_scaling((1.0, 2.0), 4096, factor=2.0))",
]


def test_they_are_shown_as_code_and_are_equal_if_made_of_equal_numbers():
    for text in ROPES:
        one, other = (eval(text, dict(vars(dp), **{n: getattr(dp, n) for n in dp.__all__}))
                      for _ in range(2))
        assert repr(one) == text
        assert one == other and hash(one) == hash(other) and one is not other
        jax.jit(lambda x, rope: rope(x), static_argnums=1)(jnp.ones((3, 4)), one)
    assert len({eval(t, {n: getattr(dp, n) for n in dp.__all__}) for t in ROPES}) == len(ROPES)


def test_rules_that_cannot_be_are_refused():
    for make in (dp.linear_scaling, dp.ntk_scaling, lambda f: dp.yarn_scaling(f, 8),
                 lambda f: dp.llama3_scaling(f, 8), lambda f: dp.longrope_scaling((1,), 8, f)):
        for wrong in (0.0, -1, "4", True, None):
            expect("", f"wants factor as a positive number, got {wrong!r}; pass 8.0, for example",
                   make, wrong)
