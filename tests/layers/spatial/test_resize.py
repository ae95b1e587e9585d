"""Upsampling, pixel shuffling and patches against loops, and against convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, drawn
from support.refusing import expect

import diffprog as dp


def keys(t):
    """The cubic kernel of Keys 1981, equation 15."""
    t = abs(t)
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return near if t < 1 else far if t < 2 else 0.0


WEIGHTS = {
    "nearest": lambda t: float(-0.5 <= t < 0.5),
    "linear": lambda t: max(0.0, 1 - abs(t)),
    "cubic": keys,
}


def matrix(method, old, new):
    """Row i has the weights of the old positions for the new position i; they sum to one."""
    rows = np.array([[WEIGHTS[method]((i + 0.5) * old / new - 0.5 - j) for j in range(old)]
                     for i in range(new)])
    return rows / rows.sum(1, keepdims=True)


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize(
    ("before", "after"), [((4, 3), (8, 9)), ((3, 5), (4, 5)), ((1, 4), (3, 7))])
def test_upsample_equals_a_matrix_for_each_axis(method, before, after):
    x = drawn(2, *before, 3)
    rows, columns = (matrix(method, *pair) for pair in zip(before, after, strict=True))
    wanted = np.einsum("ih,jw,bhwc->bijc", rows, columns, x)
    with jax.enable_x64(True):
        y = dp.upsample(size=after, method=method)({}, jnp.asarray(x))
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize(("factor", "dims", "space"), [
    (2, 1, (5,)), ((2, 1), 2, (3, 4)), (2, 3, (2, 1, 3)),
], ids=str)
def test_a_factor_equals_the_size_that_it_implies(method, factor, dims, space):
    x = jnp.asarray(drawn(2, *space, 2))
    factors = factor if isinstance(factor, tuple) else (factor,) * dims
    size = tuple(f * length for f, length in zip(factors, space, strict=True))
    y = dp.upsample(factor, dims=dims, method=method)({}, x)
    assert y.shape == (2, *size, 2)
    np.testing.assert_array_equal(y, dp.upsample(size=size, method=method)({}, x))
    close(y[1], dp.upsample(factor, dims=dims, method=method)({}, x[1]))


@pytest.mark.parametrize(("old", "new"), [(3, 7), (49, 64), (5, 10), (7, 7)])
def test_the_nearest_position_is_exact(old, new):
    x = np.arange(old, dtype=np.int32) + 2**24  # float32 does not hold them all
    y = jax.jit(lambda x: dp.upsample(size=new, dims=1)({}, x))(x[:, None])
    wanted = x[[(2 * i + 1) * old // (2 * new) for i in range(new)]]
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y[:, 0], wanted)


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_bfloat16_is_interpolated_in_float32(method):
    x = jnp.asarray(drawn(2, 5, 2) + 100, jnp.bfloat16)
    net = dp.upsample(3, dims=1, method=method)
    y = net({}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        *(np.asarray(a, np.float32) for a in (y, net({}, x.astype(jnp.float32)).astype(y.dtype))))


def test_pixel_shuffle_equals_the_formula():
    f, x = 3, drawn(2, 2, 4, 2 * 9)
    wanted = np.zeros((2, 6, 12, 2))
    for h, w, c, i, j in np.ndindex(2, 4, 2, f, f):
        wanted[:, f * h + i, f * w + j, c] = x[:, h, w, c * f * f + i * f + j]
    close(dp.pixel_shuffle(f)({}, jnp.asarray(x)), jnp.asarray(wanted, jnp.float32))
    one = dp.pixel_shuffle(f)({}, jnp.asarray(x[0]))
    close(one, jnp.asarray(wanted[0], jnp.float32))
    kept = jnp.arange(8).reshape(2, 1, 4)
    assert dp.pixel_shuffle(1)({}, kept).tolist() == kept.tolist()


@pytest.mark.parametrize(
    ("space", "size"), [((6,), (3,)), ((4, 6), (2, 3)), ((4, 2, 6), (2, 1, 3))])
def test_patches_are_in_row_major_order(space, size):
    x = drawn(2, *space, 2)
    tiles = []
    for p in np.ndindex(*(length // n for length, n in zip(space, size, strict=True))):
        tile = tuple(slice(i * n, (i + 1) * n) for i, n in zip(p, size, strict=True))
        tiles.append(x[(slice(None), *tile)].reshape(2, -1))
    close(dp.patches(size)({}, jnp.asarray(x)), jnp.asarray(np.stack(tiles, 1), jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "space"), [(2, (4, 6)), ((2, 3), (4, 6)), ((2, 1, 3), (4, 2, 6))])
def test_linear_on_patches_is_a_convolution(size, space):
    stride = size if isinstance(size, tuple) else (size,) * 2
    x = jnp.asarray(drawn(2, *space, 3))
    conv = dp.conv(5, size, stride=stride, padding="VALID")
    params, _ = conv.init(KEY, x)
    flat = {"linear_0": params | {"kernel": params["kernel"].reshape(-1, 5)}}
    net = dp.patches(size) >> dp.linear(5)
    dp.tree.verify(net, flat, x)
    close(net(flat, x), conv(params, x).reshape(2, -1, 5))


@pytest.mark.slow
@pytest.mark.parametrize(("net", "shape"), [
    (dp.patches(2), (2, 3, 2, 16)), (dp.pixel_shuffle(2), (2, 3, 8, 4, 1)),
    (dp.upsample(2), (2, 3, 8, 4, 4)),
], ids=str)
def test_integers_and_batch_axes_are_kept(net, shape):
    x = jnp.arange(2 * 3 * 4 * 2 * 4, dtype=jnp.int8).reshape(2, 3, 4, 2, 4)
    y = net({}, x)
    assert y.dtype == jnp.int8 and y.shape == shape
    np.testing.assert_array_equal(y[1, 2], net({}, x[1, 2]))


@pytest.mark.parametrize("net", [dp.upsample(2), dp.pixel_shuffle(1), dp.patches(2)], ids=repr)
def test_too_few_axes_and_streams_raise(net):
    x = jnp.ones((2, 4, 6, 3))
    expect("", f"{net!r}: wants at least 3 axes (..., height, width, channels), got "
           "float32[4,4]", net.plan, jnp.ones((4, 4)))
    with pytest.raises(dp.LayerError, match="the whole input at once"):
        net.start({}, {}, x, length=4)
