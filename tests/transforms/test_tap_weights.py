"""`tap(..., attention_weights=True)`: attention weights, by the formula, through every wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import close, drawn, same
from support.in_numpy import multihead, numbers, visible

import diffprog as dp

X, MEMORY = np.float32(drawn(2, 6, 8)), np.float32(drawn(2, 4, 3, seed=1))
MASK = np.array([[1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]], bool)
SEGMENTS = np.array([[0, 0, 1, 1, 1, 2], [3, 3, 3, 2, 2, 2]])
OWN = dp.self_attention(2, causal=True)
TURNING = dp.self_attention(4, kv_heads=2, rotary=dp.rotary())

NETS = {
    "whole": (dp.serial(a=OWN), {}),
    "mask": (dp.serial(a=dp.self_attention(2)), {"mask": MASK}),
    "all padding": (dp.serial(a=dp.self_attention(2)), {"mask": MASK & np.array([[1], [0]], bool)}),
    "window": (dp.serial(a=dp.self_attention(2, causal=True, window=2)), {"mask": MASK}),
    "segments": (dp.serial(a=OWN), {"segments": SEGMENTS}),
    "shared keys": (dp.serial(a=TURNING), {}),
    "cross": (dp.serial(a=dp.cross_attention(2)), {"memory": MEMORY}),
    "blocks": (dp.serial(a=dp.self_attention(2, causal=True, implementation="blocks")), {}),
    "mixed for a kernel": (
        dp.serial(a=dp.mixed(dp.self_attention(1, head_dim=8), jnp.bfloat16)), {}),
    "heads": (dp.heads(3, dp.attention_head(4)) >> dp.linear(8), {}),
    "repeat": (dp.repeat(2, dp.residual(OWN)), {}),
    "remat in repeat": (dp.repeat(2, dp.remat(dp.pre_norm(OWN))), {"segments": SEGMENTS}),
    "mixed": (dp.mixed(dp.serial(a=OWN), jnp.bfloat16), {}),
    "mixed inside": (dp.serial(a=dp.mixed(OWN, jnp.bfloat16)), {}),
    "lora": (dp.lora(dp.serial(a=OWN), 2), {}),
    "lora inside": (dp.serial(a=dp.lora(OWN, 2)), {}),
    "program": (dp.program(a=dp.self_attention(2), b=dp.linear(8))(
        lambda layers, x: x + layers.b(layers.a(x))), {}),
}


def tapped(net, side):
    """The output, the weights of its one attention layer, and the output without a tap."""
    params = numbers(net, X, **side)
    y, seen = jax.jit(dp.tap(net, "**", attention_weights=True))(params, X, **side)
    (weights,) = seen.values()
    return y, weights, jax.jit(net)(params, X, **side)


@pytest.mark.parametrize("name", NETS)
def test_the_output_stays_and_rows_sum_to_1(name):
    y, weights, alone = tapped(*NETS[name])
    close(y, alone)
    sums = np.asarray(weights, np.float32).sum(-1)
    empty = sums == 0
    np.testing.assert_allclose(sums[~empty], 1, atol=0.01 if "mixed" in name else 1e-6)
    assert empty.any() == (name in ("all padding", "window"))


@pytest.mark.parametrize("name", ["whole", "mask", "window", "segments", "shared keys", "cross",
                                  "blocks"])
def test_weights_are_the_output_for_values_that_are_unit_vectors(name):
    """The reference computes y only: with values eye(S) it is the weights."""
    net, side = NETS[name]
    layer = net.children["a"]
    params = numbers(net, X, **side)["a"]
    weights = tapped(net, side)[1]
    settings = layer.settings
    heads, kv_heads = settings["heads"], settings.get("kv_heads") or settings["heads"]
    keys = weights.shape[-1]
    own = {name: params[name] for name in ("query", "key")}
    unit = {"kernel": np.zeros((keys, kv_heads * keys)), "bias": 0}
    unit["kernel"] = np.tile(np.eye(keys), kv_heads)
    x = np.float64(X)
    if "mask" in side:
        x = np.where(MASK[..., None], x, 0)
    memory = side.get("memory", x)
    seen = visible(6, causal=settings.get("causal", False), window=settings.get("window"),
                   mask=side.get("mask"), segments=side.get("segments"))
    units = np.broadcast_to(np.eye(keys), (2, keys, keys))
    wanted = multihead(
        own | {"value": unit}, x, heads=heads, kv_heads=kv_heads, memory=(memory, units),
        seen=None if name == "cross" else seen,
        positions=[range(6)] * 2 if settings.get("rotary") else None)
    wanted = np.stack(np.split(wanted, heads, -1), 1)  # (batch, heads, query, key)
    np.testing.assert_allclose(weights, wanted, atol=1e-6)


def test_copies_have_a_leading_axis_and_are_those_of_each_copy():
    net = dp.repeat(3, OWN)
    params = numbers(net, X)
    net = dp.serial(blocks=net)
    _, seen = dp.tap(net, "blocks", attention_weights=True)({"blocks": params}, X)
    x, one = X, dp.tap(dp.serial(a=OWN), "a", attention_weights=True)
    for i in range(3):
        x, (alone,) = (lambda y, seen: (y, seen.values()))(
            *one({"a": jax.tree.map(lambda a, i=i: a[i], params)}, x))
        close(seen["blocks"][i], alone)


STREAMS = {
    "cache": (dp.serial(a=OWN), {}, 8), "window": (dp.serial(a=dp.self_attention(
        2, causal=True, window=3)), {}, 2 + 1),
    "repeat": (dp.repeat(2, dp.residual(OWN)), {}, 8),
    "heads": (dp.heads(2, dp.attention_head(4, causal=True)), {}, 8),
    "memory": (dp.serial(a=OWN, b=dp.cross_attention(2)), {"memory": MEMORY}, 8),
}


@pytest.mark.parametrize("name", STREAMS)
def test_weights_in_a_stream_are_the_last_rows_of_the_whole(name):
    net, side, keys = STREAMS[name]
    net = dp.serial(f=net)
    params = numbers(net, X, **side)
    net = dp.tap(net, "**", attention_weights=True)
    whole, wanted = net(params, X, **side)
    state = net.start(params, {}, X[:, :5], length=8, **side)
    (first, _), state = net.apply(params, state, X[:, :5])
    (last, seen), state = net.apply(params, state, X[:, 5:])
    close(jnp.concatenate([first, last], 1), whole)
    for path, weights in seen.items():
        row, all_keys = wanted[path][..., -1:, :], weights.shape[-1]
        if path.endswith("b"):
            close(weights, row)  # the keys of memory
        else:
            assert all_keys == keys
            newest = weights[..., -3:] if name == "window" else weights[..., :6]
            close(newest, row[..., -newest.shape[-1]:])


def test_gradients_flow_through_weights():
    net = dp.serial(a=OWN)
    params = numbers(net, X)
    tap = dp.tap(net, "a", attention_weights=True)
    flat = jax.grad(lambda p: (tap(p, X)[1]["a"] ** 2).sum())(params)
    assert all(np.abs(flat["a"][name]["kernel"]).max() > 0 for name in ("query", "key"))
    assert not np.abs(flat["a"]["value"]["kernel"]).any()


def test_weights_in_training_are_those_after_dropout():
    net = dp.serial(a=dp.self_attention(2, dropout=0.5))
    params = numbers(net, X)
    tap, key = dp.tap(net, "a", attention_weights=True), jax.random.key(0)
    (y, seen), _ = tap.apply(params, {}, X, key=key, train=True)
    same(y, net.apply(params, {}, X, key=key, train=True)[0])
    plain = tap(params, X)[1]["a"]
    kept = seen["a"] > 0
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(seen["a"][kept], 2 * plain[kept], rtol=1e-5)


@pytest.mark.parametrize("outer", [True, False])
def test_weights_and_output_of_one_layer(outer):
    net = dp.serial(a=OWN)
    params = numbers(net, X)
    both = dp.tap(dp.tap(net, "a", attention_weights=outer), "a", attention_weights=not outer)
    (y, first), second = both(params, X)
    weights, output = (first["a"], second["a"]) if outer else (second["a"], first["a"])
    assert weights.shape == (2, 2, 6, 6)
    same(output, y)


def test_the_program_without_a_tap_computes_no_weights_of_its_own():
    """The jaxpr of the net is the same before and after it was tapped."""
    net = dp.serial(a=OWN)
    params = numbers(net, X)
    before = str(jax.make_jaxpr(net)(params, X))
    dp.tap(net, "a", attention_weights=True)(params, X)
    assert str(jax.make_jaxpr(net)(params, X)) == before
    assert "f32[2,2,6,6]" not in str(jax.make_jaxpr(net)(params, X).out_avals)
