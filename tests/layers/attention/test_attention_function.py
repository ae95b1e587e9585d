"""`dp.attention`, the plain function: by loops in NumPy, and as the inside of `attention_head`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import close, drawn
from support.in_numpy import attend, numbers

import diffprog as dp

QUERY, KEY, VALUE = (np.float32(drawn(2, 4, steps, 3, seed=steps)) for steps in (5, 6, 6))
MASK, BIAS = drawn(2, 4, 5, 6, seed=3) > 0, np.float32(drawn(1, 4, 5, 6, seed=4))
CAUSAL = np.tril(np.ones((5, 5), bool))

CASES = {
    "plain": ((QUERY, KEY, VALUE), {}, {}),
    "other values": ((QUERY, KEY, VALUE[..., :2]), {"scale": 0.3}, {"scale": 0.3}),
    "mask": ((QUERY, KEY, VALUE), {"mask": MASK}, {"seen": MASK}),
    "bias": ((QUERY, KEY, VALUE), {"bias": BIAS}, {"bias": BIAS}),
    "one mask for all": ((QUERY, KEY, VALUE), {"mask": MASK[0, 0]}, {"seen": MASK[0, 0]}),
    "no key": ((QUERY, KEY, VALUE), {"mask": np.zeros((5, 1), bool)},
               {"seen": np.zeros((5, 6), bool)}),
    "shared heads": ((QUERY, KEY[:, :2], VALUE[:, :2]), {}, {}),
    "causal": ((QUERY, KEY[:, :, :5], VALUE[:, :, :5]), {"causal": True}, {"seen": CAUSAL}),
    "causal in blocks": ((QUERY, KEY[:, :, :5], VALUE[:, :, :5]),
                         {"causal": True, "implementation": "blocks"}, {"seen": CAUSAL}),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_loops_in_numpy(name):
    operands, options, of_numpy = CASES[name]
    close(jax.jit(lambda *a: dp.attention(*a, **options))(*operands), attend(
        *operands, **of_numpy))


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_any_leading_axes(rank):
    def of_rank(a):
        return a[0, 0] if rank == 2 else a[0] if rank == 3 else a[:, None]

    y = dp.attention(of_rank(QUERY), of_rank(KEY), of_rank(VALUE), bias=of_rank(
        np.broadcast_to(BIAS, (2, 4, 5, 6))))
    close(y, of_rank(attend(QUERY, KEY, VALUE, bias=BIAS)))


def test_attention_head_is_three_linear_maps_and_attention():
    x, memory = np.float32(drawn(2, 5, 4)), np.float32(drawn(2, 6, 3, seed=1))
    head, maps = dp.attention_head(4, 2), (dp.linear(4), dp.linear(4), dp.linear(2))
    params = numbers(head, x, memory=memory)
    query, key, value = (net(params[name], inputs) for net, name, inputs in zip(
        maps, ("query", "key", "value"), (x, memory, memory), strict=True))
    close(head(params, x, memory=memory), dp.attention(query, key, value))


def test_attention_is_a_mean_of_values_with_given_weights():
    """Against a fixed linear map: equal scores are the mean, one large score picks its value."""
    value = jnp.arange(6.0).reshape(3, 2)
    close(dp.attention(jnp.zeros((1, 2)), jnp.ones((3, 2)), value), value.mean(0, keepdims=True))
    close(dp.attention(jnp.array([[100.0]]), jnp.array([[0.0], [1], [0]]), value), value[1:2])
