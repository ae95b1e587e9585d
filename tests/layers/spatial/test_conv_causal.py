"""Causal convolution: outputs depend on the past alone, and a stream equals the whole sequence."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close

import diffprog as dp

SERIES = jax.random.normal(jax.random.key(3), (2, 12, 4))
MASK = jnp.arange(12) % 5 != jnp.array([[2], [0]])


@dp.program(down=dp.conv(4, 2, dims=1, padding="CAUSAL", stride=2),
            mix=dp.depthwise_conv(3, dims=1, padding="CAUSAL"))
def halving(layers, x, *, mask=None):
    x = jnp.tanh(layers.down(x, mask=mask))
    mask = None if mask is None else mask[:, ::2]
    return x + layers.mix(layers.mix(x, mask=mask), mask=mask)


LAYERS = {
    "conv": dp.conv(3, 3, dims=1, padding="CAUSAL"),
    "size 1": dp.conv(3, 1, dims=1, padding="CAUSAL"),
    "dilated": dp.conv(3, 3, dims=1, padding="CAUSAL", dilation=2),
    "stride": dp.conv(3, 2, dims=1, padding="CAUSAL", stride=2),
    "stride beyond the kernel": dp.conv(3, 2, dims=1, padding="CAUSAL", stride=4),
    "stride and dilation": dp.conv(4, (3,), padding="CAUSAL", stride=3, dilation=2, groups=2),
    "depthwise": dp.depthwise_conv(4, dims=1, padding="CAUSAL", multiplier=2),
    "in a program": halving,
    "repeated": dp.repeat(2, dp.conv(4, 2, dims=1, padding="CAUSAL", dilation=3) >> jnp.tanh),
    "in heads": dp.heads(2, dp.conv(3, 2, dims=1, padding="CAUSAL")),
}
STRIDES = {"stride": 2, "stride beyond the kernel": 4, "stride and dilation": 3, "in a program": 2}


def naive(x, kernel, stride, dilation):
    """``y[p] = sum_q x[stride * p - dilation * q] @ kernel[size - 1 - q]`` with zeros before x."""
    y = np.zeros((x.shape[0], -(-x.shape[1] // stride), kernel.shape[-1]))
    for p in range(y.shape[1]):
        for q in range(len(kernel)):
            if (at := stride * p - dilation * q) >= 0:
                y[:, p] += x[:, at] @ kernel[len(kernel) - 1 - q]
    return y


@pytest.mark.parametrize(("size", "stride", "dilation"), [
    (1, 1, 1), (2, 1, 1), (3, 1, 2), (4, 3, 1), (2, 3, 5), (2, 2, 9)])
def test_causal_conv_equals_loops(size, stride, dilation):
    x, kernel = np.asarray(SERIES[:, :7]), np.asarray(jax.random.normal(KEY, (size, 4, 3)))
    net = dp.conv(3, size, dims=1, padding="CAUSAL", stride=stride, dilation=dilation, bias=False)
    y = net({"kernel": jnp.asarray(kernel)}, jnp.asarray(x))
    close(y, naive(x, kernel, stride, dilation))


def streamed(net, params, x, sizes, mask=None):
    """The outputs of x in chunks of the given sizes; the state keeps its shapes and dtypes."""
    state = net.start(params, {}, x[:, : sizes[0]], length=x.shape[1])
    first, chunks, at, apply = state, [], 0, jax.jit(net.apply)
    for size in sizes:
        part = slice(at, at + size)
        y, state = apply(
            params, state, x[:, part], mask=None if mask is None else mask[:, part])
        chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
        chunks.append(y)
        at += size
    assert at == x.shape[1]
    return jnp.concatenate(chunks, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_stream_equals_the_whole_sequence(name):
    net, k = LAYERS[name], STRIDES.get(name, 1)
    params, _ = net.init(KEY, SERIES)
    for mask, sizes in ((None, (k,) * (12 // k)), (MASK, (k, 12 - k)), (MASK, (12 - 2 * k, k, k))):
        whole = jax.jit(net)(params, SERIES, mask=mask)
        close(streamed(net, params, SERIES, sizes, mask), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dilated", "stride", "in a program"])
def test_gradients_of_a_stream_equal_those_of_the_whole_sequence(name):
    net, k = LAYERS[name], STRIDES.get(name, 1)
    params, _ = net.init(KEY, SERIES)
    once = lambda params, x: jnp.sum(jnp.sin(net(params, x, mask=MASK)))  # noqa: E731
    for sizes in ((k,) * (12 // k), (k, 12 - k)):
        parts = lambda params, x, sizes=sizes: jnp.sum(  # noqa: E731
            jnp.sin(streamed(net, params, x, sizes, MASK)))
        close(*(jax.jit(jax.grad(f, (0, 1)))(params, SERIES) for f in (parts, once)))


@pytest.mark.slow
def test_the_past_has_the_dtype_of_x_and_zeros_at_masked_steps():
    net = LAYERS["dilated"]
    params, _ = net.init(KEY, SERIES)
    x = SERIES.astype(jnp.bfloat16)
    state = net.start(params, {}, x[:, :1], length=12)
    assert state["past"].dtype == jnp.bfloat16 and state["past"].shape == (2, 4, 4)
    assert not state["past"].any()
    broken = jnp.where(MASK[..., None], x, jnp.nan)
    y, state = net.apply(params, state, broken, mask=MASK)
    assert y.dtype == jnp.bfloat16 and bool(jnp.isfinite(y).all())
    kept = jnp.where(MASK[:, -4:, None], x[:, -4:], 0)
    np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (state["past"], kept)))


@pytest.mark.slow
@pytest.mark.parametrize("x", [SERIES[0], SERIES[:, None]], ids=["none", "two"])
def test_batch_axes_are_free(x):
    net = LAYERS["conv"]
    params, _ = net.init(KEY, SERIES)
    state = net.start(params, {}, x, length=12)
    first, state = net.apply(params, state, x[..., :5, :])
    second, _ = net.apply(params, state, x[..., 5:, :])
    close(jnp.concatenate([first, second], -2), net(params, x))


@pytest.mark.parametrize("layer", [
    dp.conv(3, 3, dims=1), dp.conv(3, 3, dims=1, padding="VALID"),
    dp.depthwise_conv(3, dims=1, padding=((2, 0),)),
], ids=["same", "valid", "numbers"])
def test_other_padding_than_causal_cannot_stream(layer):
    params, _ = layer.init(KEY, SERIES)
    with pytest.raises(dp.LayerError, match="the whole input at once"):
        layer.start(params, {}, SERIES, length=12)


@pytest.mark.slow
def test_a_stream_keeps_the_dtypes_of_its_chunks_and_of_its_past():
    """A stream started in float32 takes narrower chunks; a wider chunk than at the start raises."""
    net, x = dp.conv(2, 3, dims=1, padding="CAUSAL"), jax.random.normal(KEY, (1, 6, 2))
    params, _ = net.init(KEY, x)
    short = x.astype(jnp.bfloat16)
    state, parts = net.start(params, {}, x, length=6), []
    for i in range(0, 6, 2):
        y, state = net.apply(params, state, short[:, i : i + 2])
        assert (y.dtype, state["past"].dtype) == (jnp.bfloat16, jnp.float32)
        parts.append(y)
    np.testing.assert_array_equal(jnp.concatenate(parts, 1), net(params, short))
    state = net.start(params, {}, short, length=6)
    with pytest.raises(dp.LayerError, match="a chunk in bfloat16, as start saw"):
        net.apply(params, state, x)
