"""Attention layers against NumPy and against equal compositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import close, drawn
from support.in_numpy import affine, multihead, numbers, visible

import diffprog as dp
from diffprog.layers.attention import dot_product as module

STEPS, WIDTH = 5, 6
X, MEMORY, VALUES = drawn(2, STEPS, WIDTH), drawn(2, 4, 3, seed=1), drawn(2, 4, 2, seed=2)
MASK = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]], bool)
HALF = np.array([True, False])  # the second example is all padding
REMEMBERED = np.array([[1, 0, 1, 1], [0, 0, 0, 0]], bool)
SEGMENTS = np.array([[0, 0, 1, 1, 1], [3, 2, 2, 2, 3]])
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 2, 9, 9, 0]])
PAIRS, BIAS = drawn(2, 2, STEPS, STEPS, seed=3) > 0, drawn(2, 2, STEPS, STEPS, seed=4)
ASKED = drawn(2, 2, STEPS, 4, seed=5) > 0


def own(heads=2, **options):
    return dp.self_attention(heads, **options)


def asking(**options):
    return dp.cross_attention(2, **options)


def head(features=4, **options):
    return dp.attention_head(features, **options)


CAUSAL, CLEARED = visible(STEPS, causal=True), np.where(MASK[..., None], X, 0)
ROTARY = dp.rotary()

# name -> layer, side inputs, x as NumPy takes it, the options of NumPy
FORMULAS = {
    "self": (own(), {}, X, {}),
    "six heads, no bias": (own(6, bias=False, scale=0.7), {}, X, {"heads": 6, "scale": 0.7}),
    "sizes": (own(head_dim=4, value_dim=5), {}, X, {}),
    "shared keys": (own(4, head_dim=3, kv_heads=2), {}, X, {"heads": 4, "kv_heads": 2}),
    "one key for all": (own(3, kv_heads=1, value_dim=1), {}, X, {"heads": 3, "kv_heads": 1}),
    "causal": (own(causal=True), {}, X, {"seen": CAUSAL}),
    "window": (own(causal=True, window=2), {}, X,
               {"seen": visible(STEPS, causal=True, window=2)}),
    "window of one": (own(causal=True, window=1), {}, X, {"seen": np.eye(STEPS, dtype=bool)}),
    "mask": (own(), {"mask": MASK}, CLEARED, {"seen": visible(STEPS, mask=MASK)}),
    "mask of examples": (own(), {"mask": HALF}, np.where(HALF[:, None, None], X, 0),
                         {"seen": HALF[:, None, None, None]}),
    "window and mask": (own(causal=True, window=2), {"mask": MASK}, CLEARED,
                        {"seen": visible(STEPS, causal=True, window=2, mask=MASK)}),
    "segments": (own(), {"segments": SEGMENTS}, X, {"seen": visible(STEPS, segments=SEGMENTS)}),
    "segments and mask": (
        own(causal=True), {"segments": SEGMENTS, "mask": MASK}, CLEARED,
        {"seen": visible(STEPS, causal=True, mask=MASK, segments=SEGMENTS)}),
    "causal, attention_mask": (own(causal=True), {"attention_mask": PAIRS[:, :1]}, X,
                               {"seen": CAUSAL & PAIRS[:, :1]}),
    "attention_bias": (own(), {"attention_bias": BIAS}, X, {"bias": BIAS}),
    "rotary": (own(1, rotary=ROTARY), {}, X, {"heads": 1, "positions": [range(STEPS)] * 2}),
    "rotary at positions": (
        own(3, head_dim=4, kv_heads=1, rotary=ROTARY, causal=True), {"positions": POSITIONS}, X,
        {"heads": 3, "kv_heads": 1, "positions": POSITIONS, "seen": CAUSAL}),
    "cross": (asking(), {"memory": MEMORY}, X, {"memory": MEMORY}),
    "cross, a pair": (asking(value_dim=4), {"memory": (MEMORY, VALUES)}, X,
                      {"memory": (MEMORY, VALUES)}),
    "cross, masked": (
        asking(kv_heads=1), {"memory": MEMORY, "memory_mask": REMEMBERED}, X,
        {"kv_heads": 1, "memory": MEMORY, "seen": REMEMBERED[:, None, None]}),
    "cross, both masks": (
        asking(), {"memory": MEMORY, "memory_mask": REMEMBERED, "attention_mask": ASKED}, X,
        {"memory": MEMORY, "seen": REMEMBERED[:, None, None] & ASKED}),
    "head": (head(), {}, X, {"heads": 1}),
    "head with other values": (head(value_features=5, scale=0.2), {"mask": MASK}, CLEARED,
                               {"heads": 1, "scale": 0.2, "seen": visible(STEPS, mask=MASK)}),
    "head with memory": (head(), {"memory": (MEMORY, VALUES), "memory_mask": REMEMBERED}, X,
                         {"heads": 1, "memory": (MEMORY, VALUES),
                          "seen": REMEMBERED[:, None, None]}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_output_equals_loops_in_numpy(name):
    net, side, x, options = FORMULAS[name]
    with jax.enable_x64(True):
        params = numbers(net, X, **side)
        y = jax.jit(net)(params, X, **side)
        wanted = multihead(params, x, **{"heads": 2, **options})
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alike", [(0,), (2,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize(("name", "full"), [
    ("attention_mask", PAIRS), ("attention_bias", np.float32(BIAS)),
], ids=["mask", "bias"])
def test_axes_of_size_1_broadcast(alike, name, full):
    net, index = own(causal=True), tuple(slice(0, 1 if i in alike else None) for i in range(4))
    params = numbers(net, X)
    part = full[index]
    one, all_of_it = (jax.jit(net)(params, np.float32(X), **{name: given}) for given in (
        part, np.broadcast_to(part, full.shape)))
    close(one, all_of_it)


@pytest.mark.slow
@pytest.mark.parametrize(("net", "side"), [
    (own(causal=True, rotary=dp.rotary(features=2)),
     {"mask": MASK, "segments": SEGMENTS, "positions": POSITIONS}),
    (asking(), {"memory": np.float32(MEMORY), "memory_mask": REMEMBERED}),
], ids=["self", "cross"])
def test_any_number_of_batch_axes(net, side):
    params = numbers(net, np.float32(X), **side)
    run = jax.jit(net)
    wanted = run(params, np.float32(X), **side)
    alone, apart = ({name: a[f] for name, a in side.items()} for f in (1, (slice(None), None)))
    close(run(params, np.float32(X[1]), **alone), wanted[1])
    close(run(params, np.float32(X[:, None]), **apart), wanted[:, None])


# Equal compositions.

def by_head(params, heads):
    """The parameters of `self_attention` as those of ``heads(n, attention_head(d)) >> linear(m)``.
    """
    stack = lambda a: jnp.stack(jnp.split(a, heads, -1))  # noqa: E731
    return {"heads_0": jax.tree.map(stack, {n: a for n, a in params.items() if n != "out"}),
            "linear_0": params["out"]}


@pytest.mark.parametrize("name", ["plain", "causal", "window", "mask", "rotary", "bias", "cross"])
def test_heads_of_attention_head_equal_the_joined_layer(name):
    memory = {"memory": np.float32(MEMORY), "memory_mask": REMEMBERED}
    options, side = {
        "plain": ({}, {}), "causal": ({"causal": True}, {}), "mask": ({}, {"mask": MASK}),
        "window": ({"causal": True, "window": 2}, {"mask": MASK, "segments": SEGMENTS}),
        "rotary": ({"rotary": ROTARY, "bias": False}, {"positions": POSITIONS}),
        "bias": ({"scale": 2.0}, {"attention_bias": np.float32(BIAS[:, :1])}),
        "cross": ({}, memory),
    }[name]
    joined = asking() if side is memory else own(3, head_dim=2, **options)
    heads = 2 if side is memory else 3
    single = dp.attention_head(WIDTH // heads, **options) if side is memory else (
        dp.attention_head(2, **options))
    composed = dp.heads(heads, single) >> dp.linear(WIDTH, bias=options.get("bias", True))
    x = np.float32(X)
    params = numbers(joined, x, **side)
    dp.tree.verify(composed, by_head(params, heads), x, **side)

    def total(net, params, x):
        y = net(params, x, **side)
        return jnp.sum(jnp.sin(y)), y

    @jax.jit
    def both(params, x):
        two = lambda params, x: total(composed, by_head(params, heads), x)  # noqa: E731
        one = lambda params, x: total(joined, params, x)  # noqa: E731
        return [jax.value_and_grad(f, (0, 1), has_aux=True)(params, x) for f in (one, two)]

    close(*both(params, x))


@pytest.mark.slow
def test_attention_is_a_linear_map_over_time_with_a_kernel_computed_from_x():
    """``y = kernel @ v`` with the T x T kernel softmax(q k^T / sqrt(d)): a linear map over time."""
    net = head(4, value_features=3)
    with jax.enable_x64(True):
        params = numbers(net, X)
        query, key, value = (affine(params[name], X) for name in ("query", "key", "value"))
        kernel = np.asarray(jax.nn.softmax(query @ key.swapaxes(1, 2) / 2.0))
        np.testing.assert_allclose(kernel.sum(-1), 1, atol=1e-12)
        y = net(params, X)
        np.testing.assert_allclose(y, kernel @ value, atol=1e-12)
        over_time = dp.linear(STEPS, bias=False)
        mapped = jax.vmap(over_time)({"kernel": kernel.swapaxes(1, 2)}, value.swapaxes(1, 2))
        np.testing.assert_allclose(y, mapped.swapaxes(1, 2), atol=1e-12)


ORDER = np.array([3, 0, 4, 1, 2])


@pytest.mark.parametrize(("net", "kept"), [
    (own(), True), (dp.add_norm(own()) >> dp.add_norm(dp.ffn(7)), True),
    (own(causal=True), False), (own(1, rotary=ROTARY), False),
    (dp.sinusoidal_positions() >> own(), False)], ids=repr)
def test_attention_without_positions_or_causality_is_permutation_equivariant(net, kept):
    x = np.float32(X)
    params = numbers(net, x)
    run = jax.jit(net)
    y, other = run(params, x), run(params, x[:, ORDER])
    far = float(jnp.abs(other - y[:, ORDER]).max())
    assert far < 1e-5 if kept else far > 1e-2


def test_rotary_attention_depends_on_positions_not_on_array_order():
    """Rotary attention depends on distances of positions alone, not on the order in the array."""
    net, x = own(1, rotary=ROTARY), np.float32(X)
    params = numbers(net, x)
    y = jax.jit(net)(params, x)
    turned = jax.jit(net)(params, x[:, ORDER], positions=np.stack([ORDER, ORDER + 1000]))
    close(turned, y[:, ORDER])


def test_a_query_with_one_key_returns_its_value():
    net, x = own(3, causal=True, window=1), np.float32(X)
    params = numbers(net, x)
    wanted = affine(params["out"], affine(params["value"], x))
    close(net(params, x), wanted)


# Dtypes and `summary`.

@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_inputs_return_16_bit_outputs(dtype):
    net = own(causal=True, rotary=dp.rotary(features=2))
    x = jnp.asarray(X, dtype)
    params = numbers(net, x)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    y, wanted = jax.jit(net)(params, x), jax.jit(net)(params, x.astype(jnp.float32))
    assert y.dtype == dtype
    coarse = 8 * float(jnp.finfo(dtype).eps) * float(jnp.abs(wanted).max())
    np.testing.assert_allclose(np.float32(y), wanted, rtol=0, atol=coarse)
    crossing = asking()
    y = crossing(numbers(crossing, x, memory=MEMORY), x, memory=np.float32(MEMORY))
    assert y.dtype == dtype


@pytest.mark.slow
def test_summary_reports_the_implementation(monkeypatch, request):
    request.addfinalizer(module.dot_product.clear_cache)  # traced with a patched kernel
    def reported(net, steps, dtype, **side):
        x = jax.ShapeDtypeStruct((2, steps, 64), dtype)
        return [row.choice for row in dp.summary(net, x, **side).rows if "attention" in
                row.layer.name]

    long, net, half = module._LONG, own(causal=True), jnp.bfloat16
    assert reported(net, long, half) == ["blocks"] and reported(net, long - 1, half) == ["xla"]
    monkeypatch.setattr(module, "_on_hopper", lambda: True)
    monkeypatch.setattr(module.jax.nn, "dot_product_attention", lambda q, *_, **__: q)  # on a CPU
    assert reported(own(causal=True), long, half) == ["blocks, cudnn on cuda"]
    assert reported(own(causal=True), 8, half) == ["xla, cudnn on cuda"]
    assert reported(own(), long, half) == ["xla, cudnn on cuda"]
    assert reported(own(causal=True), long, jnp.float32) == ["blocks"]
    dropping = own(causal=True, dropout=0.1)  # a summary is that of inference
    assert reported(dropping, long, half) == ["blocks, cudnn on cuda"]
    valid = jnp.ones((2, long), bool)
    assert reported(own(causal=True), long, half, mask=valid) == ["blocks, cudnn on cuda"]
    assert reported(own(causal=True, window=9), long, half, mask=valid) == ["blocks"]
    assert reported(own(causal=True), long, half, segments=jnp.ones((2, long), int)) == ["blocks"]
    assert reported(own(causal=True, implementation="xla"), long, half) == ["xla"]
    assert reported(own(head_dim=20), 8, half) == ["xla"]
    memory = jax.ShapeDtypeStruct((2, 9, 3), half)
    assert reported(asking(), 8, half, memory=memory) == ["xla, cudnn on cuda"]
    nested = dp.repeat(2, dp.pre_norm(own(causal=True)))
    assert reported(nested, long, half) == ["blocks, cudnn on cuda"]
    text = str(dp.summary(nested, jax.ShapeDtypeStruct((2, long, 64), half)))
    assert text.splitlines()[0].endswith("computed by") and "blocks, cudnn on cuda" in text
    table = str(dp.summary(dp.linear(3), jnp.ones((2, 4))))
    assert "computed by" not in table
