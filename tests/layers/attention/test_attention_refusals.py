"""Errors of attention in `apply` and `start`."""

import jax.numpy as jnp
import pytest
from support.comparing import KEY
from support.refusing import expect

import diffprog as dp
from diffprog.core.notation import show

X, MEMORY = jnp.ones((2, 5, 12)), jnp.ones((2, 7, 3))
FULL, OVER = "(2, 3, 5, 5)", "or with axes of size 1"
AXES = "give it the axes batch, heads, query and key"
STREAM = "pass mask or segments, or set window"
OWN, CROSS = dp.self_attention(3), dp.cross_attention(3)


@pytest.mark.slow
def test_apply_raises_for_side_inputs_as_init_does():
    params, _ = CROSS.init(KEY, X, memory=MEMORY)
    expect("", "cross_attention(3): wants the side input memory, got none; pass memory=, the "
           "encoder output, in each call: only a stream keeps it", CROSS, params, X)
    expect("", f"cross_attention(3): wants attention_mask as booleans of shape (2, 3, 5, 7), "
           f"{OVER}, got int32[2,1,5,7]; {AXES}", CROSS, params, X, memory=MEMORY,
           attention_mask=jnp.ones((2, 1, 5, 7), int))


def stream(layer, **side):
    """Parameters and a streaming state of 4 steps."""
    params, state = layer.init(KEY, X, **side)
    return params, layer.start(params, state, X[:, :1], length=4, **side)


@pytest.mark.parametrize("name", ["attention_mask", "attention_bias"])
def test_attention_mask_and_bias_raise_in_a_stream(name):
    given = {name: jnp.ones((1, 1, 1, 1), bool if name == "attention_mask" else jnp.float32)}
    shown = show(given[name])
    for layer, side in ((dp.self_attention(3, causal=True), {}), (CROSS, {"memory": MEMORY})):
        params, state = stream(layer, **side)
        message = f"{layer!r}: wants no {name} in a stream, got {shown}; {STREAM}"
        expect("", message, layer.start, params, {}, X[:, :1], length=4, **side, **given)
        expect("", message, layer.apply, params, state, X[:, :1], **given)


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
def test_a_bias_of_one_feature_raises(name):
    params, _ = OWN.init(KEY, X)
    params[name]["bias"] = jnp.zeros(1)
    expect("", "self_attention(3): wants params of 12 features, got {kernel: float32[12,12], bias: "
           "float32[1]}; pass what init returned", OWN.apply, params, {}, X)


@pytest.mark.slow
def test_an_equal_head_continues_a_stream_without_memory():
    first, second = (dp.attention_head(4) for _ in range(2))
    params, state = stream(first, memory=MEMORY)
    y, _ = second.apply(params, state, X[:, :1])
    assert y.shape == (2, 1, 4)
