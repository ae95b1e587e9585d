"""Unrolling: the same output without a loop, with parameters under other paths."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from support.writing_nets import KEY, NETS, trees

import diffprog as dp
from diffprog.transforms.unroll import unrolled

GPT = NETS["gpt"]


@pytest.mark.slow
def test_unrolled_repeat_returns_the_same_output():
    net, split = unrolled(GPT)
    params, _ = trees("gpt")
    ids = jnp.array([[1, 2, 3]])
    other = split(params)
    dp.tree.verify(net, other, ids)
    assert "trunk/blocks/copy_1/attend/body/query/kernel" in dp.tree.paths(other)
    np.testing.assert_allclose(net(other, ids), GPT(params, ids), rtol=1e-5, atol=1e-6)
    assert unrolled(NETS["lstm"])[0] is NETS["lstm"]  # it has no repeat
    nested = dp.repeat(2, dp.residual(dp.repeat(3, dp.batch_norm())))
    params, state = nested.init(KEY, jnp.ones((4, 2)))
    net, split = unrolled(nested)
    wanted = net.plan(jnp.ones((4, 2)))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        (split(params), split(state)), (wanted.params, wanted.state))
