"""Masking and dropout of attention: exact zeros, also if masked entries are NaN."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, drawn, same
from support.in_numpy import numbers

import diffprog as dp

STEPS, WIDTH = 5, 4
X, MEMORY = np.float32(drawn(3, STEPS, WIDTH)), np.float32(drawn(3, 4, 2, seed=1))
MASK = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]], bool)
REMEMBERED = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], bool)
CAUSAL = dp.self_attention(2, causal=True)

# name -> options of attention_head, side inputs, queries without any key
EMPTY = {
    "mask": ({}, {"mask": MASK}, ~MASK.any(1)[:, None]),
    "causal mask": ({"causal": True}, {"mask": MASK}, ~np.cumsum(MASK, 1).astype(bool)),
    "window": ({"causal": True, "window": 1, "implementation": "blocks"}, {"mask": MASK}, ~MASK),
    "attention_mask": ({}, {"attention_mask": MASK[:, None, :, None]}, ~MASK),
    "attention_bias": ({}, {"attention_bias": np.where(MASK, 0, -np.inf).astype(np.float32)[
        :, None, :, None]}, ~MASK),
    "memory_mask": ({}, {"memory": MEMORY, "memory_mask": REMEMBERED},
                    ~REMEMBERED.any(1)[:, None]),
}


def sums(net, side):
    """A sum over the queries `nothing`, its gradients in params, x and memory, and the outputs."""
    def total(params, x, nothing, memory):
        y = net(params, x, **side | ({"memory": memory} if "memory" in side else {}))
        return jnp.sum(jnp.where(nothing[..., None], jnp.sin(y) + y, 0)), y

    return jax.jit(jax.value_and_grad(total, (0, 1, 3), has_aux=True))


@pytest.mark.parametrize("name", EMPTY)
def test_a_query_without_keys_returns_zeros_and_has_no_gradient(name):
    options, side, nothing = EMPTY[name]
    net = dp.heads(2, dp.attention_head(3, **options))
    nothing = np.broadcast_to(nothing, X.shape[:2])
    params = numbers(net, X, **side)
    run = sums(net, side)
    (_, y), grads = run(params, X, nothing, MEMORY)
    assert nothing.any() and not np.asarray(y)[nothing].any()
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))
    _, grads = run(params, X, ~nothing, MEMORY)  # the other queries have a gradient
    assert np.asarray(y)[~nothing].all() and grads[1].any() and grads[0]["value"]["kernel"].any()
    chex.assert_tree_all_finite(grads)


def test_a_query_without_keys_is_the_bias_after_the_output_map():
    net = dp.self_attention(2)
    params = numbers(net, X)
    y = net(params, X, mask=MASK)
    same(y[0], jnp.broadcast_to(params["out"]["bias"], y[0].shape))


@pytest.mark.parametrize("name", ["self", "causal", "window", "shared", "cross"])
def test_values_in_the_padding_do_not_spread(name):
    net = {"self": dp.self_attention(2, rotary=dp.rotary()), "causal": CAUSAL,
           "window": dp.self_attention(2, causal=True, window=2),
           "shared": dp.self_attention(2, kv_heads=1, causal=True, implementation="blocks"),
           "cross": dp.cross_attention(2)}[name]
    crossing = name == "cross"
    side = {"memory_mask": REMEMBERED} if crossing else {"mask": MASK}
    params = numbers(net, X, memory=MEMORY if crossing else None, **side)

    @jax.jit
    def run(padding):
        def total(params, x, memory):
            x = x if crossing else jnp.where(MASK[..., None], x, padding)
            memory = jnp.where(REMEMBERED[..., None], memory, padding) if crossing else None
            y = net(params, x, memory=memory, **side)
            y = y if crossing else jnp.where(MASK[..., None], y, 0)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(params, X, MEMORY)

    wanted = run(0.0)
    for broken in (np.nan, np.inf, 3e38):
        same(run(broken), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("net", [
    CAUSAL, dp.self_attention(2, causal=True, window=2, rotary=dp.rotary()),
], ids=["causal", "window"])
def test_masks_without_False_change_nothing(net):
    full = np.ones((3, STEPS), bool)
    params = numbers(net, X)
    run = jax.jit(net)
    wanted = run(params, X)
    close(run(params, X, mask=full), wanted)
    close(run(params, X, attention_mask=np.ones((1, 1, STEPS, STEPS), bool)), wanted)
    close(run(params, X, segments=np.full((3, STEPS), 7)), wanted)
    close(run(params, X, attention_bias=np.full((1, 1, 1, 1), 2.0, np.float32)), wanted)


@pytest.mark.slow
def test_packed_segments_equal_separate_sequences():
    """Three sequences in one row, each from position 0, equal the three sequences alone."""
    net = dp.self_attention(2, causal=True, rotary=dp.rotary(), window=2)
    params = numbers(net, X)
    row = np.concatenate([X[0, :3], X[1, :5], X[2, :2]])[None]
    cuts, lengths = [slice(0, 3), slice(3, 8), slice(8, 10)], (3, 5, 2)
    together = jax.jit(net)(
        params, row, segments=np.repeat([4, 0, 9], lengths)[None],
        positions=np.concatenate([np.arange(n) for n in lengths])[None])
    for n, (cut, length) in enumerate(zip(cuts, lengths, strict=True)):
        close(together[:, cut], jax.jit(net)(params, X[n : n + 1, :length]))


# Dropout of weights.

DROPPING = dp.self_attention(2, causal=True, dropout=0.5)


@pytest.mark.slow
def test_weights_are_dropped_only_in_training():
    params = numbers(DROPPING, X)
    close(DROPPING(params, X), CAUSAL(params, X))
    close(DROPPING(params, X, key=KEY), CAUSAL(params, X))  # in inference a key has no effect
    train = jax.jit(lambda key: DROPPING.apply(params, {}, X, key=key, train=True, mask=MASK)[0])
    same(train(KEY), train(KEY))
    assert not np.array_equal(train(KEY), train(jax.random.key(1)))
    assert not np.array_equal(train(KEY)[2, 1], CAUSAL(params, X, mask=MASK)[2, 1])
    same(train(KEY)[0], jnp.broadcast_to(params["out"]["bias"], (STEPS, WIDTH)))
    assert DROPPING.random and not CAUSAL.random
    with pytest.raises(dp.LayerError, match="wants a key when train=True, got none"):
        DROPPING.apply(params, {}, X, train=True)


@pytest.mark.slow
def test_dropout_keeps_the_expectation():
    params = numbers(DROPPING, X)
    many = jax.jit(jax.vmap(lambda key: DROPPING.apply(
        params, {}, X, key=key, train=True)[0]))(jax.random.split(KEY, 4000))
    off = np.abs(many.mean(0) - CAUSAL(params, X))
    spread = np.asarray(many.std(0)) / np.sqrt(len(many))
    assert (spread > 0).all() and (off <= 5 * spread).all()


@pytest.mark.slow
def test_dropout_in_a_stream():
    """Each chunk is dropped with its own key; dropout does not change the cache."""
    params = numbers(DROPPING, X)

    @functools.partial(jax.jit, static_argnums=0)
    def streamed(train):
        state, seen = DROPPING.start(params, {}, X, length=STEPS), []
        for n, cut in enumerate((slice(0, 2), slice(2, 3), slice(3, 5))):
            y, state = DROPPING.apply(
                params, state, X[:, cut], key=jax.random.key(n), train=train)
            seen.append(y)
        return jnp.concatenate(seen, 1), state

    (dropped, kept), (whole, wanted) = streamed(True), streamed(False)
    same(kept, wanted)
    close(whole, CAUSAL(params, X))
    assert bool(jnp.isfinite(dropped).all()) and not np.allclose(dropped, whole, atol=1e-3)


@pytest.mark.slow
def test_cross_attention_has_dropout():
    net = dp.cross_attention(2, dropout=0.9)
    params = numbers(net, X, memory=MEMORY)
    run = lambda **options: net.apply(params, {}, X, memory=MEMORY, **options)[0]  # noqa: E731
    close(run(), dp.cross_attention(2)(params, X, memory=MEMORY))
    first, second = (run(train=True, key=jax.random.key(n)) for n in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("net", [dp.self_attention(2), dp.cross_attention(2),
                                 dp.attention_head(4)], ids=repr)
def test_nan_in_a_key_masked_for_all_queries_does_not_spread(net):
    """A key masked for all queries by `attention_mask` is cleared, as by `mask`.

    With memory the gradient is finite too: there the NaN is in no query.
    """
    x, crosses = jnp.asarray(X[:2], jnp.float32), "memory" in net.side
    keys = jnp.asarray(np.sin(np.arange(2 * STEPS * x.shape[-1])), jnp.float32).reshape(x.shape)
    seen = jnp.ones((2, 1, STEPS, STEPS), bool).at[:, :, :, 1].set(False)
    params, _ = net.init(KEY, x, **({"memory": keys} if crosses else {}))

    def total(params, broken):
        hurt = lambda a: a.at[:, 1].set(jnp.nan) if broken else a  # noqa: E731
        given = {"memory": hurt(keys)} if crosses else {}
        y = net(params, x if crosses else hurt(x), attention_mask=seen, **given)
        return jnp.sum(jnp.sin(jnp.delete(y, 1, axis=1)))

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    (y, slope), wanted = run(params, True), run(params, False)
    close(y, wanted[0])
    if crosses:
        close(slope, wanted[1])
