"""`conv_transpose` against loops that add kernels, and against the transpose of `conv`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, computes, drawn
from support.refusing import expect

import diffprog as dp


def naive(x, kernel, stride, pads, extra, dilation, groups):
    """``y[stride * p + dilation * q - before] += x[p] @ kernel[q]``, group by group."""
    sizes, features = kernel.shape[:-2], kernel.shape[-1]
    extent = [d * (k - 1) + 1 for k, d in zip(sizes, dilation, strict=True)]
    full = [(h - 1) * s + k + more
            for h, s, k, more in zip(x.shape[1:-1], stride, extent, extra, strict=True)]
    y = np.zeros((x.shape[0], *full, features))
    inputs, outputs = x.shape[-1] // groups, features // groups
    for p in np.ndindex(*x.shape[1:-1]):
        for q in np.ndindex(*sizes):
            at = tuple(s * i + d * j for s, i, d, j in zip(stride, p, dilation, q, strict=True))
            for g in range(groups):
                out = slice(g * outputs, (g + 1) * outputs)
                part = x[(slice(None), *p, slice(g * inputs, (g + 1) * inputs))]
                y[(slice(None), *at, out)] += part @ kernel[q][:, out]
    crop = tuple(slice(before, length - after) for (before, after), length
                 in zip(pads, full, strict=True))
    return y[(slice(None), *crop)]


# spatial shape, size, options
CASES = {
    "1-D": ((5,), (3,), dict(padding="VALID")),
    "1-D stride beyond the kernel": ((4,), (2,), dict(stride=(4,), padding="VALID")),
    "1-D one-sided": ((5,), (4,), dict(stride=(2,), padding=((3, 0),))),
    "2-D": ((3, 4), (3, 2), dict(stride=(2, 1), padding=((1, 1), (1, 1)))),
    "2-D output padding": ((3, 2), (3, 3), dict(
        stride=(2, 3), padding=((1, 1), (0, 2)), output_padding=(1, 2))),
    "2-D dilation": ((3, 4), (2, 3), dict(
        stride=(1, 2), dilation=(3, 2), padding=((0, 1), (1, 1)), output_padding=(2, 0))),
    "2-D more cut off than a kernel": ((6, 6), (2, 1), dict(padding=((2, 0), (1, 2)))),
    "1-D more cut off with a stride": ((3,), (2,), dict(stride=(4,), padding=((5, 3),))),
    "3-D": ((2, 3, 2), (2, 1, 2), dict(stride=(1, 2, 3), padding="VALID")),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_conv_transpose_equals_loops(name, groups):
    space, size, options = CASES[name]
    dims = len(size)
    x, bias = drawn(2, *space, 4), drawn(6, seed=2)
    kernel = drawn(*size, 4 // groups, 6, seed=1)
    pads = ((0, 0),) * dims if options["padding"] == "VALID" else options["padding"]
    ones = (1,) * dims
    wanted = bias + naive(x, kernel, options.get("stride", ones), pads,
                          options.get("output_padding", (0,) * dims),
                          options.get("dilation", ones), groups)
    net = dp.conv_transpose(6, size, groups=groups, **options)
    computes(net, {"kernel": kernel, "bias": bias}, x, wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_is_the_transpose_of_same(size, stride, dilation):
    options = dict(dims=1, stride=stride, dilation=dilation, bias=False)
    kernel = jnp.asarray(drawn(size, 2, 3), jnp.float32)
    x, y = jnp.asarray(drawn(4, 2)), jnp.asarray(drawn(4 * stride, 3, seed=1))
    forth = dp.conv_transpose(3, size, **options)({"kernel": kernel}, x)
    back = dp.conv(2, size, **options)({"kernel": kernel.swapaxes(-1, -2)}, y)
    assert forth.shape == y.shape and back.shape == x.shape
    np.testing.assert_allclose(jnp.vdot(forth, y), jnp.vdot(x, back), rtol=1e-4, atol=1e-4)
    spread = jax.lax.conv_transpose(
        x[None], kernel[::-1], (stride,), "SAME", rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"))
    np.testing.assert_allclose(forth, spread[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output_padding", [0, 1])
def test_output_padding_selects_the_input_size_of_conv(output_padding):
    options = dict(stride=2, padding=1, bias=False)
    kernel = jnp.asarray(drawn(3, 3, 2, 3))
    x, y = jnp.asarray(drawn(4, 3, 2)), jnp.asarray(drawn(*(2 * n - 1 + output_padding
                                                            for n in (4, 3)), 3))
    forth = dp.conv_transpose(3, 3, output_padding=output_padding, **options)({"kernel": kernel}, x)
    back = dp.conv(2, 3, **options)({"kernel": kernel.swapaxes(-1, -2)}, y)
    assert forth.shape == y.shape and back.shape == x.shape
    np.testing.assert_allclose(jnp.vdot(forth, y), jnp.vdot(x, back), rtol=1e-4)


@pytest.mark.slow
def test_parameters_and_batch_axes():
    net = dp.conv_transpose(6, (3, 2), groups=2, stride=2)
    x = jnp.asarray(drawn(2, 3, 4, 5, 4))
    params, _ = net.init(KEY, x)
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "kernel": (3, 2, 2, 6), "bias": (6,)}
    assert net(params, x).shape == (2, 3, 8, 10, 6)
    close(net(params, x)[1, 2], net(params, x[1, 2]))


@pytest.mark.slow
def test_masked_steps_do_not_reach_valid_steps():
    net = dp.conv_transpose(3, 3, dims=1, stride=2)
    mask = jnp.array([[True, True, False, False], [True, False, True, True]])
    x = jnp.asarray(drawn(2, 4, 2))
    params, _ = net.init(KEY, x)
    broken = jnp.where(mask[..., None], x, jnp.nan)
    wanted = net(params, jnp.where(mask[..., None], x, 0))
    close(net(params, broken, mask=mask), wanted)
    grads = jax.jit(jax.grad(lambda p, x: net(p, x, mask=mask).sum(), (0, 1)))(params, broken)
    chex.assert_tree_all_finite(grads)
    assert not grads[1][~mask].any() and grads[1][mask].all()


def test_bfloat16_input_has_float32_parameters_and_bfloat16_output():
    x = jnp.asarray(drawn(1, 3, 3, 2), jnp.bfloat16)
    net = dp.conv_transpose(3, 3, stride=2)
    params, _ = net.init(KEY, x)
    assert params["kernel"].dtype == jnp.float32
    y = net(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), net(params, x.astype(jnp.float32)), atol=0.05)


def test_too_much_padding_and_a_mask_of_images_raise():
    for space in ((1, 3), (3, 2)):
        x = jnp.ones((2, *space, 1))
        expect("", f"conv_transpose(4, 2, padding=2): wants padding that leaves at least one "
               f"output position, got float32[2,{space[0]},{space[1]},1]",
               dp.conv_transpose(4, 2, padding=2).plan, x)
    with pytest.raises(dp.LayerError, match="side inputs"):
        dp.conv_transpose(4, 2).plan(jnp.ones((2, 3, 3, 1)), mask=jnp.ones(2, bool))
