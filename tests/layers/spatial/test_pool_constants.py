"""XLA evaluates no large constant for a pool, which may take a minute of compile time."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

IMAGE, LINE, VOLUME = (2, 64, 64, 3), (2, 4096, 3), (2, 16, 16, 16, 2)
MASK = np.arange(4096) % 5 > 0
POOLS = {
    "avg SAME": (dp.avg_pool(3, stride=1, padding="SAME"), IMAGE),
    "avg padded": (dp.avg_pool((5, 3), stride=(2, 1), padding=((1, 2), (0, 1))), IMAGE),
    "avg counted": (dp.avg_pool(3, stride=1, padding="SAME", count_padding=True), IMAGE),
    "avg 1-d": (dp.avg_pool(3, dims=1, stride=1, padding="SAME"), LINE),
    "avg 3-d": (dp.avg_pool(3, dims=3, stride=1, padding="SAME"), VOLUME),
    "max SAME": (dp.max_pool(3, stride=1, padding="SAME"), IMAGE),
    "max dilated": (dp.max_pool(3, stride=1, padding=2, dilation=2), IMAGE),
    "max 1-d": (dp.max_pool(3, dims=1, stride=2, padding=1), LINE),
    "max 3-d": (dp.max_pool(2, dims=3, stride=1, padding="SAME"), VOLUME),
    "global avg": (dp.global_avg_pool(), IMAGE),
    "global max": (dp.global_max_pool(), IMAGE),
    "adaptive avg": (dp.adaptive_avg_pool(5), IMAGE),
    "adaptive max": (dp.adaptive_max_pool(5), IMAGE),
}
MASKED = {
    "avg": dp.avg_pool(3, dims=1, stride=1, padding="SAME"),
    "max": dp.max_pool(3, dims=1, stride=1, padding="SAME"),
    "global avg": dp.global_avg_pool(dims=1), "global max": dp.global_max_pool(dims=1),
    "adaptive avg": dp.adaptive_avg_pool(3, dims=1),
    "adaptive max": dp.adaptive_max_pool(3, dims=1),
}


def constants(f, *given):
    """The sizes of the constants in the program of f and its gradient, after optimization."""
    def total(x, *rest):
        return jnp.sum(jnp.cos(f(x, *rest)))

    text = jax.jit(jax.value_and_grad(total)).lower(*given).compile().as_text()
    found = re.findall(r"= \w+\[([\d,]*)\]\S* constant\(", text)
    assert found  # the pattern matches the text of XLA
    return [math.prod(map(int, filter(None, sizes.split(",")))) for sizes in found]


def floats(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLS)
def test_no_pool_holds_a_large_constant(name):
    net, shape = POOLS[name]
    assert max(constants(functools.partial(net, {}), floats(shape))) <= 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("side", ["mask", "segments"])
def test_no_masked_pool_holds_a_large_constant(name, side):
    if side == "segments" and name not in ("avg", "max"):
        return  # these raise for segments
    given = jax.ShapeDtypeStruct(LINE[:2], bool if side == "mask" else jnp.int32)
    pooled = lambda x, given: MASKED[name]({}, x, **{side: given})  # noqa: E731
    assert max(constants(pooled, floats(LINE), given)) <= 1000


def test_avg_pool_has_no_sliding_sum_of_ones():
    traced = str(jax.make_jaxpr(functools.partial(POOLS["avg SAME"][0], {}))(floats(IMAGE)))
    assert traced.count("reduce_window") == 1 and "iota" in traced


@pytest.mark.slow
@pytest.mark.parametrize(("net", "shape"), [
    (dp.avg_pool((2, 3), stride=(3, 2), padding=((1, 0), (2, 1))), (1, 5, 4, 2)),
    (dp.avg_pool(3, dims=1, stride=2, padding="SAME"), (2, 6, 1)),
], ids=["in numbers", "SAME"])
def test_counts_of_positions_equal_a_sum_of_ones(net, shape):
    """The mean of ones is one; padding that counts as zeros lowers it."""
    ones = jnp.ones(shape)
    assert (net({}, ones) == 1).all()
    counted = dp.avg_pool(**net.settings | {"count_padding": True})
    assert (counted({}, ones) < 1).any()
