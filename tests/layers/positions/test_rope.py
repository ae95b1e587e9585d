"""Scaling rules of rotary positions against their papers, pair by pair."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import drawn
from support.in_numpy import as_complex, speeds
from support.refusing import expect

import diffprog as dp

X = drawn(2, 5, 8)


def check(rope, wanted, x=X, positions=None):
    with jax.enable_x64(True):
        at = None if positions is None else jnp.asarray(positions)
        np.testing.assert_allclose(rope(jnp.asarray(x), at), wanted, rtol=0, atol=1e-12)


def of(rule, base, dims):
    found, magnitude = rule(base, dims)
    assert found.shape == (dims // 2,)
    return found, magnitude


def test_linear_and_ntk_scaling():
    found, magnitude = of(dp.rope.linear_scaling(4.0), 500.0, 16)
    np.testing.assert_allclose(found, speeds(16, 500.0) / 4, rtol=1e-14)
    assert magnitude == 1
    check(dp.rotary(scaling=dp.rope.linear_scaling(4.0)),  # equals positions divided by 4
          as_complex(X, np.arange(5) / 4, speeds(8)))
    found, magnitude = of(dp.rope.ntk_scaling(4.0), 500.0, 16)
    np.testing.assert_allclose(found, speeds(16, 500.0 * 4 ** (16 / 14)), rtol=1e-14)
    np.testing.assert_allclose(found[[0, -1]], speeds(16, 500.0)[[0, -1]] / [1, 4], rtol=1e-14)
    assert magnitude == 1
    assert of(dp.rope.ntk_scaling(4.0), 500.0, 2)[0] == 1


# Pair -> frequency for base 10000, 128 features, 2048 steps and factor 10, from the tests of
# Hugging Face transformers (tests/utils/test_modeling_rope_utils.py).
YARN = {0: 1.0, 8: 3.1623e-01, 16: 1.0e-01, 17: 8.3479e-02, 20: 4.8136e-02, 28: 1.0101e-02,
        36: 1.5746e-03, 40: 4.3007e-04, 41: 2.7384e-04, 50: 7.4989e-05, 63: 1.1548e-05}
LLAMA3 = {0: 1.0, 8: 3.1623e-01, 30: 1.3335e-02, 31: 1.0730e-02, 32: 7.7785e-03, 35: 2.8248e-03,
          39: 5.7363e-04, 40: 3.4539e-04, 41: 2.7384e-04, 50: 7.4989e-05, 63: 1.1548e-05}


@pytest.mark.parametrize(("rule", "published", "magnitude"), [
    (dp.rope.yarn_scaling(10.0, 2048), YARN, 0.1 * math.log(10) + 1),
    (dp.rope.llama3_scaling(10.0, 2048), LLAMA3, 1.0),
])
def test_frequencies_equal_the_published_ones(rule, published, magnitude):
    found, got = of(rule, 10000.0, 128)
    np.testing.assert_allclose(found[list(published)], list(published.values()), rtol=5e-5)
    assert got == magnitude


def test_llama3_scaling_pair_by_pair():
    """The three cases of the code released with Llama 3.1, by wavelength."""
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
    found, _ = of(dp.rope.llama3_scaling(8.0, 8192), 500000.0, 128)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert len({round(w / f, 6) for w, f in zip(wanted, speeds(128, 500000.0), strict=True)}) > 5


@pytest.mark.parametrize(("dims", "base", "length", "factor", "fast", "slow"), [
    (64, 1e4, 4096, 16.0, 32, 1), (16, 5e5, 256, 2.0, 8, 2)])
def test_yarn_scaling_pair_by_pair(dims, base, length, factor, fast, slow):
    def pair(turns, dims, base, length):
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair(fast, dims, base, length)), 0)
    high = min(math.ceil(pair(slow, dims, base, length)), dims - 1)
    wanted = []
    for i, f in enumerate(speeds(dims, base)):
        kept = 1 - min(max((i - low) / (high - low), 0), 1)
        wanted.append(f / factor * (1 - kept) + f * kept)
    rule = dp.rope.yarn_scaling(factor, length, beta_fast=fast, beta_slow=slow)
    np.testing.assert_allclose(of(rule, base, dims)[0], wanted, rtol=1e-12)


def test_yarn_scaling_at_its_limits():
    assert of(dp.rope.yarn_scaling(4.0, 64, attention_factor=0.5), 1e4, 8)[1] == 0.5
    assert of(dp.rope.yarn_scaling(0.5, 64), 1e4, 8)[1] == 1
    step, _ = of(dp.rope.yarn_scaling(4.0, 2, beta_fast=1.0), 1e4, 4)  # first == last
    np.testing.assert_allclose(step, speeds(4) / [1, 4])


def test_longrope_scaling():
    rule = dp.rope.longrope_scaling([1.0, 2.0, 3.0, 4.0], 4096, 32.0)
    found, magnitude = of(rule, 10000.0, 8)
    np.testing.assert_allclose(found, speeds(8) / [1, 2, 3, 4], rtol=1e-14)
    assert magnitude == math.sqrt(1 + math.log(32) / math.log(4096))
    wanted = as_complex(X, np.arange(5), found, magnitude=magnitude)
    check(dp.rotary(scaling=rule), wanted)
    assert of(dp.rope.longrope_scaling((1, 1), 4096), 1e4, 4)[1] == 1
    assert of(dp.rope.longrope_scaling((1, 1), 4096, 2.0, attention_factor=0.7), 1e4, 4)[1] == 0.7


def test_a_custom_rule():
    rope = dp.rotary(scaling=lambda base, features: (np.full(features // 2, 3.0), 2.0))
    check(rope, as_complex(X, np.arange(5), np.full(4, 3.0), magnitude=2.0))


@pytest.mark.parametrize("factor", [0.0, -1, "4", True, None])
@pytest.mark.parametrize("make", [
    dp.rope.linear_scaling, dp.rope.ntk_scaling, lambda f: dp.rope.yarn_scaling(f, 8),
    lambda f: dp.rope.llama3_scaling(f, 8), lambda f: dp.rope.longrope_scaling((1,), 8, f),
], ids=["linear", "ntk", "yarn", "llama3", "longrope"])
def test_a_factor_that_is_not_positive_raises(make, factor):
    expect("", f"wants factor as a positive number, got {factor!r}; pass 8.0, for example",
           make, factor)


def test_other_invalid_settings_of_rules_raise():
    expect("", "wants original_length as a positive number, got 0; pass 8.0, for example",
           dp.rope.yarn_scaling, 2.0, 0)
    expect("", "wants factors[1] as a positive number, got 0; pass 8.0, for example",
           dp.rope.longrope_scaling, (1, 0), 8)
    expect("", "wants low_frequency_factor below high_frequency_factor, got "
           "llama3_scaling(2.0, 64, low_frequency_factor=4); pass 1 and 4, those of Llama 3.1",
           dp.rope.llama3_scaling, 2.0, 64, 4)
    rope = dp.rotary(scaling=dp.rope.longrope_scaling((1.0, 2.0), 64))
    expect("", "wants 4 factors, one for each pair, got 2; pass the factors "
           "that were searched for heads of this size",
           rope, jnp.asarray(X))
