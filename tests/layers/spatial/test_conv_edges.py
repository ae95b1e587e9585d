"""Padding larger than the kernel and x: XLA gets no negative padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from support.comparing import drawn

import diffprog as dp


def loops(x, kernel, ct, stride, pad, dilation):
    """Output of `conv` over one axis, and gradients by x and kernel, entry by entry."""
    size, features = kernel.shape[0], kernel.shape[-1]
    count = (x.shape[1] + sum(pad) - dilation * (size - 1) - 1) // stride + 1
    y = np.zeros((len(x), count, features))
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for p, q in itertools.product(range(count), range(size)):
        at = stride * p + dilation * q - pad[0]
        if 0 <= at < x.shape[1]:
            y[:, p] += x[:, at] @ kernel[q]
            dx[:, at] += ct[:, p] @ kernel[q].T
            dkernel[q] += x[:, at].T @ ct[:, p]
    return y, dx, dkernel


def transposed(x, kernel, ct, stride, pad, extra, dilation):
    """The same for `conv_transpose`."""
    size, features = kernel.shape[0], kernel.shape[-1]
    count = (x.shape[1] - 1) * stride + dilation * (size - 1) + 1 + extra - sum(pad)
    y = np.zeros((len(x), count, features))
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for p, q in itertools.product(range(x.shape[1]), range(size)):
        at = stride * p + dilation * q - pad[0]
        if 0 <= at < count:
            y[:, at] += x[:, p] @ kernel[q]
            dx[:, p] += ct[:, at] @ kernel[q].T
            dkernel[q] += x[:, p].T @ ct[:, at]
    return y, dx, dkernel


def agree(net, x, kernel, reference):
    """Compare output and gradients in float32, for which XLA has its own program."""
    run = lambda x, kernel: net({"kernel": kernel}, x)  # noqa: E731
    given = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    ct = drawn(*jax.eval_shape(run, *given).shape, seed=2)

    @jax.jit
    def all_of(x, kernel, ct):
        y, back = jax.vjp(run, x, kernel)
        return y, *back(ct)

    for got, wanted in zip(all_of(*given, ct.astype(np.float32)), reference(x, kernel, ct),
                           strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


PADS = [(1, 0), (5, 1), (0, 4)]
SIZES = [(1, 2), (2, 3), (3, 1), *(
    pytest.param(*sizes, marks=pytest.mark.slow)
    for sizes in [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (3, 3)])]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stride"), SIZES)
def test_any_padding_of_conv_equals_loops(size, stride):
    for length, dilation, pad in itertools.product((1, 6), (1, 2), PADS):
        if length + sum(pad) < dilation * (size - 1) + 1:
            continue
        net = dp.conv(3, size, dims=1, stride=stride, dilation=dilation, padding=(pad,), bias=False)
        agree(net, drawn(2, length, 2), drawn(size, 2, 3, seed=1),
              lambda *given, d=dilation, pad=pad: loops(*given, stride, pad, d))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stride"), SIZES)
def test_any_padding_of_conv_transpose_equals_loops(size, stride):
    for length, dilation, pad, extra in itertools.product((1, 6), (1, 2), PADS, (0, 1)):
        full = (length - 1) * stride + dilation * (size - 1) + 1 + extra
        if full <= sum(pad) or extra >= max(stride, dilation):
            continue
        net = dp.conv_transpose(3, size, dims=1, stride=stride, dilation=dilation, padding=(pad,),
                                output_padding=extra, bias=False)
        agree(net, drawn(2, length, 2), drawn(size, 2, 3, seed=1),
              lambda *given, d=dilation, pad=pad, e=extra: transposed(*given, stride, pad, e, d))


def convolutions(jaxpr):
    """The paddings of all convolutions in a jaxpr and its inner jaxprs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn.params["padding"]
        for inner in jaxprs_in_params(eqn.params):
            yield from convolutions(inner)


LAYERS = [
    *(dp.conv(4, size, dims=1, stride=stride, padding=padding, dilation=dilation)
      for size, stride, dilation in ((1, 2, 1), (2, 1, 1), (3, 2, 1), (3, 1, 2), (2, 3, 1))
      for padding in ("SAME", "VALID", "CAUSAL", 5, ((6, 0),), ((0, 4),)) if size < 3
      or padding != "VALID"),
    dp.conv(4, 3), dp.conv(4, 3, stride=2, padding=((0, 5), (4, 1))), dp.conv(4, 1, stride=2),
    dp.conv(4, 2, dims=3, padding=3, groups=2), dp.conv(4, 3, dims=1, padding_mode="replicate",
                                                        padding=4, stride=2),
    dp.depthwise_conv(3, dims=1, padding=4), dp.depthwise_conv(2, stride=2, multiplier=2),
    *(dp.conv_transpose(4, size, dims=1, stride=stride, padding=padding, output_padding=extra)
      for size, stride, padding, extra in (
          (2, 1, ((2, 0),), 0), (2, 1, ((0, 1),), 0), (3, 2, "SAME", 0), (3, 2, "VALID", 1),
          (2, 4, "SAME", 0), (3, 2, 1, 1), (1, 4, ((2, 1),), 0), (2, 3, ((3, 0),), 2))),
    dp.conv_transpose(4, 3, stride=2), dp.conv_transpose(4, 2, padding=((2, 0), (0, 1))),
]


@pytest.mark.slow
@pytest.mark.parametrize("net", LAYERS, ids=repr)
@pytest.mark.parametrize("length", [2, 5])
def test_no_padding_is_negative_in_any_derivative(net, length):
    dims = len(net.settings["size"]) if isinstance(net.settings["size"], tuple) else (
        net.settings.get("dims", 2))
    x = jax.ShapeDtypeStruct((2, *(length,) * dims, 4), jnp.float32)
    params = net.plan(x).params

    def total(params, x):
        return jnp.sum(jnp.sin(net(params, x)))

    first = jax.grad(total, (0, 1))
    square = lambda *given: sum(  # noqa: E731
        jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(first(*given)))
    second = jax.grad(square, (0, 1))
    many = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), (params, x))
    for f, given in ((second, (params, x)), (jax.vmap(second), many),
                     (jax.hessian(total), (params, x))):
        paddings = list(convolutions(jax.make_jaxpr(f)(*given).jaxpr))
        assert paddings and all(n >= 0 for pads in paddings for pair in pads for n in pair)


def test_no_padding_is_negative_in_a_stream_with_a_stride():
    net = dp.conv(3, 3, dims=1, stride=2, padding="CAUSAL")
    x = jnp.asarray(drawn(2, 4, 2))
    params, state = net.init(jax.random.key(0), x)
    stream = net.start(params, state, x, length=4)
    run = lambda params, x: net.apply(params, stream, x)[0].sum()  # noqa: E731
    paddings = list(convolutions(jax.make_jaxpr(jax.grad(run, (0, 1)))(params, x).jaxpr))
    assert paddings and all(n >= 0 for pads in paddings for pair in pads for n in pair)
