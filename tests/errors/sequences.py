"""What layers of sequences refuse: cells, recurrence, collapse, positions."""

import jax.numpy as jnp
from support.refusing import X

import diffprog as dp
from errors.given import at, bools, floats, ints, params, zeros

X3 = jnp.ones((2, 5, 4))
LSTM, GRU = dp.lstm(3), dp.recurrent(dp.gru(2))
LEARNED = dp.learned_positions(4)


def carried(x, *, without=""):
    """One more step of a cell that began with two examples, its carry whole or in part."""
    own = params(LSTM, X)
    state = zeros(lambda: LSTM.start(own, {}, X, length=1))
    LSTM.apply(own, {name: part for name, part in state.items() if name != without}, x)


def restarted(rows, *, before=2):
    """A stream of as many rows, of which some of two are restarted."""
    own = params(GRU, X3)
    state = GRU.start(own, {}, jnp.ones((before, 5, 4)), length=5)
    return lambda: dp.training.restart(GRU, own, state, X3, rows, length=5)


def count(params, state, x, **_):
    return x, {"steps": state["steps"] + 1} if state else state


def grow(params, state, x, **_):
    return x, {"all": jnp.concatenate([state["all"], x], -1)} if state else state


COUNTER = dp.Layer(lambda key, x: ({}, {}), count,
                   lambda p, s, x, **_: {"steps": jnp.zeros(())}, name="counter")
GROW = dp.Layer(lambda key, x: ({}, {}), grow, lambda p, s, x, **_: {"all": x}, name="grow")


def start(layer, x=X3, **side):
    """A stream that begins with all of x."""
    return lambda: layer.start(params(layer, x), {}, x, length=x.shape[1], **side)


def another_batch():
    own = params(LEARNED, X3[:, :4])
    state = zeros(lambda: LEARNED.start(own, {}, X3[:1, :1], length=4))
    LEARNED.apply(own, state, X3[:, :1])


EXAMPLES = {
    # Cells and recurrence.
    "lstm(0): wants features as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.lstm(0),
    "simple_rnn(3, activation=1): wants activation as a function, got 1; pass jnp.tanh, for "
    "example":
        lambda: dp.simple_rnn(3, activation=1),
    "at (gru(3)): wants floating-point input, got int32[2,4]; convert it: x.astype(jnp.float32)":
        at(dp.gru(3), ints(2, 4)),
    "lstm(3): wants a carry of hidden and cell of shape (5, 3), got {cell: float32[2,3], hidden: "
    "float32[2,3]}; start a new stream on input of this shape":
        lambda: carried(jnp.ones((5, 4))),
    "lstm(3): wants a carry of hidden and cell of shape (2, 3), got {hidden: float32[2,3]}; "
    "start a new stream on input of this shape":
        lambda: carried(X, without="cell"),
    "simple_rnn(2): wants a chunk in bfloat16, as start saw, got float32[2,4]; start again for "
    "another dtype: the chunk would be rounded":
        lambda: dp.simple_rnn(2).apply(params(dp.simple_rnn(2), X), {
            "hidden": jnp.zeros((2, 2), jnp.bfloat16)}, X),
    "lstm(3): wants params input/kernel as float32[5,12], got float32[4,12]":
        lambda: LSTM(params(LSTM, X), jnp.ones((2, 5))),
    "recurrent(gru(2), reverse=True, bidirectional=True): wants reverse or bidirectional, got "
    "both; leave reverse out: bidirectional goes in both directions":
        lambda: dp.recurrent(dp.gru(2), reverse=True, bidirectional=True),
    "recurrent(linear(4)): wants a cell that carries a state from step to step, got linear(4), "
    "without start; leave recurrent out if the layer does not mix time steps, otherwise give it a "
    "start: see docs/cells.md":
        lambda: dp.recurrent(dp.linear(4)),
    "wants rows as booleans (2,), one for each row of x, got int32[2]; pass "
    "jnp.array([True, False]), for example":
        restarted(jnp.ones(2, int)),
    "wants state #segment as int32[2], got int32[3]; pass x, length and side inputs as to the "
    "start of this stream":
        restarted(jnp.ones(2, bool), before=3),
    "at (recurrent(gru(2))): wants at least 3 axes (batch, time, features), got float32[5,4]; add "
    "the missing axes":
        at(GRU, floats(5, 4)),
    "at (recurrent(gru(2))): wants at least 2 axes (batch, time), got int32[5]; add the missing "
    "axes":
        at(GRU, ints(5)),
    "at (recurrent(gru(2))): wants leaves of equal batch and time axes, got "
    "(float32[2,5,4], float32[2,2,4]); bring them to one length":
        at(GRU, (floats(2, 5, 4), floats(2, 2, 4))),
    "at (recurrent(gru(2))): wants a mask of the leading axes of (2, 5), got bool[2,4]":
        at(GRU, X3, mask=bools(2, 4)),
    "at/linear_0 (linear(2)): wants floating-point input, got int32[2]; convert it: "
    "x.astype(jnp.float32)":
        at(dp.recurrent(dp.linear(2) >> dp.gru(2)), ints(2, 5)),
    "at (recurrent(serial(batch_norm(), gru(2)))): wants a cell whose only state is its carry, "
    "got batch_norm_0/mean, batch_norm_0/var; put batch norm and taps before or after the "
    "recurrence":
        at(dp.recurrent(dp.batch_norm() >> dp.gru(2)), X3),
    "at (recurrent(ensemble(2, gru(2)))): wants a cell that returns (3, ...), with the batch "
    "axis first, got float32[2,3,2]; pass (batch, time, ...), or a cell that keeps the first axis":
        at(dp.recurrent(dp.ensemble(2, dp.gru(2))), floats(3, 5, 4)),
    "at (recurrent(grow)): wants a carry that keeps its shapes and dtypes, {all: "
    "float32[2,4]}, got {all: float32[2,8]}; let apply return the state in the form of start":
        at(dp.recurrent(GROW), X3),
    "recurrent(counter): wants a carry with a batch axis in each leaf, to keep it at masked "
    "steps, got float32[]; leave the mask out, or carry one value for each example":
        lambda: dp.recurrent(COUNTER)({}, X3, mask=jnp.ones((2, 5), bool)),
    "at (recurrent(conv(4, 2, dims=1, padding='CAUSAL'))): wants a cell that keeps examples apart, "
    "got past, segment without a batch axis; put layers that mix positions before or after the "
    "recurrence: the first axis of a cell is the batch axis":
        at(dp.recurrent(dp.conv(4, 2, dims=1, padding="CAUSAL")), X3),
    "recurrent(gru(2)): wants the state of a stream, as start returns it, got hidden; replace "
    "only its carry: it also holds the last segment":
        lambda: GRU.apply(params(GRU, X3), {"hidden": jnp.zeros((2, 2))}, X3,
                          segments=jnp.zeros((2, 5), int)),
    "at (collapse('mean')): wants no segments, got int32[2,5]; give each sequence a row: it mixes "
    "all steps of a row":
        at(dp.collapse("mean"), X3, segments=ints(2, 5)),
    "recurrent(gru(2), reverse=True): wants the whole input at once, got a streaming call; apply "
    "it without start: it goes backwards":
        start(dp.recurrent(dp.gru(2), reverse=True)),
    "backward (recurrent(gru(2), reverse=True)): wants the whole input at once, got a streaming "
    "call; apply it without start: it goes backwards":
        start(dp.recurrent(dp.gru(2), bidirectional=True)),
    # The whole sequence at once.
    "collapse('sum'): wants method out of attention, first, last, max, mean, got 'sum'; write "
    "collapse('mean'), for example":
        lambda: dp.collapse("sum"),
    "at (collapse('mean')): wants at least 2 axes (..., time, features), got float32[3]; add the "
    "missing axes":
        at(dp.collapse("mean"), floats(3)),
    "at (collapse('mean')): wants floating-point input, got int32[2,5,4]; convert it: "
    "x.astype(jnp.float32)":
        at(dp.collapse("mean"), ints(2, 5, 4)),
    "at (collapse('max')): wants at least one step, got float32[2,0,4]; pad the sequence, with a "
    "mask":
        at(dp.collapse("max"), floats(2, 0, 4)),
    "at (collapse('attention')): wants a mask of the leading axes of (2, 5, 4), got bool[5]":
        at(dp.collapse("attention"), X3, mask=bools(5)),
    "collapse('attention'): wants the whole input at once, got a streaming call; apply it without "
    "start":
        start(dp.collapse("attention")),
    "collapse('attention'): wants 4 features on the last axis, as init saw, got "
    "float32[2,5,2]; initialize again on input of this shape, or change the layer before":
        lambda: dp.collapse("attention")(params(dp.collapse("attention"), X3), X3[..., :2]),
    # Positions.
    "at (learned_positions(4)): wants at most 4 steps, got 5; learn more positions, or cut x":
        at(LEARNED, X3),
    "learned_positions(4): wants at most 4 steps, got 5; learn more positions, or cut x":
        lambda: LEARNED(params(LEARNED, X3[:, :4]), X3),
    "learned_positions(4): wants at most 4 steps, got 6; learn more positions, or cut x":
        lambda: LEARNED.start(params(LEARNED, X3[:, :4]), {}, X3[:, :1], length=6),
    "learned_positions(4): wants params of 4 positions and 4 features, got {embedding: "
    "float32[4,1]}; pass what init returned":
        lambda: LEARNED({"embedding": jnp.ones((4, 1))}, X3[:, :4]),
    "at (learned_positions(4)): wants positions as ints of shape (2, 4), got int32[4]; pass one "
    "for each step: jnp.broadcast_to(positions, x.shape[:-1])":
        at(LEARNED, X3[:, :4], positions=ints(4)),
    "at (learned_positions(4)): wants positions as ints of shape (2, 4), got float32[2,4]; pass "
    "one for each step: jnp.broadcast_to(positions, x.shape[:-1])":
        at(LEARNED, X3[:, :4], positions=floats(2, 4)),
    "at (learned_positions(4)): wants positions as ints of shape (2, 4), got int32[2,3]; pass one "
    "for each step: jnp.broadcast_to(positions, x.shape[:-1])":
        at(LEARNED, X3[:, :4], positions=ints(2, 3)),
    "at (learned_positions(4)): wants a mask of booleans, got int32[2,4]":
        at(LEARNED, X3[:, :4], mask=ints(2, 4)),
    "learned_positions(4): wants a chunk with batch axes (1,), as start saw, got (2,); start a "
    "new stream for another batch":
        another_batch,
    "at (sinusoidal_positions()): wants an even number of features, got float32[2,5,3]; add or "
    "drop a feature":
        at(dp.sinusoidal_positions(), floats(2, 5, 3)),
    "at (sinusoidal_positions()): wants at least 2 axes (..., time, features), got float32[4]; "
    "add the missing axes":
        at(dp.sinusoidal_positions(), floats(4)),
    "sinusoidal_positions(base=1): wants base above 1, got 1; pass 10000.0, for example":
        lambda: dp.sinusoidal_positions(base=1),
    "sinusoidal_positions(first=-1): wants first as an int of at least 0, got -1; pass 0 or more":
        lambda: dp.sinusoidal_positions(first=-1),
    # Rotary positions.
    "wants an even number of rotated features, got 3 in float32[5,3]; choose an even number: "
    "features are rotated in pairs":
        lambda: dp.rotary()(jnp.ones((5, 3))),
    "wants an even number of rotated features, got features=5; choose an even number: features are "
    "rotated in pairs":
        lambda: dp.rotary(features=5),
    "wants base above 1, got 1.0; pass 10000.0, for example":
        lambda: dp.rotary(1.0),
    "wants at least the 8 rotated features, got float32[5,4]; give x more features, or rotate "
    "fewer":
        lambda: dp.rotary(features=8)(jnp.ones((5, 4))),
    "wants at least 2 axes (..., time, features), got float32[4]; add the missing axes":
        lambda: dp.rotary()(jnp.ones(4)),
    "wants positions as ints that broadcast to (2, 5), got int32[4]; pass one for each step of x "
    "(..., time, features)":
        lambda: dp.rotary()(X3, jnp.zeros(4, int)),
    "wants positions as ints that broadcast to (2, 5), got float32[5]; pass one for each step of x "
    "(..., time, features)":
        lambda: dp.rotary()(X3, jnp.zeros(5)),
    "wants positions as ints that broadcast to (2, 5), got int32[3,1,5]; pass one for each step of "
    "x (..., time, features)":
        lambda: dp.rotary()(X3, jnp.zeros((3, 1, 5), int)),
    "wants positions as ints that broadcast to (2, 5), got [0]; pass one for each step of x (..., "
    "time, features)":
        lambda: dp.rotary()(X3, [0]),
    "wants factor as a positive number, got 0.0; pass 8.0, for example":
        lambda: dp.rope.linear_scaling(0.0),
    "wants original_length as a positive number, got 0; pass 8.0, for example":
        lambda: dp.rope.yarn_scaling(2.0, 0),
    "wants factors[1] as a positive number, got 0; pass 8.0, for example":
        lambda: dp.rope.longrope_scaling((1, 0), 8, 2.0),
    "wants low_frequency_factor below high_frequency_factor, got llama3_scaling(2.0, 64, "
    "low_frequency_factor=4); pass 1 and 4, those of Llama 3.1":
        lambda: dp.rope.llama3_scaling(2.0, 64, 4),
    "wants 4 factors, one for each pair, got 2; pass the factors that were searched for heads of "
    "this size":
        lambda: dp.rotary(scaling=dp.rope.longrope_scaling((1.0, 2.0), 64))(jnp.ones((5, 8))),
}
