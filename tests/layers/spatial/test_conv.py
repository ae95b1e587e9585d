"""Convolutions against loops, numpy.convolve, Toeplitz matrices, the arithmetic of output sizes."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, computes, drawn

import diffprog as dp


def naive(x, kernel, stride, pads, dilation, groups=1):
    """``y[p] = sum_q x[stride * p + dilation * q] @ kernel[q]``; x is (batch, *space, channels)."""
    sizes, features = kernel.shape[:-2], kernel.shape[-1]
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    starts = [range(0, length - d * (size - 1), s)
              for length, size, s, d in zip(x.shape[1:-1], sizes, stride, dilation, strict=True)]
    inputs, outputs = x.shape[-1] // groups, features // groups
    y = np.zeros((x.shape[0], *map(len, starts), features))
    for p in np.ndindex(*y.shape[1:-1]):
        for q in np.ndindex(*sizes):
            at = tuple(s[i] + d * j for s, i, d, j in zip(starts, p, dilation, q, strict=True))
            for g in range(groups):
                part = x[(slice(None), *at, slice(g * inputs, (g + 1) * inputs))]
                out = slice(g * outputs, (g + 1) * outputs)
                y[(slice(None), *p, out)] += part @ kernel[q][:, out]
    return y


def test_sobel_filter_of_a_letter():
    rows = ["00000000", "00000110", "01111110", "01111110",
            "01111110", "00111000", "00111000", "00000000"]
    x = jnp.array([[float(bit) for bit in row] for row in rows])[..., None]
    kernel = jnp.array([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]]).reshape(3, 3, 1, 1)
    net = dp.conv(1, 3, padding="VALID", bias=False)
    wanted = [[-3, -4, -4, -4, -4, -3], [-3, -4, -4, -3, -1, 0], [0, 0, 0, 0, 0, 0],
              [2, 1, 0, 1, 3, 3], [2, 1, 0, 1, 3, 3], [1, 3, 4, 3, 1, 0]]
    assert net({"kernel": kernel}, x)[..., 0].tolist() == wanted


@pytest.mark.parametrize(
    ("mode", "padding"), [("valid", "VALID"), ("full", 3), ("full", ((3, 3),))])
def test_a_flipped_kernel_equals_numpy_convolve(mode, padding):
    x, kernel = drawn(9), drawn(4, seed=1)
    net = dp.conv(1, 4, dims=1, padding=padding, bias=False)
    with jax.enable_x64(True):
        flipped = jnp.asarray(kernel[::-1].copy()).reshape(4, 1, 1)
        y = net({"kernel": flipped}, jnp.asarray(x)[:, None])[:, 0]
        np.testing.assert_allclose(y, np.convolve(x, kernel, mode), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("space", "size", "stride"), [((7,), (3,), (1,)), ((8,), (3,), (2,)), ((5, 4), (3, 2), (2, 1))])
def test_conv_equals_linear_with_a_toeplitz_matrix(space, size, stride):
    channels, features = 2, 3
    kernel, bias = drawn(*size, channels, features, seed=1), drawn(features, seed=2)
    positions = tuple((h - k) // s + 1 for h, k, s in zip(space, size, stride, strict=True))
    matrix = np.zeros((*space, channels, *positions, features))
    for p in np.ndindex(*positions):
        for q in np.ndindex(*size):
            at = tuple(s * i + j for s, i, j in zip(stride, p, q, strict=True))
            for c, f in itertools.product(range(channels), range(features)):
                matrix[(*at, c, *p, f)] = kernel[(*q, c, f)]
    outputs = int(np.prod(positions)) * features
    with jax.enable_x64(True):
        x = jnp.asarray(drawn(2, *space, channels))
        net = dp.conv(features, size, stride=stride, padding="VALID")
        y = net({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}, x)
        flat = {"kernel": jnp.asarray(matrix.reshape(-1, outputs)),
                "bias": jnp.asarray(np.tile(bias, int(np.prod(positions))))}
        same = dp.linear(outputs)(flat, x.reshape(2, -1)).reshape(2, *positions, features)
        assert y.shape == same.shape
        np.testing.assert_allclose(y, same, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_output_sizes_follow_the_formula(pad, size, stride, dilation):
    net = dp.conv(1, size, dims=1, padding=pad, stride=stride, dilation=dilation)
    extent = dilation * (size - 1) + 1
    for length in (3, 5, 6, 7):
        x = jax.ShapeDtypeStruct((length, 1), jnp.float32)
        if length + 2 * pad < extent:
            with pytest.raises(dp.LayerError, match="at least as large"):
                net.plan(x)
        else:
            wanted = (length + 2 * pad - extent) // stride + 1
            assert net.plan(x).y.shape == (wanted, 1), length


CASES = {
    "1-D": ((9,), (3,), dict()),
    "1-D stride": ((9,), (4,), dict(stride=(3,), padding=((2, 0),))),
    "1-D dilation": ((11,), (3,), dict(dilation=(3,), padding=((1, 4),))),
    "2-D": ((5, 6), (3, 2), dict()),
    "2-D stride, padding": ((5, 6), (3, 2), dict(stride=(2, 3), padding=((1, 0), (0, 2)))),
    "2-D dilation": ((7, 6), (2, 3), dict(dilation=(3, 2), padding=((0, 1), (2, 1)))),
    "2-D all": ((7, 8), (3, 2), dict(stride=(2, 1), dilation=(2, 3), padding=((2, 1), (0, 3)))),
    "3-D": ((3, 4, 3), (2, 1, 3), dict(stride=(1, 2, 1), padding=((1, 0), (0, 0), (1, 1)))),
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_conv_equals_loops(name, groups):
    space, size, options = CASES[name]
    dims = len(size)
    x, kernel = drawn(2, *space, 4), drawn(*size, 4 // groups, 8, seed=1)
    bias = drawn(8, seed=2)
    ones, zeros = (1,) * dims, ((0, 0),) * dims
    wanted = bias + naive(x, kernel, options.get("stride", ones), options.get("padding", zeros),
                          options.get("dilation", ones), groups)
    net = dp.conv(8, size, groups=groups, **{"padding": "VALID"} | options)
    computes(net, {"kernel": kernel, "bias": bias}, x, wanted)


def test_an_int_sets_all_axes():
    x, kernel = drawn(1, 7, 8, 2), drawn(2, 2, 2, 3, seed=1)
    net = dp.conv(3, 2, stride=2, padding=1, dilation=3, bias=False)
    wanted = naive(x, kernel, (2, 2), ((1, 1), (1, 1)), (3, 3))
    with jax.enable_x64(True):
        y = net({"kernel": jnp.asarray(kernel)}, jnp.asarray(x))
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)


def test_batch_axes_are_free():
    net = dp.conv(3, 2, bias=False)
    x, params = jnp.asarray(drawn(2, 3, 5, 4, 2)), {"kernel": jnp.asarray(drawn(2, 2, 2, 3))}
    one_by_one = [[net(params, image) for image in row] for row in x]
    assert one_by_one[0][0].shape == (5, 4, 3)
    y = net(params, x)
    assert y.shape == (2, 3, 5, 4, 3)
    np.testing.assert_allclose(y, np.asarray(one_by_one), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(net(params, x[1]), y[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 7), (1, 2)])
def test_same_keeps_the_size(size, dilation, height, width):
    net = dp.conv(3, size, dilation=dilation)
    x = jax.ShapeDtypeStruct((2, height, width, 1), jnp.float32)
    assert net.plan(x).y.shape == (2, height, width, 3)


def test_same_pads_evenly_with_the_rest_at_the_end():
    x, kernel = drawn(1, 7, 6, 1), drawn(4, 3, 1, 1, seed=1)
    with jax.enable_x64(True):
        given = {"kernel": jnp.asarray(kernel)}
        y = dp.conv(1, (4, 3), bias=False)(given, jnp.asarray(x))
        wanted = naive(x, kernel, (1, 1), ((1, 2), (1, 1)), (1, 1))
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
        y = dp.conv(1, (4, 3), bias=False, stride=2)(given, jnp.asarray(x))
        assert y.shape == (1, 4, 3, 1)  # 7 / 2 and 6 / 2, rounded up
        wanted = naive(x, kernel, (2, 2), ((1, 2), (0, 1)), (1, 1))
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)


def test_parameters_have_the_shapes_of_the_docstring():
    plan = dp.conv(6, (3, 2), groups=2).plan(jnp.ones((5, 5, 4)))
    assert {name: leaf.shape for name, leaf in plan.params.items()} == {
        "kernel": (3, 2, 2, 6), "bias": (6,)}
    assert set(dp.conv(6, 3, bias=False).plan(jnp.ones((5, 5, 4))).params) == {"kernel"}


def test_the_default_kernel_keeps_the_variance():
    params, _ = dp.conv(100, 3).init(jax.random.key(0), jnp.ones((4, 4, 20)))
    assert abs(float(jnp.var(params["kernel"])) * 9 * 20 - 1) < 0.05


def test_bfloat16_input_has_float32_parameters_and_bfloat16_output():
    x = jnp.asarray(drawn(1, 5, 5, 2), jnp.bfloat16)
    net, kernel = dp.conv(3, 3, bias=False), drawn(3, 3, 2, 3, seed=1)
    assert net.plan(x).params["kernel"].dtype == jnp.float32
    y = net({"kernel": jnp.asarray(kernel)}, x)
    assert y.dtype == jnp.bfloat16
    wide = naive(np.asarray(x, np.float64), kernel, (1, 1), ((1, 1), (1, 1)), (1, 1))
    np.testing.assert_allclose(np.asarray(y, np.float64), wide, rtol=0.05, atol=0.15)


def test_features_that_no_groups_divide_raise():
    with pytest.raises(dp.LayerError, match="divisible by groups=2"):
        dp.conv(3, 3, groups=2)


@pytest.mark.parametrize(("options", "x", "message"), [
    ({"groups": 2}, jnp.ones((5, 5, 3)), "divisible by groups=2"),
    ({}, jnp.ones((5, 5)), "at least 3 axes"),
    ({}, jnp.ones((5, 5, 1), jnp.int32), "floating-point"),
], ids=["groups", "axes", "dtype"])
def test_wrong_input_raises(options, x, message):
    with pytest.raises(dp.LayerError, match=message):
        dp.conv(4, 3, **options).plan(x)


@pytest.mark.parametrize("wrong", [
    dict(stride=0), dict(stride=(1,)), dict(dilation=1.0), dict(padding="same"), dict(padding=-1),
    dict(padding=((1, 1),)), dict(padding=((1, -1), (0, 0)))], ids=str)
def test_wrong_options_raise(wrong):
    with pytest.raises(dp.LayerError):
        dp.conv(4, 3, **wrong)


@pytest.mark.parametrize("size", [0, (3, 3, 3, 3), (3, -1), ()], ids=str)
def test_a_wrong_size_raises(size):
    with pytest.raises(dp.LayerError):
        dp.conv(4, size)


@pytest.mark.parametrize(("mode", "in_numpy"), [
    ("reflect", "reflect"), ("replicate", "edge"), ("circular", "wrap"), ("zeros", "constant")])
@pytest.mark.parametrize(("padding", "stride", "pairs"), [
    (2, 1, ((2, 2), (2, 2))), (((3, 0), (1, 2)), 2, ((3, 0), (1, 2))),
    ("SAME", 1, ((1, 1), (0, 1))), ("SAME", 2, ((1, 1), (0, 0))), ("VALID", 1, ((0, 0), (0, 0))),
], ids=str)
def test_padding_modes_equal_numpy(mode, in_numpy, padding, stride, pairs):
    x, kernel = drawn(2, 5, 4, 2), drawn(3, 2, 2, 3, seed=1)
    wide = np.pad(x, [(0, 0), *pairs, (0, 0)], mode=in_numpy)
    wanted = naive(wide, kernel, (stride, stride), ((0, 0), (0, 0)), (1, 1))
    net = dp.conv(3, (3, 2), stride=stride, padding=padding, padding_mode=mode, bias=False)
    with jax.enable_x64(True):
        y = net({"kernel": jnp.asarray(kernel)}, jnp.asarray(x))
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)


def test_circular_padding_commutes_with_rolling():
    net = dp.conv(3, 4, dims=1, padding_mode="circular", dilation=2)
    x = jnp.asarray(drawn(2, 7, 2))
    params, _ = net.init(KEY, x)
    close(net(params, jnp.roll(x, 3, 1)), jnp.roll(net(params, x), 3, 1))


@pytest.mark.parametrize("options", [
    dict(dims=1), dict(dims=1, multiplier=3, stride=2, padding=2), dict(dims=2, multiplier=2),
    dict(dims=2, padding=1, padding_mode="reflect"), dict(dims=3, bias=False, dilation=2)],
    ids=str)
def test_a_depthwise_convolution_keeps_channels_apart(options):
    dims, m = options["dims"], options.get("multiplier", 1)
    x = jnp.asarray(drawn(2, *(5, 4, 5)[:dims], 3))
    net = dp.depthwise_conv(3, **options)
    params, _ = net.init(KEY, x)
    assert params["kernel"].shape == (3,) * dims + (1, 3 * m)
    y = net(params, x)
    for c in range(3):
        own = (..., slice(c * m, (c + 1) * m))
        alone = dp.conv(m, 3, **{k: v for k, v in options.items() if k != "multiplier"})
        close(y[own], alone({n: leaf[own] for n, leaf in params.items()}, x[..., c, None]))


def test_the_default_depthwise_kernel_keeps_the_variance():
    params, _ = dp.depthwise_conv(3).init(KEY, jnp.ones((4, 4, 1000)))
    assert abs(float(jnp.var(params["kernel"])) * 9 - 1) < 0.05


@pytest.mark.parametrize("net", [
    dp.conv(3, 3, dims=1), dp.conv(3, 2, dims=1, padding="CAUSAL"), dp.depthwise_conv(3, dims=1),
    dp.conv(3, 3, dims=1, padding="VALID", padding_mode="circular") >> (
        lambda y: jnp.pad(y, ((0, 0), (1, 1), (0, 0))))], ids=repr)
def test_masked_steps_do_not_reach_valid_steps(net):
    mask = jnp.array([[True, True, False, False, True], [False, True, True, True, True]])
    x = jnp.asarray(drawn(2, 5, 2))
    params, _ = net.init(KEY, x)
    broken = jnp.where(mask[..., None], x, jnp.nan)
    close(net(params, broken, mask=mask), net(params, jnp.where(mask[..., None], x, 0)))
    grads = jax.jit(jax.grad(lambda p, x: net(p, x, mask=mask).sum(), (0, 1)))(params, broken)
    chex.assert_tree_all_finite(grads)
    assert not grads[1][~mask].any() and grads[1][mask].all()
    whole = jnp.array([True, False])  # a mask of examples
    close(net(params, x, mask=whole), net(params, x * whole[:, None, None]))


def test_images_take_no_mask():
    with pytest.raises(dp.LayerError, match="only side inputs that it takes"):
        dp.conv(3, 3).plan(jnp.ones((2, 5, 5, 1)), mask=jnp.ones(2, bool))


def test_each_padding_mode_has_its_own_limit():
    x = jnp.ones((1, 5, 3, 1))
    assert dp.conv(2, 3, padding=((4, 0), (2, 2)), padding_mode="reflect").plan(x).y.shape
    assert dp.conv(2, 3, padding=3, padding_mode="circular").plan(x).y.shape
    assert dp.conv(2, 3, padding=9, padding_mode="replicate").plan(x).y.shape
