"""Recurrence against a Python loop over time, in both directions and inside wrappers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, drawn, equal, equations, params_of, same
from support.refusing import refused

import diffprog as dp
from diffprog.inspection.costs import flops

SERIES = jnp.asarray(drawn(3, 5, 4), jnp.float32)
LENGTHS = jnp.array([5, 3, 0])
PACKED = jnp.arange(5) < LENGTHS[:, None]
HOLES = jnp.array([[True, False, True, True, False], [False] * 5, [False, True, True, False, True]])


def counter():
    """A cell that counts its calls; its carry is one number for all examples."""

    def apply(params, state, x, *, key=None, train=False):
        count = state.get("count", 0) + jnp.ones((), x.dtype)
        return 0 * x + count, {"count": count} if state else state

    def start(params, state, x, *, length):
        return {"count": jnp.zeros((), x.dtype)}

    return dp.Layer(lambda key, x: ({}, {}), apply, start, name="counter")


@dp.program(ask=dp.cross_attention(2), cell=dp.gru(4))
def decoder(layers, x, *, memory=None, memory_mask=None):
    seen = layers.ask(x[:, None], memory=memory, memory_mask=memory_mask)
    return layers.cell(x + seen[:, 0])


def twice(layers, x):
    return layers.cell(jnp.tanh(layers.cell(x)))


CELLS = {
    "lstm": dp.lstm(3),
    "chain": dp.serial(dp.linear(6), dp.lstm(6), jnp.tanh, dp.gru(4)),
    "copies": dp.repeat(2, dp.heads(2, dp.gru(2))),
    "shared": dp.residual(dp.program(cell=dp.simple_rnn(4))(twice)),
}


def begun(net, params, x, **side):
    return jax.jit(functools.partial(net.start, length=5))(params, {}, x, **side)


def looped(cell, params, x, mask=None, *, backwards=False):
    """One row of x at a time, over its valid steps."""
    run = jax.jit(cell.apply)
    first = begun(cell, params, x[:1, 0])
    y = np.zeros((*x.shape[:2], cell.plan(x[:, 0]).y.shape[-1]), x.dtype)
    for row in range(len(x)):
        steps, state = [t for t in range(x.shape[1]) if mask is None or mask[row, t]], first
        for t in reversed(steps) if backwards else steps:
            out, state = run(params, state, x[row : row + 1, t])
            y[row, t] = out[0]
    return y


@pytest.mark.parametrize("name", [pytest.param(
    name, marks=[pytest.mark.slow] * (name in ("copies", "shared"))) for name in CELLS])
def test_recurrent_equals_a_loop_over_the_valid_steps_of_each_row(name):
    net, cell = dp.recurrent(CELLS[name]), CELLS[name]
    params = params_of(net, SERIES)
    same(params, params_of(cell, SERIES[:, 0]))
    run = jax.jit(net.apply)
    close(run(params, {}, SERIES)[0], looped(cell, params, SERIES))
    x, y = jnp.where(HOLES[..., None], SERIES, jnp.nan), looped(cell, params, SERIES, HOLES)
    whole = run(params, {}, x, mask=HOLES)[0]
    close(whole, y)
    assert not whole[~HOLES].any()
    first = state = begun(net, params, x[:, :1])
    for part in (slice(0, 2), slice(2, 5)):
        chunk, state = run(params, state, x[:, part], mask=HOLES[:, part])
        close(chunk, y[:, part])
    unmoved = [(a == b).all() for a, b in zip(*map(jax.tree.leaves, (state, first)), strict=True)]
    assert not any(unmoved)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, PACKED], ids=["all", "packed"])
def test_reverse_starts_at_the_last_valid_step_of_each_row(mask):
    cell = dp.lstm(3)
    params = params_of(cell, SERIES[:, 0])
    back = dp.recurrent(cell, reverse=True)
    close(jax.jit(back.__call__)(params, SERIES, mask=mask),
          looped(cell, params, SERIES, mask, backwards=True))
    both = dp.recurrent(cell, bidirectional=True)
    drawn = params_of(both, SERIES)
    assert not equal(drawn["forward"], drawn["backward"])
    y = jax.jit(both.__call__)(drawn, SERIES, mask=mask)
    for part, way in ((y[..., :3], "forward"), (y[..., 3:], "backward")):
        close(part, looped(cell, drawn[way], SERIES, mask, backwards=way == "backward"))


def test_a_mask_of_examples_masks_all_their_steps():
    net = dp.recurrent(dp.gru(3))
    params = params_of(net, SERIES)
    y = net(params, SERIES, mask=jnp.array([True, False, True]))
    same(y[1], jnp.zeros_like(y[1]))
    close(y[::2], net(params, SERIES)[::2])


def agree(one, other, params_of_one, params_of_other):
    close(*jax.jit(lambda p, q, x: (one(p, x, mask=HOLES), other(q, x, mask=HOLES)))(
        params_of_one, params_of_other, SERIES))


@pytest.mark.slow
def test_layers_in_one_recurrence_equal_recurrences_in_sequence():
    a, b = dp.lstm(4), dp.gru(3)
    joined, stacked = dp.recurrent(a >> b), dp.recurrent(a) >> dp.recurrent(b)
    params = params_of(joined, SERIES)
    renamed = {"recurrent_0": params["lstm_0"], "recurrent_1": params["gru_0"]}
    agree(stacked, joined, renamed, params)
    cell = dp.simple_rnn(4)
    for around in (dp.repeat, dp.heads):
        inside, outside = dp.recurrent(around(2, cell)), around(2, dp.recurrent(cell))
        params = params_of(inside, SERIES)
        agree(inside, outside, params, params)


@pytest.mark.slow
def test_an_initial_carry_is_a_streaming_state_and_has_gradients():
    net = dp.recurrent(dp.lstm(3))
    params = params_of(net, SERIES)
    given = {"hidden": jnp.asarray(drawn(3, 3), jnp.float32), "cell": jnp.ones((3, 3))}
    fresh = net.start(params, {}, SERIES, length=5)

    def final(carry, by_hand):
        if not by_hand:
            _, state = net.apply(params, fresh | carry, SERIES)
            return sum(state[name].sum() for name in carry)
        for t in range(5):
            _, carry = dp.lstm(3).apply(params, carry, SERIES[:, t])
        return sum(leaf.sum() for leaf in carry.values())

    slopes = jax.jit(jax.grad(final), static_argnums=1)
    close(slopes(given, False), slopes(given, True))
    y, state = net.apply(params, fresh | given, SERIES)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    close(y[:, -1], state["hidden"])
    padded, kept = net.apply(params, fresh | given, SERIES, mask=PACKED)
    close(kept["hidden"][1], padded[1, 2])
    same(kept["hidden"][2], given["hidden"][2])


@pytest.mark.slow
def test_a_decoder_with_attention_streams_without_passing_memory_again():
    net, memory = dp.recurrent(decoder), jnp.asarray(drawn(3, 6, 2, seed=1), jnp.float32)
    memory_mask = jnp.arange(6) < jnp.array([[6], [2], [4]])
    params = params_of(net, SERIES, memory=memory)
    run = jax.jit(net.apply)
    whole, _ = run(params, {}, SERIES, memory=memory, memory_mask=memory_mask, mask=HOLES)
    state = begun(net, params, SERIES, memory=memory, memory_mask=memory_mask)
    first, state = run(params, state, SERIES[:, :2], mask=HOLES[:, :2])
    second, _ = run(params, state, SERIES[:, 2:], mask=HOLES[:, 2:])
    close(jnp.concatenate([first, second], 1), whole)


@pytest.mark.slow
def test_each_step_has_its_own_key():
    cell = dataclasses.replace(dp.dropout(0.5), start=lambda *_, **__: {})
    net, ones = dp.recurrent(cell), jnp.ones((2, 4, 50))
    y, _ = net.apply({}, {}, ones, key=KEY, train=True)
    for t in range(4):
        alone = dp.dropout(0.5).apply(
            {}, {}, ones[:, t], key=jax.random.fold_in(KEY, t), train=True)[0]
        same(y[:, t], alone)
    same(dp.recurrent(cell, reverse=True).apply(
        {}, {}, ones, key=KEY, train=True)[0], y)
    same(net({}, ones), ones)


@pytest.mark.slow
def test_tokens_and_pytrees_are_sequences_too():
    ids = jnp.array([[1, 0, 2], [2, 2, 0]])
    net = dp.recurrent(dp.serial(dp.one_hot(3), dp.gru(2)))
    params = params_of(net, ids)
    close(net(params, ids), dp.recurrent(dp.gru(2))(params["gru_0"], jax.nn.one_hot(ids, 3)))
    pair = dp.recurrent(dp.serial(dp.parallel(dp.one_hot(3), jnp.tanh), dp.concatenate, dp.gru(2)))
    x = (ids, jnp.ones((2, 3, 1)))
    mask = jnp.array([[True, True, False], [True, False, False]])
    y = pair(params_of(pair, x), x, mask=mask)
    assert y.shape == (2, 3, 2)
    same(y[~mask], jnp.zeros((3, 2)))


@pytest.mark.parametrize("cell", [
    dp.serial(jnp.tanh), dp.dropout(0.5), dp.linear(4) >> jnp.tanh, dp.repeat(2, dp.linear(4))],
    ids=repr)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"bidirectional": True}], ids=str)
def test_a_cell_without_start_raises(cell, options):
    error = refused(dp.recurrent, cell, **options)
    assert error.wants == "a cell that carries a state from step to step"
    assert "docs/cells.md" in error.remedy


def test_a_sequence_may_be_empty():
    assert dp.recurrent(dp.gru(2)).plan(jnp.ones((2, 0, 3))).y.shape == (2, 0, 2)


def test_the_program_is_that_of_a_plain_scan():
    def plain(params, x):
        def step(carry, x):
            y, carry = dp.lstm(3).apply(params, carry, x)
            return carry, y

        zeros = {"hidden": jnp.zeros((3, 3)), "cell": jnp.zeros((3, 3))}
        return jnp.moveaxis(jax.lax.scan(step, zeros, jnp.moveaxis(x, 1, 0))[1], 0, 1)

    net = dp.recurrent(dp.lstm(3))
    params = params_of(net, SERIES)
    count = lambda f: equations(jax.make_jaxpr(f)(params, SERIES).jaxpr)  # noqa: E731
    keyed = functools.partial(net, key=KEY)
    assert count(keyed) == count(net) == count(plain)
    unrolled = dp.recurrent(dp.lstm(3), unroll=5)
    close(unrolled(params, SERIES), net(params, SERIES))


@pytest.mark.slow
@pytest.mark.parametrize("cell", [dp.lstm(3), CELLS["chain"], dp.residual(dp.gru(4))], ids=repr)
@pytest.mark.parametrize("ways", [{}, {"bidirectional": True}, {"reverse": True}], ids=str)
def test_the_summary_counts_every_step(cell, ways):
    net = dp.recurrent(cell, **ways)
    params = net.plan(SERIES).params
    seen = dp.summary(net, SERIES, mask=PACKED)
    assert seen.flops == pytest.approx(flops(net, params, SERIES), rel=0.3)
    step = dp.summary(cell, SERIES[:, 0])
    assert seen.flops == 5 * (2 if "bidirectional" in ways else 1) * step.flops
    assert seen.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_the_summary_has_a_row_for_each_part_of_a_cell():
    rows = {row.path: row for row in dp.summary(dp.recurrent(CELLS["chain"]), SERIES).rows}
    assert list(rows) == ["", "linear_0", "lstm_0", "tanh~0", "gru_0"]
    assert rows[""].output.shape == (3, 5, 4) and rows["gru_0"].output.shape == (3, 4)
    fields = {row.path: row.field for row in dp.summary(dp.serial(
        dp.conv(4, 3, dims=1), dp.recurrent(dp.gru(4)), dp.conv(4, 3, dims=1)), SERIES).rows}
    assert fields["conv_0"] and fields["conv_1"] is None  # its field is the whole past


@pytest.mark.slow
def test_replace_reaches_into_both_directions():
    net = dp.recurrent(dp.linear(3) >> dp.gru(3), bidirectional=True)
    changed = dp.replace(net, "*/gru_0", dp.lstm(2))
    assert repr(changed) == "recurrent(serial(linear(3), lstm(2)), bidirectional=True)"
    changed = dp.replace(net, "backward/gru_0", dp.lstm(2))
    assert repr(changed) == ("recurrent(forward=recurrent(serial(linear(3), gru(3))), "
                             "backward=recurrent(serial(linear(3), lstm(2)), reverse=True))")
    assert changed.plan(SERIES).y.shape == (3, 5, 5)
    y, seen = dp.tap(net, "forward")(params_of(net, SERIES), SERIES)
    same(seen["forward"], y[..., :3])
    with pytest.raises(dp.LayerError, match=r"linear_0/#\d+; put batch norm and taps before"):
        dp.tap(net, "*/linear_0").init(KEY, SERIES)


GRU = dp.serial(at=dp.recurrent(dp.gru(2)))


def test_a_carry_without_a_batch_axis_takes_no_mask():
    net = dp.recurrent(counter())
    close(net({}, SERIES)[:, :, 0], jnp.broadcast_to(jnp.arange(1.0, 6), (3, 5)))
    with pytest.raises(dp.LayerError, match="a batch axis in each leaf"):
        net({}, SERIES, mask=PACKED)


def test_the_carry_has_the_dtype_of_its_cell():
    net = dp.recurrent(dp.mixed(dp.lstm(3), jnp.bfloat16))
    params = params_of(net, SERIES)
    state = net.start(params, {}, SERIES, length=5)
    y, after = net.apply(params, state, SERIES)
    assert y.dtype == jnp.float32
    assert {leaf.dtype.name for carried in (state, after) for name, leaf in carried.items()
            if name != "#segment"} == {"bfloat16"}
    np.testing.assert_allclose(y, dp.recurrent(dp.lstm(3))(params, SERIES), atol=0.05)


def stepwise(layer):
    """The layer on one step (batch, ...) of a sequence."""
    return dp.serial(lambda x: x[:, None], layer, lambda y: y[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("layer", [
    dp.conv(4, 2, dims=1, padding="CAUSAL"), dp.learned_positions(5), dp.sinusoidal_positions(),
    dp.residual(dp.conv(4, 2, dims=1, padding="CAUSAL")) >> dp.gru(2),
    dp.repeat(2, dp.learned_positions(5)),
    dp.self_attention(1, causal=True, window=3, rotary=dp.rotary())], ids=repr)
def test_a_cell_that_mixes_examples_raises_and_its_stepwise_form_does_not(layer):
    net = dp.recurrent(layer)
    error = refused(net.plan, SERIES)
    assert error.wants == "a cell that keeps examples apart"
    whole = layer if layer.plan(SERIES).y.shape == SERIES.shape else None
    if whole is None:
        return
    net = dp.recurrent(stepwise(layer))
    params = params_of(net, SERIES)
    inner = params[next(iter(params))] if params else {}
    close(jax.jit(net)(params, SERIES), jax.jit(whole)(inner, SERIES))


def test_an_axis_of_copies_as_long_as_the_batch_raises():
    net = dp.recurrent(dp.ensemble(3, dp.gru(2)))
    error = refused(net.plan, SERIES)
    assert error.wants == "a cell that returns (3, ...), with the batch axis first"


@pytest.mark.slow
def test_a_side_input_without_a_batch_axis_may_be_as_long_as_the_batch():
    net = dp.recurrent(dp.hyper(dp.gru(2), dp.linear(4)))
    condition = jnp.asarray(drawn(3, seed=2), jnp.float32)
    params, _ = net.init(KEY, SERIES, condition=condition)
    run = jax.jit(net)
    close(run(params, SERIES[1:], condition=condition),
          run(params, SERIES, condition=condition)[1:])
