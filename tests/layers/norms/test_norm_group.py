"""`group_norm` and `instance_norm` against loops over examples and groups; masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.in_numpy import EPS
from support.in_numpy import off_centre as drawn
from support.refusing import expect

import diffprog as dp

KEY = jax.random.key(0)


def by_groups(x, groups, dims, scale, bias):
    """The formula, one example and one group at a time."""
    y, size = np.zeros_like(x), x.shape[-1] // groups
    for i in np.ndindex(*x.shape[: x.ndim - dims - 1]):
        for g in range(groups):
            own = slice(g * size, (g + 1) * size)
            values = x[i][..., own]
            mean = sum(values.ravel()) / values.size
            var = sum((values.ravel() - mean) ** 2) / values.size
            y[i][..., own] = (values - mean) / np.sqrt(var + EPS) * scale[own] + bias[own]
    return y


SHAPES = [(0, (3, 6)), (0, (2, 4, 6)), (1, (3, 4, 6)), (1, (4, 6)), (2, (2, 3, 2, 6)),
          (2, (2, 2, 3, 2, 6)), (3, (2, 2, 3, 2, 6))]


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "shape"), SHAPES)
@pytest.mark.parametrize("groups", [
    2, *(pytest.param(groups, marks=pytest.mark.slow) for groups in (1, 6))])
def test_each_group_of_each_example_is_standardized(dims, shape, groups):
    x, scale, bias = drawn(*shape), drawn(6, seed=1), drawn(6, seed=2)
    if groups == 6 and not dims:  # each number alone
        with pytest.raises(dp.LayerError, match="several numbers in a group"):
            dp.group_norm(groups, dims=dims).plan(jnp.asarray(x))
        return
    wanted = by_groups(x, groups, dims, scale, bias)
    with jax.enable_x64(True):
        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        y = dp.group_norm(groups, dims=dims, eps=EPS)(params, jnp.asarray(x))
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-11)
        if groups == 6 and dims:
            y = dp.instance_norm(dims=dims, eps=EPS)(params, jnp.asarray(x))
            np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_one_group_with_dims_0_equals_layer_norm():
    x = jnp.asarray(drawn(3, 2, 5), jnp.float32)
    params, _ = dp.layer_norm().init(KEY, x)
    np.testing.assert_allclose(dp.group_norm(1, dims=0)(params, x), dp.layer_norm()(params, x),
                               rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "names"), [
    ({}, ["bias", "scale"]), ({"scale": False}, ["bias"]), ({"bias": False}, ["scale"]),
    ({"scale": False, "bias": False}, []),
], ids=str)
def test_scale_and_bias_have_one_entry_per_channel_and_are_optional(options, names):
    x = jnp.ones((2, 3, 3, 4))
    for norm in (dp.group_norm(2, **options), dp.instance_norm(**options)):
        params, state = norm.init(KEY, x)
        assert sorted(params) == names and state == {}
        assert {leaf.shape for leaf in params.values()} <= {(4,)}
        assert norm(params, x).shape == x.shape


def test_scale_and_bias_are_drawn_by_their_initializers():
    x = jnp.ones((2, 3, 3, 4))
    params, _ = dp.group_norm(2, scale_init="zeros", bias_init="ones").init(KEY, x)
    assert (params["scale"].tolist(), params["bias"].tolist()) == ([0.0] * 4, [1.0] * 4)


@pytest.mark.slow
def test_bfloat16_keeps_its_statistics_in_float32():
    x = jnp.asarray(drawn(4, 64, 4) + 20, jnp.bfloat16)
    norm = dp.group_norm(2, dims=1, eps=EPS)
    params, _ = norm.init(KEY, x)
    assert {leaf.dtype.name for leaf in params.values()} == {"float32"}
    y = norm(params, x)
    assert y.dtype == jnp.bfloat16
    wanted = by_groups(np.asarray(x, np.float64), 2, 1, np.ones(4), np.zeros(4))
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=0.005, atol=0.005)


# Masks.

MASKS = {
    "steps": np.array([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]], bool),
    "examples": np.array([True, False, True]),
}
NORMS = {"group_norm": dp.group_norm(2, dims=1, eps=EPS),
         "instance_norm": dp.instance_norm(dims=1, eps=EPS)}


@functools.partial(jax.jit, static_argnums=0)
def pulled(norm, params, x, cot, mask=None):
    """The output, and the cotangent pulled back to parameters and x."""
    y, back = jax.vjp(lambda p, x: norm(p, x, mask=mask), params, x)
    return y, *back(cot)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("padding", [1e6, np.nan, np.inf])
def test_only_valid_positions_count(norm, mask, padding):
    x = drawn(3, 4, 6)
    x[~mask] = padding
    cot = drawn(3, 4, 6, seed=3)  # at masked positions too, whose output must be a constant
    with jax.enable_x64(True):
        params = {"scale": jnp.asarray(drawn(6, seed=1)), "bias": jnp.asarray(drawn(6, seed=2))}
        y, dparams, dx = pulled(norm, params, x, cot, jnp.asarray(mask))
        np.testing.assert_array_equal(np.asarray(y)[~mask], 0)
        np.testing.assert_array_equal(np.asarray(dx)[~mask], 0)
        whole = {"scale": np.zeros(6), "bias": np.zeros(6)}
        for i in range(3):
            valid = mask[i] if mask.ndim == 2 else np.full(4, mask[i])
            if not valid.any():
                continue
            alone, own, dalone = pulled(norm, params, x[i][valid], cot[i][valid])
            np.testing.assert_allclose(y[i][valid], alone, rtol=0, atol=1e-11)
            np.testing.assert_allclose(dx[i][valid], dalone, rtol=0, atol=1e-11)
            whole = jax.tree.map(np.add, whole, own)
        for name, leaf in whole.items():
            np.testing.assert_allclose(dparams[name], leaf, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_fully_masked_row_is_finite_and_has_no_gradient(norm):
    x = jnp.asarray(drawn(2, 4, 6), jnp.float32).at[1].set(jnp.nan)
    params, _ = norm.init(KEY, x)
    mask = jnp.array([[True] * 4, [False] * 4])
    cot = jnp.zeros_like(x).at[1].set(1.0)
    y, dparams, dx = pulled(norm, params, x, cot, mask)
    np.testing.assert_array_equal(y[1], 0)
    for leaf in (*dparams.values(), dx):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_mask_of_true_equals_no_mask(norm):
    x = jnp.asarray(drawn(2, 4, 6), jnp.float32)
    params, _ = norm.init(KEY, x)
    np.testing.assert_allclose(norm(params, x, mask=jnp.ones((2, 4), bool)), norm(params, x),
                               rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("norm", "side"), [
    # They take segments only to raise: these layers mix positions.
    (dp.group_norm(2), {"segments"}), (dp.instance_norm(), {"segments"}),
    (dp.group_norm(2, dims=0), set()),
], ids=repr)
def test_only_dims_1_takes_a_mask(norm, side):
    assert norm.side == side
    expect("", f"{norm!r}: wants only side inputs that it takes ({''.join(side) or 'none'}), "
           "got mask", norm.init, KEY, jnp.ones((2, 3, 3, 4)), mask=jnp.ones(2, bool))


def test_wrong_masks_raise():
    norm, x = dp.group_norm(2, dims=1), jnp.ones((2, 3, 4))
    params, _ = norm.init(KEY, x)
    call = "group_norm(2, dims=1): wants"
    expect("", f"{call} a mask of booleans, got int32[2,3]", norm, params, x,
           mask=jnp.ones((2, 3), jnp.int32))
    expect("", f"{call} a mask of the leading axes of (2, 3, 4), got bool[3]", norm, params,
           x, mask=jnp.ones(3, bool))


# Errors.


@pytest.mark.parametrize("groups", [0, -1, 2.0, True])
def test_groups_are_a_positive_int(groups):
    with pytest.raises(dp.LayerError, match="groups as an int of at least 1"):
        dp.group_norm(groups)


@pytest.mark.parametrize(("make", "least"), [
    (lambda **o: dp.group_norm(2, **o), 0), (dp.instance_norm, 1),
], ids=["group_norm", "instance_norm"])
def test_wrong_options_and_integers_raise(make, least):
    with pytest.raises(dp.LayerError, match=f"dims as an int of at least {least}"):
        make(dims=least - 1)
    with pytest.raises(dp.LayerError, match="dims of at most 3, got 4"):
        make(dims=4)
    with pytest.raises(dp.LayerError, match="eps"):
        make(eps=0)
    with pytest.raises(dp.LayerError, match="floating-point"):
        make().init(KEY, jnp.ones((2, 2, 2, 4), jnp.int32))


@pytest.mark.parametrize("norm", [
    dp.group_norm(1), dp.instance_norm(),
], ids=["group_norm", "instance_norm"])
def test_parameters_of_another_number_of_channels_raise(norm):
    params, _ = norm.init(KEY, jnp.ones((2, 2, 2, 1)))
    with pytest.raises(dp.LayerError, match="1 feature "):
        norm(params, jnp.ones((2, 2, 2, 4)))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_statistics_over_time_cannot_stream(norm):
    x = jnp.ones((2, 3, 4))
    params, state = norm.init(KEY, x)
    with pytest.raises(dp.LayerError, match="the whole input at once"):
        norm.start(params, state, x, length=3)


def test_statistics_of_a_step_stream():
    assert dp.group_norm(2, dims=0).start is None
