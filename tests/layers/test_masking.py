"""`hide`: masked entries become zero, and do not reach any gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import KEY, expect

import diffprog as dp
from diffprog.core.masks import cleared, widened

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
MASK = np.array([[True, False, True], [False, False, True]])


@pytest.mark.parametrize(("mask", "hidden"), [
    (np.array([True, False]), (1,)),
    (MASK, ([0, 1, 1], [1, 0, 1])),
    (np.broadcast_to(MASK[..., None], (2, 3, 4)), ([0, 1, 1], [1, 0, 1])),
], ids=["examples", "steps", "entries"])
def test_hide_zeroes_masked_entries(mask, hidden):
    wanted = X.copy()
    wanted[hidden] = 0
    dirty = X.copy()
    dirty[hidden] = np.nan
    np.testing.assert_array_equal(dp.hide()({}, jnp.asarray(dirty), mask=jnp.asarray(mask)), wanted)


def test_hide_returns_x_without_a_mask():
    x = jnp.asarray(X)
    assert dp.hide()({}, x) is x and dp.hide()({}, x, mask=None) is x
    assert dp.hide().bare and dp.hide().start is None and dp.hide().side == {"mask"}


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.bfloat16])
def test_hide_keeps_the_dtype(dtype):
    x = jnp.ones((2, 3), dtype)  # (batch, time) as tokens have: the mask covers all their axes
    y = dp.hide()({}, x, mask=jnp.asarray(MASK))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.astype(int), MASK.astype(int))


@pytest.mark.parametrize("hidden", [jnp.nan, jnp.inf, 1e30])
def test_hide_keeps_nan_in_the_padding_out_of_all_gradients(hidden):
    layers = dp.linear(5), jnp.tanh, dp.linear(2)
    x = jnp.where(MASK[..., None], X, hidden)
    params, _ = dp.serial(dp.hide(), *layers).init(KEY, x)

    def gradients(net, x, **side):
        total = lambda p, x: jnp.where(  # noqa: E731
            MASK[..., None], jnp.square(net(p, x, **side)), 0).sum()
        return jax.jit(jax.grad(total, (0, 1)))(params, x)

    got = gradients(dp.serial(dp.hide(), *layers), x, mask=jnp.asarray(MASK))
    wanted = gradients(dp.serial(*layers), jnp.where(MASK[..., None], X, 0))
    jax.tree.map(np.testing.assert_array_equal, got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])
    np.testing.assert_array_equal(np.asarray(got[1])[~MASK], 0)
    if not np.isfinite(hidden):  # without `hide`, zero times NaN is NaN
        broken = gradients(dp.serial(*layers), x)[0]["linear_0"]["kernel"]
        assert np.isnan(broken).all()


def test_wrong_masks_raise():
    net, x = dp.serial(hide=dp.hide()), jnp.asarray(X)
    path = "hide (hide()): wants"
    leading = f"{path} a mask of the leading axes of (2, 3, 4), got"
    for mask, message in (
        (jnp.ones((2, 3)), f"{path} a mask of booleans, got float32[2,3]; make it boolean: "
         "True marks valid entries"),
        (jnp.ones((2, 3), jnp.int32), f"{path} a mask of booleans, got int32[2,3]"),
        (jnp.ones((), bool), f"{leading} bool[]"),
        (jnp.ones(3, bool), f"{leading} bool[3]"),
        (jnp.ones((2, 1), bool), f"{leading} bool[2,1]; name mask in a program where the time "
         "axis changes length, and pass on the new one"),
        (jnp.ones((2, 3, 4, 1), bool), f"{leading} bool[2,3,4,1]; give it one entry per "
         "position: attention_mask masks pairs of query and key, target_mask masks targets"),
    ):
        expect("hide", message, net, {}, x, mask=mask)
        expect("hide", message, net.init, KEY, x, mask=mask)
    expect("hide", f"{path} one array, got (float32[2], float32[2])", net, {},
           (jnp.ones(2), jnp.ones(2)), mask=jnp.ones(2, bool))


def test_cleared_and_widened_cover_all_axes_but_the_features():
    x = jnp.asarray(X)
    assert widened(jnp.asarray(MASK), x.shape).shape == (2, 3, 1)
    assert cleared(x, None) is x
    np.testing.assert_array_equal(cleared(x, jnp.asarray(MASK)), np.where(MASK[..., None], X, 0))
    with pytest.raises(dp.LayerError, match="a mask of the leading axes"):
        widened(jnp.ones((2, 3, 4), bool), x.shape)
    with pytest.raises(dp.LayerError, match="a mask of booleans, got None"):
        widened(None, x.shape)
