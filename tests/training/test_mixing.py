"""`mixes`, read off jaxprs, against the outputs that a change of one example reaches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY

import diffprog as dp
from diffprog.training.mixing import mixes

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 5)), jnp.float32)


def mixed(f, x=X):
    return jax.tree.leaves(mixes(f, len(x), jax.tree.map(lambda a: 0, x), x))


def reached(f, x=X):
    """Whether a change of the first example reaches another, found by running."""
    moved = x.at[0].multiply(-3.0)
    rest = [(np.asarray(a)[1:], np.asarray(b)[1:]) for a, b in zip(
        jax.tree.leaves(f(x)), jax.tree.leaves(f(moved)), strict=True)]
    return [not np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in rest]


def conv(x, kernel=(3, 1)):
    return jax.lax.conv_general_dilated(x[..., None], jnp.ones((*kernel, 1, 1)), (1, 1), "SAME",
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))


ALONE = {
    "entry by entry": lambda x: jnp.tanh(x) * 2 + x / (1 + x**2),
    "another axis": lambda x: x - x.mean((1, 2), keepdims=True),
    "softmax": lambda x: jax.nn.softmax(x),
    "joined and parted": lambda x: jnp.cumsum(x.reshape(24, 5), 1).reshape(6, 4, 5),
    "joined in another order": lambda x: x.swapaxes(0, 1).reshape(24, 5).reshape(4, 6, 5).sum(
        0)[:, None],
    "images": lambda x: conv(x),
    "product": lambda x: jnp.einsum("btd,bsd->bts", x, x),
    "loop in time": lambda x: jax.lax.scan(
        lambda h, x: (jnp.tanh(h + x), h), jnp.zeros((6, 5)), x.swapaxes(0, 1))[1].swapaxes(0, 1),
    "loop over examples": lambda x: jax.lax.map(lambda x: x @ x.T, x),
    "loop in a loop over examples": lambda x: jax.lax.map(
        lambda x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h + x), x), x),
    "scan in a loop over examples": lambda x: jax.lax.map(
        lambda x: jax.lax.scan(lambda h, x: (h + x, h), jnp.zeros(5), x)[1], x),
    "vmap": jax.vmap(lambda x: x @ x.T),
    "vmap of convolutions with kernels of examples": jax.vmap(
        lambda x: jnp.convolve(x[:, 0], x[:2, 1])),
    "vmap of convolutions in a layer": jax.vmap(
        lambda x: dp.conv(5, 2, dims=1, bias=False)({"kernel": x[:2, None] * jnp.eye(5)}, x)),
    "until all are done": lambda x: jax.lax.while_loop(
        lambda x: (jnp.abs(x) > 0.1).any(), lambda x: x / 2, x) * 0 + x,
    "the largest of all": lambda x: jnp.log(jnp.exp(x - x.max()).sum(-1, keepdims=True)) + x.max(),
    "repeated": lambda x: jnp.repeat(x, 3, 0).reshape(6, 3, 4, 5).sum(1),
    "twice": lambda x: sum(jnp.split(jnp.concatenate([x, x * 2]), 2)),
    "tiled": lambda x: jnp.tile(x, (3, 1, 1)).reshape(3, 6, 4, 5).sum(0),
    "stacked": lambda x: jnp.stack([x, x**2], 1).sum(1),
    "sorted": lambda x: jnp.sort(x, 1) + jax.lax.top_k(x, 5)[0],
    "gathered": lambda x: jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
    "picked": lambda x: x[:, jnp.array([1, 0, 2, 3])],
    "looked up": lambda x: jnp.arange(12.0).reshape(4, 3)[(x > 0).astype(int)].sum(-1),
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)))[:, 1:5],
    "written": lambda x: jax.lax.dynamic_update_slice(x, jnp.zeros((6, 1, 5)), (0, 2, 0)),
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(x).sum(-1)),
    "by platform": lambda x: jax.lax.platform_dependent(x, cpu=jnp.tanh, default=jnp.tanh),
    "spectrum": lambda x: jnp.abs(jnp.fft.rfft(x)),
    "flipped back": lambda x: x[::-1][::-1],
    "sorted back": lambda x: x[jnp.argsort(x[:, 0, 0])][jnp.argsort(jnp.argsort(x[:, 0, 0]))],
    "counts of the batch": lambda x: x + 0 * (x > 0).sum(),
}

TOGETHER = {
    "mean": lambda x: x - x.mean(0),
    "mean of all": lambda x: x - x.mean(),
    "largest of examples": lambda x: x - x.max(0),
    "sum so far": lambda x: jnp.cumsum(x, 0),
    "window": lambda x: conv(x.swapaxes(0, 1)).swapaxes(0, 1),
    "channels": lambda x: (jnp.moveaxis(x, 0, -1) @ jnp.ones((6, 6))).transpose(2, 0, 1),
    "pooled": lambda x: jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (3, 1, 1), (1, 1, 1), "SAME"),
    "product": lambda x: jnp.einsum("btd,ctd->bc", x, x),
    "pairs": lambda x: jnp.abs(x[:, None] - x[None]).sum(1),
    "loop": lambda x: jax.lax.scan(lambda h, x: (h + x, h), jnp.zeros((4, 5)), x)[1],
    "joined": lambda x: jnp.cumsum(x.reshape(24, 5), 0).reshape(6, 4, 5),
    "deep inside": jax.jit(lambda x: jax.checkpoint(lambda x: jax.lax.fori_loop(
        0, 2, lambda i, x: x + x.mean(0), x))(x)),
    "in a branch": lambda x: jax.lax.cond(jnp.array(True), lambda x: x - x.mean(0), jnp.tanh, x),
    "spectrum": lambda x: jnp.abs(jnp.fft.fft(x, axis=0)),
    "padded": lambda x: conv(jnp.pad(x, ((1, 1), (0, 0), (0, 0)), mode="reflect").swapaxes(
        0, 1)).swapaxes(0, 1)[1:-1],
    "flipped": lambda x: x[::-1].mean(0) + x,
}


@pytest.mark.parametrize("name", ALONE)
def test_functions_that_do_not_mix_are_not_reported(name):
    assert not any(mixed(ALONE[name])) and not any(reached(ALONE[name]))


@pytest.mark.parametrize("name", TOGETHER)
def test_functions_that_mix_are_reported(name):
    assert all(mixed(TOGETHER[name])) and all(reached(TOGETHER[name]))


def test_each_output_is_judged_by_itself():
    y = mixes(lambda x: {"own": x * 2, "all": x.mean(), "most": x.max()}, 6, 0, X)
    assert y == {"own": False, "all": True, "most": False}


def test_axes_of_equal_size_are_distinguished():
    """Three axes of one length, each of which is the batch axis in turn."""
    x = X[:4, :4, :4]
    f = lambda x: jnp.cumsum(x.reshape(16, 4), 1).reshape(4, 4, 4)  # noqa: E731
    assert [mixes(f, 4, axis, x) for axis in range(3)] == [False, False, True]


@pytest.mark.parametrize("net", [
    dp.serial(
        dp.conv(2, 3), dp.batch_norm(), jax.nn.relu, dp.max_pool(2), dp.residual(dp.conv(2, 3)),
        dp.repeat(2, dp.conv(2, 3)), dp.global_avg_pool(), dp.linear(3)),
    dp.upsample(2) >> dp.conv_transpose(2, 2),
    dp.serial(dp.patches(2), dp.linear(4), dp.flatten(), dp.linear(2)),
    dp.ensemble(2, dp.conv(2, 3)), dp.heads(2, dp.conv(2, 3)), dp.remat(dp.conv(2, 3)),
    dp.mixed(dp.conv(2, 3), jnp.bfloat16), dp.group_norm(1), dp.instance_norm(),
    dp.adaptive_avg_pool(2), dp.conv(2, 3, padding_mode="reflect"), dp.depthwise_conv(3),
], ids=repr)
def test_layers_of_images_keep_examples_apart(net):
    x = jax.random.normal(KEY, (6, 8, 8, 2))
    params, state = net.init(KEY, x)
    assert not any(mixed(functools.partial(net, params, state=state), x))


@pytest.mark.parametrize("net", [
    dp.self_attention(1, causal=True), dp.recurrent(dp.lstm(3)), dp.conv(2, 3, dims=1),
    dp.recurrent(dp.gru(3), bidirectional=True), dp.collapse("max"), dp.collapse("mean"),
    dp.max_pool(2, dims=1), dp.conv(2, 3, padding="CAUSAL", dims=1),
    dp.repeat(2, dp.residual(dp.self_attention(1))), dp.add_norm(dp.self_attention(1))], ids=repr)
def test_layers_of_time_mix_it_and_no_examples(net):
    x = jax.random.normal(KEY, (6, 4, 4))
    params, _ = net.init(KEY, x)
    assert not any(mixed(lambda x: net(params, x), x))
    if net.name != "recurrent":  # which requires a batch axis
        assert all(mixed(lambda x: net(params, x), x[:, 0]))  # without examples: along time
