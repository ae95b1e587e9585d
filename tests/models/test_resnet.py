"""Residual networks: parameters counted by hand, sides, initial blocks; they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import IMAGE
from support.counting import conv, count
from support.learning import drawn, learns
from support.refusing import refused

import diffprog as dp
from diffprog.models.resnet import basic, bottleneck, stages

KEY = jax.random.key(0)


def resnet(block, counts):
    """The number of parameters: kernels, scales and biases of the norms, and the head."""
    total = conv(7, 3, 64) + 2 * 64
    channels = 64
    for i, blocks in enumerate(counts):
        width = 64 * 2**i
        for _ in range(blocks):
            if block == "basic":
                chain = [(3, channels, width), (3, width, width)]
            else:
                chain = [(1, channels, width), (3, width, width), (1, width, 4 * width)]
            out = chain[-1][2]
            if channels != out:
                chain.append((1, channels, out))
            total += sum(conv(*c) + 2 * c[2] for c in chain)
            channels = out
    return total + channels * 1000 + 1000


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "block", "counts", "known"), [
    (18, "basic", (2, 2, 2, 2), 11_689_512), (34, "basic", (3, 4, 6, 3), 21_797_672),
    (50, "bottleneck", (3, 4, 6, 3), 25_557_032), (101, "bottleneck", (3, 4, 23, 3), 44_549_160),
    (152, "bottleneck", (3, 8, 36, 3), 60_192_808),
])
def test_the_parameters_of_resnets(depth, block, counts, known):
    assert count(f"resnet_{depth}") == resnet(block, counts) == known


@pytest.mark.slow
def test_sides_of_a_resnet():
    """Table 1 of the paper: sides of 56, 28, 14 and 7 after the stages."""
    rows = {row.path: row.output.shape for row in dp.summary(dp.models.resnet(50), IMAGE).rows}
    assert [rows[f"stage_{i}"] for i in (1, 2, 3, 4)] == [
        (1, 56, 56, 256), (1, 28, 28, 512), (1, 14, 14, 1024), (1, 7, 7, 2048)]


@pytest.mark.slow
@pytest.mark.parametrize("block", [basic, bottleneck])
@pytest.mark.parametrize("zero_init", [True, False])
def test_a_block_starts_as_the_identity(block, zero_init):
    x = jax.nn.relu(jax.random.normal(KEY, (2, 5, 5, 8)))
    width = 8 if block is basic else 2
    net = block(width, zero_init=zero_init)
    y, _ = net.apply(*net.init(KEY, x), x, train=True)
    assert np.array_equal(y, x) == zero_init


def test_stages_of_one_block():
    net = dp.serial(**stages(basic, (1, 1), (4, 8)))
    assert list(net.children) == ["stage_1", "stage_2"]
    assert list(net.children["stage_1"].children) == ["rest"]
    assert list(net.children["stage_2"].children) == ["first"]


def test_a_stem_with_other_channels_raises():
    narrow = dp.models.resnet(18, 10, width=4, stem=dp.conv(5, 3))
    error = refused(narrow.init, KEY, jnp.ones((1, 8, 8, 1)))
    assert error.path == "stage_1/rest/residual_0" and error.got == "float32[1,8,8,4]"


@pytest.mark.slow
def test_it_learns_eight_examples():
    learns(dp.models.resnet(18, 4, width=4, stem=dp.conv(4, 3)), dp.classification(),
        drawn(8, 8, 1), 40)
