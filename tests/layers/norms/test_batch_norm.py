"""`batch_norm` against NumPy in float64: axes, divisors, running statistics, masks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.in_numpy import EPS, standardized
from support.in_numpy import off_centre as drawn
from support.refusing import expect

import diffprog as dp

KEY = jax.random.key(0)


def by_channel(x):
    """Mean and biased variance of each channel, by one loop over the channels."""
    columns = [x[..., c].ravel() for c in range(x.shape[-1])]
    mean = np.array([sum(v) / len(v) for v in columns])
    var = np.array([sum((v - m) ** 2) / len(v) for v, m in zip(columns, mean, strict=True)])
    return mean, var, len(columns[0])


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 3)])
def test_training_equals_the_formula(shape):
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


def test_inference_uses_the_running_statistics():
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
def test_momentum_is_the_fraction_that_is_kept(momentum, steps):
    norm = dp.batch_norm(momentum=momentum, scale=False, bias=False)
    wanted_mean, wanted_var = np.zeros(2), np.ones(2)
    with jax.enable_x64(True):
        params, state = norm.init(KEY, jnp.ones((4, 2), jnp.float64))
        for step in range(steps):
            x = drawn(4, 2, seed=step)
            mean, var, n = by_channel(x)
            wanted_mean = momentum * wanted_mean + (1 - momentum) * mean
            wanted_var = momentum * wanted_var + (1 - momentum) * var * n / (n - 1)
            _, state = norm.apply(params, state, jnp.asarray(x), train=True)
        np.testing.assert_allclose(state["mean"], wanted_mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state["var"], wanted_var, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (1, 1, 1, 3)])
def test_training_on_one_value_per_channel_raises(shape):
    norm, x = dp.batch_norm(), jnp.ones(shape)
    params, state = norm.init(KEY, x)
    with pytest.raises(dp.LayerError, match="several values per channel"):
        norm.apply(params, state, x, train=True)
    assert norm(params, x, state=state).shape == shape  # inference takes one value


def test_no_gradient_flows_through_the_running_statistics():
    norm, x = dp.batch_norm(), jnp.asarray(drawn(4, 2))
    params, state = norm.init(KEY, x)

    def total(x):
        _, new = norm.apply(params, state, x, train=True)
        return new["mean"].sum() + new["var"].sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(x), np.zeros((4, 2)))


def test_the_gradient_flows_through_the_statistics_of_the_batch():
    norm, x = dp.batch_norm(), jnp.asarray(drawn(4, 2))
    params, state = norm.init(KEY, x)
    total = lambda x: (norm.apply(params, state, x, train=True)[0] ** 3)[0].sum()  # noqa: E731
    # A shift of all examples changes nothing, so the gradients of each channel sum to 0.
    grads = np.asarray(jax.jit(jax.grad(total))(x))
    assert np.abs(grads).max() > 0.01
    np.testing.assert_allclose(grads.sum(0), np.zeros(2), atol=1e-5)


@pytest.mark.slow
def test_a_large_mean_costs_no_accuracy():
    # The mean of squares minus the square of the mean would be off by a hundred per cent here.
    x = np.random.default_rng(0).normal(1e4, 1.0, (200, 64)).astype(np.float32)
    wide = x.astype(np.float64)
    norm = dp.batch_norm(momentum=0.0)
    params, state = norm.init(KEY, x)
    y, state = norm.apply(params, state, jnp.asarray(x), train=True)
    np.testing.assert_allclose(y, standardized(wide, wide.mean(0), wide.var(0), eps=1e-5),
                               atol=5e-3)
    np.testing.assert_allclose(state["var"], wide.var(0, ddof=1), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("side", [{}, {"mask": np.ones(64, bool)}], ids=["all", "masked"])
def test_bfloat16_keeps_its_statistics_in_float32(side):
    x = jnp.asarray(drawn(64, 8), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    norm = dp.batch_norm()
    params, state = norm.init(KEY, x)
    y, new = norm.apply(params, state, x, train=True, **side)
    assert (y.dtype, new["mean"].dtype, new["var"].dtype) == (
        jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(new["mean"], 0.1 * wide.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * wide.var(0, ddof=1), rtol=1e-5)


def test_initial_values_and_the_output_of_a_constant_channel():
    norm, x = dp.batch_norm(), jnp.full((5, 3), 7.0)
    params, state = norm.init(KEY, x)
    assert {name: leaf.tolist() for name, leaf in (params | state).items()} == {
        "scale": [1.0] * 3, "bias": [0.0] * 3, "mean": [0.0] * 3, "var": [1.0] * 3}
    params["bias"] = jnp.array([1.0, 2.0, 3.0])
    y, _ = norm.apply(params, state, x, train=True)
    np.testing.assert_array_equal(y, np.tile([1.0, 2.0, 3.0], (5, 1)))


# Masks.

MASKS = {
    "examples": np.array([True, False, True, True]),
    "steps": np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool),
    "places": np.random.default_rng(5).random((4, 3, 2)) < 0.5,
}


def trained(x, mask, dtype=jnp.float64):
    """Output, state and gradients of a training call with drawn parameters and statistics."""
    norm = dp.batch_norm(eps=EPS)
    params = {"scale": jnp.asarray(drawn(2, seed=1), dtype),
              "bias": jnp.asarray(drawn(2, seed=2), dtype)}
    state = {"mean": jnp.asarray(drawn(2, seed=3), dtype),
             "var": jnp.asarray(drawn(2, seed=4), dtype)}
    valid = True if mask is None else mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))

    @jax.jit
    def run(params, x):
        y, new = norm.apply(params, state, x, train=True, mask=mask)
        return jnp.where(valid, jnp.sin(y), 0).sum(), (y, new)

    (_, (y, new)), grads = jax.value_and_grad(run, (0, 1), has_aux=True)(params, x)
    return y, new, *grads


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("padding", [0.0, 1e6, np.nan, np.inf])
def test_a_masked_batch_is_the_batch_without_the_padding(mask, padding):
    x = drawn(4, 3, 2, 2)
    x[~mask] = padding
    with jax.enable_x64(True):
        y, state, dparams, dx = trained(jnp.asarray(x), jnp.asarray(mask))
        wanted = trained(jnp.asarray(x[mask].reshape(-1, 2)), None)
        np.testing.assert_allclose(np.asarray(y)[mask].reshape(-1, 2), wanted[0], atol=1e-12)
        np.testing.assert_allclose(np.asarray(dx)[mask].reshape(-1, 2), wanted[3], atol=1e-12)
        for name in ("mean", "var"):
            np.testing.assert_allclose(state[name], wanted[1][name], rtol=1e-12)
        for name in ("scale", "bias"):
            np.testing.assert_allclose(dparams[name], wanted[2][name], rtol=0, atol=1e-11)
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(np.asarray(dx)[~mask], 0)


def test_a_mask_of_true_equals_no_mask():
    x = jnp.asarray(drawn(4, 3, 2), jnp.float32)
    got, wanted = (trained(x, mask, jnp.float32) for mask in (jnp.ones((4, 3), bool), None))
    chex.assert_trees_all_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("valid", [0, 1])
def test_fewer_than_two_valid_entries_keep_the_statistics(valid):
    x = jnp.full((4, 2), jnp.nan).at[:valid].set(3.0)
    mask = jnp.arange(4) < valid
    norm = dp.batch_norm()
    params, _ = norm.init(KEY, x)
    state = {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([3.0, 4.0])}
    y, new = jax.jit(lambda x: norm.apply(params, state, x, train=True, mask=mask))(x)
    np.testing.assert_array_equal(y[:valid], 0)  # the bias
    for name in state:
        np.testing.assert_array_equal(new[name], state[name])
    grads = jax.grad(lambda p, x: norm.apply(p, state, x, train=True, mask=mask)[0].sum(), (0, 1))
    chex.assert_tree_all_finite((y, jax.jit(grads)(params, x)))


@pytest.mark.parametrize("train", [False, True])
def test_masked_outputs_are_zero(train):
    norm, mask = dp.batch_norm(bias_init="ones"), jnp.array([True, False, True])
    x = jnp.asarray(drawn(3, 2), jnp.float32).at[1].set(jnp.nan)
    params, state = norm.init(KEY, x)
    y, _ = norm.apply(params, state, x, train=train, mask=mask)
    np.testing.assert_array_equal(y[1], 0)
    assert np.asarray(y)[::2].all()


def test_in_inference_masked_entries_reach_no_gradient():
    norm, mask = dp.batch_norm(), jnp.array([True, False, True])
    x = jnp.asarray(drawn(3, 2), jnp.float32)
    params, state = norm.init(KEY, x)
    total = lambda p, x: jnp.where(  # noqa: E731
        mask[:, None], norm(p, x, state=state, mask=mask), 0).sum()
    slope = jax.jit(jax.grad(total, (0, 1)))
    got, wanted = (slope(params, x.at[1].set(masked)) for masked in (jnp.nan, 0))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert np.abs(got[1][0]).min() > 0
    np.testing.assert_array_equal(norm(params, x, state=state, mask=mask)[::2],
                                  norm(params, x, state=state)[::2])


# Errors.

@pytest.mark.parametrize("norm", [
    dp.batch_norm(), dp.batch_norm(scale=False, bias=False),
], ids=repr)
def test_parameters_of_one_feature_are_not_broadcast(norm):
    narrow, wide = jnp.ones((2, 1)), jnp.ones((2, 4))
    params, state = norm.init(KEY, narrow)
    for train in (False, True):
        with pytest.raises(dp.LayerError, match="1 feature "):
            norm.apply(params, state, wide, train=train)


def test_parameters_of_one_feature_with_statistics_of_several_raise():
    narrow, wide = jnp.ones((2, 1)), jnp.ones((2, 4))
    params, _ = dp.batch_norm().init(KEY, narrow)
    _, state = dp.batch_norm().init(KEY, wide)
    with pytest.raises(dp.LayerError, match="1 feature "):
        dp.batch_norm()(params, wide, state=state)


@pytest.mark.parametrize("train", [False, True])
def test_statistics_of_one_feature_are_not_broadcast(train):
    norm, wide = dp.batch_norm(), jnp.ones((2, 4))
    params, _ = norm.init(KEY, wide)
    _, state = norm.init(KEY, jnp.ones((2, 1)))
    with pytest.raises(dp.LayerError, match="1 feature "):
        norm.apply(params, state, wide, train=train)


def test_a_missing_state_raises():
    params, _ = dp.batch_norm().init(KEY, jnp.ones((2, 3)))
    with pytest.raises(dp.LayerError, match="state"):
        dp.batch_norm()(params, jnp.ones((2, 3)))


@pytest.mark.parametrize("momentum", [1.0, -0.1, 1])
def test_a_wrong_momentum_raises(momentum):
    with pytest.raises(dp.LayerError, match="momentum"):
        dp.batch_norm(momentum=momentum)


@pytest.mark.parametrize("eps", [0.0, -1e-5, 1])
def test_a_wrong_eps_raises(eps):
    with pytest.raises(dp.LayerError, match="eps"):
        dp.batch_norm(eps=eps)


@pytest.mark.parametrize("x", [
    np.ones((), np.float32), np.ones((2, 3), np.int32),
], ids=["scalar", "integers"])
def test_scalars_and_integers_raise_at_init(x):
    norm = dp.batch_norm()
    with pytest.raises(dp.LayerError):
        norm.init(KEY, x)


def test_integers_raise_at_inference():
    norm = dp.batch_norm()
    params, state = norm.init(KEY, jnp.ones((2, 3)))
    with pytest.raises(dp.LayerError, match="floating-point"):
        norm(params, jnp.array([[1, 2, 3], [4, 0, 0]]), state=state)


def test_a_mask_that_does_not_fit_raises():
    norm, x = dp.batch_norm(), jnp.ones((4, 3, 2))
    params, state = norm.init(KEY, x)
    path = "norm (batch_norm()): wants"
    net = dp.serial(norm=norm)
    for mask, message in (
        (jnp.ones((4, 3)), f"{path} a mask of booleans, got float32[4,3]"),
        (jnp.ones(3, bool), f"{path} a mask of the leading axes of (4, 3, 2), got bool[3]"),
        (jnp.ones((4, 3, 2), bool),
         f"{path} a mask of the leading axes of (4, 3, 2), got bool[4,3,2]"),
    ):
        for train in (False, True):
            expect("norm", message, net.apply, {"norm": params}, {"norm": state}, x, mask=mask,
                   train=train)
    expect("norm", f"{path} a mask of booleans, got float32[4,3]", net.init, KEY, x,
           mask=jnp.ones((4, 3)))
