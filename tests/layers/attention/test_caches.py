"""Attention in a stream: prefill, decoding, ragged prompts, memory, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, same

import diffprog as dp

WIDTH = 8
X = jax.random.normal(jax.random.key(3), (2, 6, WIDTH))
MEMORY = jax.random.normal(jax.random.key(4), (2, 3, 5))


def block(**options):
    attend = dp.self_attention(2, causal=True, **options)
    return dp.pre_norm(attend) >> dp.pre_norm(dp.ffn(12, dp.gelu))


def started(net, params, state, x, length=6, **side):
    return jax.jit(net.start, static_argnames="length")(params, state, x, length=length, **side)


def streamed(net, params, state, x, sizes, **side):
    """The joined outputs of the chunks, and the last state; side inputs are cut like x."""
    apply, outputs, at = jax.jit(net.apply), [], 0
    for size in sizes:
        cut = lambda a, at=at, size=size: a[:, at : at + size]  # noqa: E731
        y, state = apply(params, state, cut(x), **jax.tree.map(cut, side))
        outputs.append(y)
        at += size
    return jnp.concatenate(outputs, 1), state


@dp.program(own=dp.self_attention(2, causal=True), ask=dp.cross_attention(1),
            encode=dp.linear(WIDTH))
def translator(layers, x, *, source=None, memory=None):
    if source is not None:
        memory = layers.encode(source)
    x = x + layers.own(x)
    return x + layers.ask(x + layers.own(x), memory=memory)


NETS = {
    "block": block(),
    "repeat": dp.repeat(3, block()),
    "nested": dp.repeat(2, dp.serial(dp.repeat(2, block(rotary=dp.rotary())), jnp.tanh)),
    "window": dp.serial(block(window=3), block(window=1)),
    "heads": dp.heads(2, dp.attention_head(3, causal=True)) >> dp.linear(WIDTH),
    "ensemble": dp.ensemble(2, block(kv_heads=1)) >> (lambda y: y.mean(0)),
    "one layer twice": dp.program(f=block())(lambda layers, x: layers.f(jnp.tanh(layers.f(x)))),
    "positions": dp.learned_positions(6) >> dp.sinusoidal_positions() >> block(),
    "recomputed": dp.remat(dp.repeat(2, block())),
    "tapped": dp.tap(dp.serial(f=block(), g=dp.linear(WIDTH)), "f") >> (lambda pair: pair[0]),
    "mixed": dp.mixed(block(), jnp.float32),
}


@pytest.mark.parametrize("name", [pytest.param(
    name, marks=[pytest.mark.slow] * (name not in ("repeat", "window", "heads", "positions")))
    for name in NETS])
def test_prefill_and_decoding_equal_the_full_pass_with_two_compilations(name):
    net = NETS[name]
    params, state = net.init(KEY, X)
    carried = started(net, params, state, X)
    apply = jax.jit(net.apply)
    y, carried = apply(params, carried, X[:, :3])
    outputs = [y]
    for step in range(3, 6):
        y, carried = apply(params, carried, X[:, step : step + 1])
        outputs.append(y)
    close(jnp.concatenate(outputs, 1), jax.jit(net)(params, X))
    assert apply._cache_size() == 2


def test_start_does_not_depend_on_the_chunk_length():
    net = NETS["repeat"]
    params, state = net.init(KEY, X)
    same(net.start(params, state, X[:, :1], length=9), net.start(params, state, X, length=9))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_caches_of_repeated_layers_are_updated_in_place():
    net, length = dp.repeat(12, block()), 256
    x = jnp.ones((2, 1, 32))
    params, state = net.init(KEY, x)
    carried = net.start(params, state, x, length=length)
    step = jax.jit(net.apply, donate_argnums=1).lower(params, carried, x).compile()
    memory = step.memory_analysis()
    one_cache = 2 * (2 * length * 32) * 4  # keys and values of two rows, float32
    assert memory.temp_size_in_bytes <= 2 * one_cache
    assert memory.alias_size_in_bytes >= 12 * one_cache  # the donated state is overwritten


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "positions"])
def test_a_stream_past_its_length_returns_nan(name):
    net = NETS[name]
    params, state = net.init(KEY, X)
    carried = started(net, params, state, X, length=5)
    y, carried = streamed(net, params, carried, X, [2, 2])
    assert np.isfinite(y).all()
    y, _ = streamed(net, params, carried, X, [2, 2])  # the first of the two steps fits
    assert np.isnan(y).all()


@pytest.mark.slow
def test_a_stream_with_a_window_has_no_length_limit():
    net = dp.self_attention(2, causal=True, window=3)
    params, state = net.init(KEY, X)
    long = jnp.tile(X, (1, 4, 1))
    y, _ = streamed(net, params, started(net, params, state, X), long, [5] + [1] * 19)
    close(y, jax.jit(net)(params, long))


LENGTHS = [2, 4]
RAGGED = block(rotary=dp.rotary())


@pytest.mark.slow
@pytest.mark.parametrize(("net", "side", "told"), [
    pytest.param(*given, id=name, marks=[pytest.mark.slow] * (
        name not in ("rotary", "learned, left")))
    for name, given in {
        "rotary, left, told": (RAGGED, "left", True), "rotary": (RAGGED, "right", False),
        "learned, told": (dp.learned_positions(8) >> block(), "right", True),
        "learned, left":
            (dp.learned_positions(6) >> dp.self_attention(1, causal=True), "left", False),
        "sinusoidal, window": (dp.sinusoidal_positions() >> dp.self_attention(
            2, causal=True, window=3), "right", False),
    }.items()])
def test_ragged_prompts_equal_separate_sequences(net, side, told):
    """Prompts of 2 and 4 steps; the steps after them have no mask and no positions."""
    params, state = net.init(KEY, X)
    shift = [4 - n if side == "left" else 0 for n in LENGTHS]
    places = jnp.arange(4)
    mask = jnp.stack([(places >= s) & (places < s + n)
                      for s, n in zip(shift, LENGTHS, strict=True)])
    positions = jnp.maximum(places[None] - jnp.array(shift)[:, None], 0)
    prompt = jnp.stack([jnp.zeros((4, WIDTH)).at[s : s + n].set(x[:n])
                        for x, s, n in zip(X, shift, LENGTHS, strict=True)])
    prompt = jnp.where(mask[..., None], prompt, jnp.nan)
    carried = started(net, params, state, prompt)
    given = {"mask": mask} | ({"positions": positions} if told else {})
    y, carried = streamed(net, params, carried, prompt, [4], **given)
    later = jnp.stack([x[n : n + 2] for x, n in zip(X, LENGTHS, strict=True)])
    after, _ = streamed(net, params, carried, later, [1, 1])
    for row, (s, n) in enumerate(zip(shift, LENGTHS, strict=True)):
        alone = jax.jit(net)(params, X[row : row + 1, : n + 2])[0]
        close(y[row, s : s + n], alone[:n])
        close(after[row], alone[n:])


@pytest.mark.slow
def test_a_chunk_without_segments_continues_the_last_segment():
    net = dp.self_attention(2, causal=True)
    params, state = net.init(KEY, X)
    segments = jnp.array([[7, 7, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1]])
    mask = jnp.ones((2, 6), bool).at[0, 3].set(False)
    carried = started(net, params, state, X)
    first, carried = streamed(net, params, carried, X, [4], segments=segments, mask=mask)
    last, _ = streamed(net, params, carried, X[:, 4:], [2])
    whole = jax.jit(net)(params, X, segments=segments, mask=mask)
    close(jnp.concatenate([first, last], 1), whole)


@pytest.mark.slow
def test_a_stream_keeps_memory_and_does_not_call_the_encoder():
    params, state = translator.init(KEY, X, source=MEMORY)
    whole = jax.jit(translator)(params, X, source=MEMORY)
    memory = translator.children["encode"](params["encode"], MEMORY)
    carried = started(translator, params, state, X, memory=memory)
    assert set(carried) == {"own", "own@1", "ask"}
    close(streamed(translator, params, carried, X, [3, 1, 2])[0], whole)


def first_of(pair):
    return pair[0]


ASK = dp.cross_attention(2)
ASKING = {
    "repeat": dp.repeat(2, dp.pre_norm(ASK)), "heads": dp.heads(2, ASK),
    "ensemble": dp.ensemble(2, ASK), "remat": dp.repeat(2, dp.remat(ASK)),
    "mixed": dp.repeat(2, dp.mixed(ASK, jnp.float32)),
    "tap": dp.tap(dp.serial(a=ASK), "a") >> first_of,
    "tap in repeat": dp.repeat(2, dp.tap(dp.serial(a=ASK), "a") >> first_of),
    "tap of repeat": dp.tap(dp.repeat(2, ASK >> jnp.tanh), "tanh~0") >> first_of,
    "replace": dp.replace(dp.serial(a=ASK, b=abs), "b", lambda b: jnp.tanh),
    "branch": dp.branch(ASK, dp.self_attention(1, causal=True), merge=dp.add),
    "parallel": dp.serial(lambda x: (x, x), dp.parallel(ASK, abs), dp.add),
    "residual": dp.repeat(2, dp.residual(ASK)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKING)
def test_every_combinator_keeps_memory_in_a_stream(name):
    net = ASKING[name]
    params, state = net.init(KEY, X, memory=MEMORY)
    carried = started(net, params, state, X[:, :1], memory=MEMORY)
    apply, outputs = jax.jit(net.apply), []
    for chunk in (X[:, :3], X[:, 3:4]):
        y, carried = apply(params, carried, chunk)
        outputs.append(y)
    axis = outputs[0].ndim - 2  # the time axis: an ensemble has one axis more
    close(jnp.concatenate(outputs, axis), jax.jit(net)(params, X[:, :4], memory=MEMORY))


def test_passing_memory_again_replaces_it():
    net = dp.cross_attention(2)
    params, state = net.init(KEY, X, memory=MEMORY)
    mask = jnp.array([[True, False, True], [True, True, True]])
    carried = started(net, params, state, X, memory=MEMORY)
    apply = jax.jit(net.apply)
    y, carried = apply(params, carried, X, memory=2 * MEMORY, memory_mask=mask)
    again, _ = apply(params, carried, X)
    close(y, apply(params, state, X, memory=2 * MEMORY, memory_mask=mask)[0])
    close(again, y)


@pytest.mark.slow
def test_an_equal_net_continues_a_stream():
    """A net built again accepts the state, without memory and without a call of its `start`."""
    def build():
        return dp.serial(dp.repeat(2, dp.self_attention(2, causal=True)), ask=dp.cross_attention(1))

    params, state = build().init(KEY, X, memory=MEMORY)
    carried = started(build(), params, state, X, memory=MEMORY)
    y, _ = jax.jit(build().apply)(params, carried, X)
    close(y, jax.jit(build())(params, X, memory=MEMORY))
    with pytest.raises(dp.LayerError, match="the side input memory"):
        build().apply(params, state, X)


@pytest.mark.slow
def test_a_head_streams_over_x_and_over_memory():
    head = dp.attention_head(WIDTH)

    @dp.program(head=head)
    def both(layers, x, *, memory=None):
        return layers.head(x, memory=memory)

    own = dp.attention_head(WIDTH, causal=True)
    params, state = head.init(KEY, X)
    carried = both.start({"head": params}, state, X, length=6, memory=X)
    close(both({"head": params}, X, state=carried), head(params, X, memory=X))
    close(own(params, X, state=own.start(params, state, X, length=6)), own(params, X))


def test_every_leaf_of_a_stream_has_its_own_buffer():
    params, state = translator.init(KEY, X, source=MEMORY)
    memory = translator.children["encode"](params["encode"], MEMORY)
    for start in (translator.start, jax.jit(translator.start, static_argnames="length")):
        leaves = jax.tree.leaves(start(params, state, X, length=6, memory=memory))
        places = [leaf.unsafe_buffer_pointer() for leaf in [*leaves, memory]]
        assert len(set(places)) == len(places)


def test_donating_a_stream_does_not_donate_memory_or_its_mask():
    net = dp.cross_attention(2)
    mask = jnp.ones((2, 3), bool)
    params, state = net.init(KEY, X, memory=MEMORY)
    carried = net.start(params, state, X, length=6, memory=MEMORY, memory_mask=mask)
    jax.jit(net.apply, donate_argnums=1)(params, carried, X)
    assert mask.sum() == 6 and np.isfinite(MEMORY).all()


@pytest.mark.slow
def test_gradients_flow_through_the_cache_unless_stopped():
    """Truncated backpropagation through time stops the gradient between two chunks."""
    net = dp.self_attention(2, causal=True)
    params, state = net.init(KEY, X)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def last(x, cut):
        carried = net.start(params, state, x, length=6)
        _, carried = net.apply(params, carried, x[:, :3])
        carried = jax.lax.stop_gradient(carried) if cut else carried
        return jnp.sin(net.apply(params, carried, x[:, 3:])[0]).sum()

    whole = jax.jit(jax.grad(lambda x: jnp.sin(net(params, x)[:, 3:]).sum()))
    close(last(X, False), whole(X))
    assert not np.asarray(last(X, True))[:, :3].any()
