"""Norms against numpy in float64: which axes, which divisor, and what is remembered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

EPS = 1e-3  # large, so that its place in the formula shows


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(2.0, 3.0, size=shape)


def standardized(x, mean, var, scale=1.0, bias=0.0, eps=EPS):
    return scale * (x - mean) / np.sqrt(var + eps) + bias


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3)])
def test_layer_norm_standardizes_each_vector(leading):
    x = drawn(*leading, 5)
    scale, bias = drawn(5, seed=1), drawn(5, seed=2)
    wanted = np.zeros_like(x)
    for i in np.ndindex(*leading):
        mean = sum(x[i]) / 5
        var = sum((v - mean) ** 2 for v in x[i]) / 5
        wanted[i] = standardized(x[i], mean, var, scale, bias)
    with jax.enable_x64(True):
        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        y = dp.layer_norm(eps=EPS)(params, jnp.asarray(x))
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)


def test_layer_norm_without_scale_or_bias():
    x, factor = drawn(3, 5), drawn(5, seed=1)
    plain = standardized(x, x.mean(-1, keepdims=True), x.var(-1, keepdims=True))
    with jax.enable_x64(True):
        given = jnp.asarray(factor)
        for options, params, wanted in (
            (dict(bias=False), {"scale": given}, plain * factor),
            (dict(scale=False), {"bias": given}, plain + factor),
            (dict(scale=False, bias=False), {}, plain),
        ):
            norm = dp.layer_norm(eps=EPS, **options)
            assert set(norm.init(jax.random.key(0), jnp.asarray(x))[0]) == set(params)
            np.testing.assert_allclose(norm(params, jnp.asarray(x)), wanted, rtol=0, atol=1e-12)


def test_norms_begin_with_ones_and_zeros():
    x = jnp.ones((2, 3))
    for norm in (dp.layer_norm(), dp.batch_norm()):
        params, state = norm.init(jax.random.key(0), x)
        assert {name: leaf.tolist() for name, leaf in params.items()} == {
            "scale": [1.0] * 3, "bias": [0.0] * 3}
    assert {name: leaf.tolist() for name, leaf in state.items()} == {
        "mean": [0.0] * 3, "var": [1.0] * 3}


def by_channel(x):
    """Mean and biased variance of each channel, by one loop over the channels."""
    columns = [x[..., c].ravel() for c in range(x.shape[-1])]
    mean = np.array([sum(v) / len(v) for v in columns])
    var = np.array([sum((v - m) ** 2) / len(v) for v, m in zip(columns, mean, strict=True)])
    return mean, var, len(columns[0])


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 3)])
def test_batch_norm_in_training(shape):
    x = drawn(*shape)
    scale, bias, old_mean, old_var = (drawn(3, seed=seed) for seed in (1, 2, 3, 4))
    mean, var, n = by_channel(x)
    with jax.enable_x64(True):
        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        state = {"mean": jnp.asarray(old_mean), "var": jnp.asarray(old_var)}
        y, new = dp.batch_norm(eps=EPS).apply(params, state, jnp.asarray(x), train=True)
        np.testing.assert_allclose(y, standardized(x, mean, var, scale, bias), rtol=0, atol=1e-12)
        np.testing.assert_allclose(new["mean"], 0.9 * old_mean + 0.1 * mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            new["var"], 0.9 * old_var + 0.1 * var * n / (n - 1), rtol=0, atol=1e-12)


def test_batch_norm_at_rest_uses_what_it_remembers():
    x = drawn(2, 4, 3)
    scale, bias, mean, var = (np.abs(drawn(3, seed=seed)) for seed in (1, 2, 3, 4))
    with jax.enable_x64(True):
        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        state = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
        y, new = dp.batch_norm(eps=EPS).apply(params, state, jnp.asarray(x))
        np.testing.assert_allclose(y, standardized(x, mean, var, scale, bias), rtol=0, atol=1e-12)
        assert {name: leaf.tolist() for name, leaf in new.items()} == {
            "mean": mean.tolist(), "var": var.tolist()}


@pytest.mark.parametrize(("momentum", "steps"), [(0.0, 1), (0.75, 3)])
def test_momentum_is_the_share_that_is_kept(momentum, steps):
    norm = dp.batch_norm(momentum=momentum, scale=False, bias=False)
    wanted_mean, wanted_var = np.zeros(2), np.ones(2)
    with jax.enable_x64(True):
        params, state = norm.init(jax.random.key(0), jnp.ones((4, 2), jnp.float64))
        for step in range(steps):
            x = drawn(4, 2, seed=step)
            mean, var, n = by_channel(x)
            wanted_mean = momentum * wanted_mean + (1 - momentum) * mean
            wanted_var = momentum * wanted_var + (1 - momentum) * var * n / (n - 1)
            _, state = norm.apply(params, state, jnp.asarray(x), train=True)
        np.testing.assert_allclose(state["mean"], wanted_mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state["var"], wanted_var, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (1, 1, 1, 3)])
def test_one_value_per_channel_has_no_variance(shape):
    norm, x = dp.batch_norm(), jnp.ones(shape)
    params, state = norm.init(jax.random.key(0), x)
    with pytest.raises(dp.LayerError, match="several values per channel"):
        norm.apply(params, state, x, train=True)
    assert norm(params, x, state=state).shape == shape  # at rest one value will do


def test_no_gradient_flows_through_the_running_statistics():
    norm, x = dp.batch_norm(), jnp.asarray(drawn(4, 2))
    params, state = norm.init(jax.random.key(0), x)

    def total(x):
        _, new = norm.apply(params, state, x, train=True)
        return new["mean"].sum() + new["var"].sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(x), np.zeros((4, 2)))


def test_the_gradient_flows_through_the_statistics_of_the_batch():
    norm, x = dp.batch_norm(), jnp.asarray(drawn(4, 2))
    params, state = norm.init(jax.random.key(0), x)
    total = lambda x: (norm.apply(params, state, x, train=True)[0] ** 3)[0].sum()  # noqa: E731
    # Shifting all examples together changes nothing, so the gradients of each channel add to 0.
    grads = np.asarray(jax.jit(jax.grad(total))(x))
    assert np.abs(grads).max() > 0.01
    np.testing.assert_allclose(grads.sum(0), np.zeros(2), atol=1e-5)


def test_a_large_mean_costs_no_accuracy():
    # The mean of squares minus the square of the mean would be off by a hundred per cent here.
    x = np.random.default_rng(0).normal(1e4, 1.0, (200, 64)).astype(np.float32)
    wide = x.astype(np.float64)
    wanted = standardized(wide, wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True), eps=1e-5)
    norm = dp.layer_norm()
    params, _ = norm.init(jax.random.key(0), x)
    np.testing.assert_allclose(norm(params, jnp.asarray(x)), wanted, atol=5e-3)
    norm = dp.batch_norm(momentum=0.0)
    params, state = norm.init(jax.random.key(0), x)
    y, state = norm.apply(params, state, jnp.asarray(x), train=True)
    np.testing.assert_allclose(y, standardized(wide, wide.mean(0), wide.var(0), eps=1e-5),
                               atol=5e-3)
    np.testing.assert_allclose(state["var"], wide.var(0, ddof=1), rtol=1e-3)


def test_bfloat16_keeps_its_statistics_in_float32():
    x = jnp.asarray(drawn(64, 8), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    norm = dp.layer_norm()
    params, _ = norm.init(jax.random.key(0), x)
    y = norm(params, x)
    assert y.dtype == jnp.bfloat16
    wanted = standardized(wide, wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True), eps=1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=0.004, atol=0.004)
    norm = dp.batch_norm()
    params, state = norm.init(jax.random.key(0), x)
    y, state = norm.apply(params, state, x, train=True)
    assert (y.dtype, state["mean"].dtype, state["var"].dtype) == (
        jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(state["mean"], 0.1 * wide.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state["var"], 0.9 + 0.1 * wide.var(0, ddof=1), rtol=1e-5)


def test_a_constant_channel_becomes_the_bias():
    x = jnp.full((5, 3), 7.0)
    for norm in (dp.layer_norm(), dp.batch_norm()):
        params, state = norm.init(jax.random.key(0), x)
        params["bias"] = jnp.array([1.0, 2.0, 3.0])
        y, _ = norm.apply(params, state, x, train=True)
        np.testing.assert_array_equal(y, np.tile([1.0, 2.0, 3.0], (5, 1)))


def test_parameters_of_one_feature_are_not_broadcast():
    narrow, wide = jnp.ones((2, 1)), jnp.ones((2, 4))
    for norm in (dp.layer_norm(), dp.layer_norm(bias=False), dp.layer_norm(scale=False),
                 dp.batch_norm(), dp.batch_norm(scale=False, bias=False)):
        params, state = norm.init(jax.random.key(0), narrow)
        for train in (False, True):
            with pytest.raises(dp.LayerError, match="1 features"):
                norm.apply(params, state, wide, train=train)
    params, _ = dp.batch_norm().init(jax.random.key(0), narrow)
    _, state = dp.batch_norm().init(jax.random.key(0), wide)
    with pytest.raises(dp.LayerError, match="1 features"):
        dp.batch_norm()(params, wide, state=state)


def test_statistics_of_one_feature_are_not_broadcast():
    norm, wide = dp.batch_norm(), jnp.ones((2, 4))
    params, _ = norm.init(jax.random.key(0), wide)
    _, state = norm.init(jax.random.key(0), jnp.ones((2, 1)))
    for train in (False, True):
        with pytest.raises(dp.LayerError, match="1 features"):
            norm.apply(params, state, wide, train=train)


@pytest.mark.parametrize("make", [dp.layer_norm, dp.batch_norm])
def test_what_cannot_be_is_refused(make):
    for eps in (0.0, -1e-5, 1):
        with pytest.raises(dp.LayerError, match="eps"):
            make(eps=eps)
    norm = make()
    for x in (jnp.ones(()), jnp.ones((2, 3), jnp.int32)):
        with pytest.raises(dp.LayerError):
            norm.init(jax.random.key(0), x)


@pytest.mark.parametrize("make", [dp.layer_norm, dp.batch_norm])
def test_integers_are_refused_and_not_rounded(make):
    norm = make()
    params, state = norm.init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(dp.LayerError, match="floating-point"):
        norm(params, jnp.array([[1, 2, 3], [4, 0, 0]]), state=state)


def test_batch_norm_wants_its_state_and_a_share():
    params, _ = dp.batch_norm().init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(dp.LayerError, match="state"):
        dp.batch_norm()(params, jnp.ones((2, 3)))
    for momentum in (1.0, -0.1, 1):
        with pytest.raises(dp.LayerError, match="momentum"):
            dp.batch_norm(momentum=momentum)
