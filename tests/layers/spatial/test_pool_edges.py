"""Pools of equal values, of NaN, and of empty axes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import drawn

import diffprog as dp


def windows(side, size, stride, dilation):
    return [range(p, p + dilation * (size - 1) + 1, dilation)
            for p in range(0, side - dilation * (size - 1), stride)]


def bins(side, count):
    return [range(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]


# The layer, and the windows of each of the two axes of a 6 x 5 image.
MAXIMA = {
    "max_pool": (dp.max_pool(2), windows(6, 2, 2, 1), windows(5, 2, 2, 1)),
    "overlapping": (dp.max_pool(3, stride=1), windows(6, 3, 1, 1), windows(5, 3, 1, 1)),
    "dilated": (dp.max_pool(2, stride=1, dilation=2), windows(6, 2, 1, 2), windows(5, 2, 1, 2)),
    "dilated, wide": (dp.max_pool((3, 2), stride=1, dilation=(2, 3)), windows(6, 3, 1, 2),
                      windows(5, 2, 1, 3)),
    "global": (dp.global_max_pool(), [range(6)], [range(5)]),
    "adaptive": (dp.adaptive_max_pool((4, 2)), bins(6, 4), bins(5, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAXIMA)
@pytest.mark.parametrize("dtype", [
    jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_of_equal_values_the_first_has_the_gradient(name, dtype):
    """First row, then first column, in both modes; each output depends on one position."""
    net, rows, columns = MAXIMA[name]
    image = np.random.default_rng(0).integers(0, 2, (6, 5))
    wanted = np.zeros((len(rows), len(columns), 6, 5))
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        places = list(itertools.product(row, column))
        wanted[(i, j, *max(places, key=lambda at: image[at]))] = 1  # the first of the largest
    x = jnp.asarray(image, dtype)[..., None]
    for mode in (jax.jacrev, jax.jacfwd):
        np.testing.assert_array_equal(
            mode(lambda x: net({}, x))(x).reshape(wanted.shape), wanted)


@pytest.mark.parametrize("mask", [None, np.array([[False, True, True, True]])], ids=["all", "some"])
@pytest.mark.parametrize("net", [
    dp.collapse("max"), dp.global_max_pool(dims=1), dp.max_pool(4, dims=1),
    dp.adaptive_max_pool(1, dims=1), dp.max_pool(2, dims=1, dilation=2, stride=4)], ids=repr)
def test_of_equal_valid_steps_the_first_has_the_gradient(net, mask):
    x = jnp.ones((1, 4, 2))
    side = {} if mask is None else {"mask": mask}
    slope = jax.grad(lambda x: net({}, x, **side).sum())(x)[0]
    first = 0 if mask is None else 2 if "dilation" in repr(net) else 1
    np.testing.assert_array_equal(slope, np.eye(4)[first][:, None].repeat(2, 1))


@pytest.mark.parametrize("net", [net for net, *_ in MAXIMA.values()], ids=list(MAXIMA))
def test_nan_is_the_maximum(net):
    x = jnp.zeros((2, 6, 5, 3)).at[1, 2, 1, 1].set(jnp.nan)
    y = net({}, x)
    assert np.isnan(y[1, ..., 1]).any() and not np.isnan(y[0]).any()
    assert np.isnan(net({}, jnp.full_like(x, jnp.nan))).all()


@pytest.mark.slow
def test_a_second_derivative_passes_through_a_maximum():
    net, x = dp.global_max_pool(dims=1), jnp.asarray(drawn(1, 4, 2), jnp.float32)
    curve = jax.hessian(lambda x: (net({}, x) ** 3).sum())(x)
    at = np.asarray(x).argmax(1)[0]
    for c in range(2):
        np.testing.assert_allclose(curve[0, at[c], c, 0, at[c], c], 6 * x.max(1)[0, c], rtol=1e-5)
    assert np.count_nonzero(curve) == 2


@pytest.mark.parametrize("net", [
    dp.max_pool(2), dp.max_pool(2, padding=1), dp.max_pool(2, dilation=2), dp.avg_pool(2),
    dp.avg_pool(2, padding=1), dp.global_avg_pool(), dp.global_max_pool(), dp.adaptive_avg_pool(2),
    dp.adaptive_max_pool(2)], ids=repr)
def test_an_empty_spatial_axis_raises(net):
    with pytest.raises(dp.LayerError, match="at least one position"):
        net({}, jnp.ones((2, 0, 4, 3)))
    y = net({}, jnp.ones((0, 4, 4, 3)))
    assert y.shape[0] == 0 and y.shape[-1] == 3
    assert net({}, jnp.ones((2, 0, 4, 4, 3))).shape[:2] == (2, 0)
