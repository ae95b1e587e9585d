"""The U-Net of diffusion: its parameters, counted by hand; a block in NumPy; it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, computes, drawn
from support.counting import attention, conv, count, linear, norm
from support.learning import IMAGES, differs, filled, learns

import diffprog as dp
from diffprog.models.unet import _block

SMALL = {"widths": (4, 6), "depth": 1, "attention": (), "groups": 2}
X = jnp.asarray(drawn(2, 4, 4, 1), jnp.float32)
TIME = jnp.array([3, 70])


def test_the_parameters_of_the_unet():
    """The paper's net for CIFAR-10 has 35.7 million, section 4 and appendix B."""

    def block(before, width):
        shortcut = conv(1, before, width) + width if before != width else 0
        convs = conv(3, before, width) + conv(3, width, width) + 2 * width
        return norm(before) + norm(width) + convs + linear(512, width) + shortcut

    attend = norm(256) + attention(256)
    move = conv(3, 256, 256) + 256  # down- or upsampling
    down = (2 * block(128, 128) + conv(3, 128, 128) + 128
            + block(128, 256) + block(256, 256) + 2 * attend + move
            + 2 * block(256, 256) + move + 2 * block(256, 256))
    middle = 2 * block(256, 256) + attend
    up = (3 * block(512, 256) + move + 3 * block(512, 256) + move
          + 2 * block(512, 256) + block(256 + 128, 256) + 3 * attend + move
          + block(256 + 128, 128) + 2 * block(128 + 128, 128))
    ends = conv(3, 3, 128) + 128 + norm(128) + conv(3, 128, 3) + 3
    derived = linear(128, 512) + linear(512, 512) + down + middle + up + ends
    assert derived == 35_746_307
    assert count("unet") == derived + 11 * 512  # ten classes, and one for no class


@pytest.mark.slow
def test_a_block_in_numpy():
    """On an image of one pixel a convolution is its central kernel."""

    def normed(x):
        pairs = x.reshape(2, 2, -1)
        centered = pairs - pairs.mean(-1, keepdims=True)
        return (centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)).reshape(x.shape)

    def silu(x):
        return x / (1 + np.exp(-x))

    x, told = drawn(2, 1, 1, 4), drawn(2, 5, seed=1)
    kernels = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate({
        "conv_1": (3, 3, 4, 6), "shift": (5, 6), "conv_2": (3, 3, 6, 6), "shortcut": (1, 1, 4, 6),
    }.items())}
    params = {name: {"kernel": kernel, "bias": np.full(6, 0.1)} for name, kernel in kernels.items()}
    for name, width in (("norm_1", 4), ("norm_2", 6)):
        params[name] = {"scale": np.ones(width), "bias": np.zeros(width)}
    flat = x[:, 0, 0]
    y = silu(normed(flat)) @ kernels["conv_1"][1, 1] + 0.1 + silu(told) @ kernels["shift"] + 0.1
    y = silu(normed(y)) @ kernels["conv_2"][1, 1] + 0.1
    y = y + flat @ kernels["shortcut"][0, 0] + 0.1

    @dp.program(block=_block(6, 2, 0.0, 1e-6, project=True))
    def net(layers, x):
        return layers.block(x, condition=jnp.asarray(told))

    computes(net, {"block": params}, x, y[:, None, None])


@pytest.mark.slow
def test_output_depends_on_time_class_and_the_coarse_grid():
    net = dp.models.unet(1, classes=3, **SMALL)
    params = filled(net.plan(X, time=TIME).params)
    run = jax.jit(lambda params, condition, time: net(params, X, time=time, condition=condition))
    y = run(params, jnp.array([3, 3]), TIME)
    assert differs(run(params, jnp.array([3, 3]), TIME + 1), y)
    assert differs(run(params, jnp.array([1, 3]), TIME)[0], y[0])
    coarse = dp.tree.select(params, "middle/**/conv_2/kernel")
    without = {path: jnp.zeros_like(leaf) if path in coarse else leaf
               for path, leaf in dp.tree.paths(params).items()}
    without = jax.tree.unflatten(jax.tree.structure(params), list(without.values()))
    assert differs(run(without, jnp.array([3, 3]), TIME), y)


@pytest.mark.slow
def test_attention_is_at_the_given_levels():
    def attentive(levels):
        net = dp.models.unet(1, **SMALL | {"attention": levels})
        return {path.split("/")[0] for path in dp.tree.paths(net.plan(X, time=TIME).params)
                if "attend" in path}

    assert attentive(()) == {"middle"}
    assert attentive((1,)) == {"middle", "down_1", "up_1"}
    assert attentive((1, 2)) == {"middle", "down_1", "up_1", "down_2", "up_2"}


def test_a_condition_without_classes_raises():
    net = dp.models.unet(1, **SMALL)
    with pytest.raises(dp.LayerError, match="no condition, for a net without classes"):
        net.init(KEY, X, time=TIME, condition=TIME)


@pytest.mark.slow
def test_it_learns_eight_examples():
    net = dp.models.unet(1, widths=(8, 16), depth=1, groups=4,
        classes=4) >> dp.flatten() >> dp.linear(4)
    batch = IMAGES | {"time": np.arange(8), "condition": np.zeros(8, int)}
    learns(net, dp.classification(), batch, 80)
