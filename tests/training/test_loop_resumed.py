"""Training in parts: data position, best state, streams, callbacks, and early ends."""

import dataclasses
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.refusing import refused
from support.training_nets import KEY, NET, assert_same, examples, noisy, numbers, sgd, train

import diffprog as dp

X, Y = examples()
BATCH = (X, Y)


def equal(one, other):
    one, other = numbers(one), numbers(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


# The position in the data.


@pytest.mark.parametrize("options", [
    {"seed": 3}, {}, {"seed": 3, "epochs": 2}, {"epochs": 2}], ids=str)
def test_two_calls_equal_one(options):
    """Bit for bit: the second call continues with the batches after those of the first."""
    data = dp.batches(BATCH, 5, **options)
    whole = train(noisy(), data, 8)
    part = train(noisy(), data, 4)
    equal(train(noisy(), data, 4, state=part.state).state, whole.state)
    equal(train(noisy(), data, 4, state=part).state, whole.state)
    anew = train(noisy(), [batch for batch, _ in zip(data, range(4), strict=False)], 4,
                 state=part.state)
    assert any((numbers(anew.state)[path] != leaf).any()
               for path, leaf in numbers(whole.state).items())


def test_other_data_begins_with_its_first_batch():
    data = [*dp.batches(BATCH, 4)]
    part = train(sgd(), data, 2)
    wanted = train(sgd(), [data[0], data[1], data[0], data[1]], 4)
    assert_same(train(sgd(), data, 2, state=part.state).state, wanted.state)


def test_an_iterator_of_batches_begins_where_it_is():
    data = dp.batches(BATCH, 4, seed=0)
    list_of = [batch for batch, _ in zip(data, range(7), strict=False)]
    found = train(sgd(), data.begun(5), 2)
    assert_same(found.state, train(sgd(), list_of[5:], 2).state)


# The best state, also after a restart.


class Validation:
    """Batches of numbers, which are the metrics: another number in each iteration."""

    def __init__(self, values):
        self.values = iter([values[0], *values])  # the first is tried before training

    def __iter__(self):
        return iter([next(self.values)])


def judged(values, steps, **options):
    def objective(net, params, state, batch, *, key, train):
        value = params["kernel"].sum() if train else jnp.asarray(batch)
        return value, (state, {"loss": value, "score": value})

    net = dp.stateless(lambda key, x: {"kernel": jnp.zeros(1)}, lambda params, x: x)
    step = dp.make_step(net, objective, optax.sgd(1.0))
    batch = (np.zeros(1, np.float32), np.zeros(1, np.float32))
    return train(step, [batch], steps, log_every=1, validation=Validation(values), **options)


@pytest.mark.parametrize(("options", "best"), [
    ({}, 3), ({"metric": "score"}, 3), ({"metric": "score", "highest": True}, 2),
    ({"highest": True}, 2)], ids=str)
def test_best_is_by_any_metric_highest_or_lowest(options, best):
    result = judged([3.0, 7.0, 1.0, 5.0], 4, **options)
    assert int(result.best.step) == best


@pytest.mark.parametrize(("values", "options"), [
    ([3.0, 1.0, 2.0, 2.5, 0.5, 9.0], {"patience": 3}), ([3.0, 1.0, 2.0, 2.5, 4.0], {"patience": 3}),
    ([1.0, 2.0, 3.0, 2.0], {"highest": True}),
    ([5.0, 2.0, 3.0, 2.0, 7.0], {"highest": True, "patience": 4})], ids=str)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_best_and_patience_continue_after_a_restart(values, options, cut):
    whole = judged(values, len(values), **options)
    part = judged(values[:cut], cut, **options)
    rest = judged(values[cut:], len(values) - cut, state=part, **options)
    assert rest.history == whole.history and len(part.history) == cut
    assert all(isinstance(row["loss"], float) for row in rest.history)
    equal(rest.best, whole.best)
    equal(rest.state, whole.state)
    assert int(part.best.step) <= cut and part.history == whole.history[:cut]


def test_the_best_of_a_game_requires_a_metric():
    def guess(net, params, state, batch, *, key, train):
        loss = jnp.square(params["point"]["scale"] - batch[0]).mean()
        return loss, (state, {"loss": loss})

    number = dp.stateless(lambda key, x: {"scale": jnp.ones(1)}, lambda p, x: p["scale"])
    step = dp.training.make_game(dp.serial(point=number),
        {"point": dp.training.Player(guess, optax.sgd(0.1))},
                        inputs=lambda batch: batch[0])
    options = {"validation": [BATCH], "log_every": 1}
    assert train(step, [BATCH], 2, **options).best is None
    assert int(train(step, [BATCH], 2, metric="point/loss", **options).best.step) == 2


# Callbacks and repr.


def test_a_callback_sees_each_reading():
    seen = []

    def callback(step, state, metrics):
        assert int(state.step) == step
        seen.append((step, jax.tree.map(jnp.copy, state), state, metrics))

    result = train(sgd(), [BATCH], 5, log_every=2, log=callback, validation=[BATCH])
    assert [step for step, *_ in seen] == [2, 4, 5]
    assert [{"step": step, **metrics} for step, _, _, metrics in seen] == result.history
    for step, copy, _, _ in seen:
        assert_same(copy, train(sgd(), [BATCH], step).state)
    _, copy, kept, _ = seen[0]
    net = sgd().net
    for use in (lambda state: sgd().apply(state, BATCH), lambda state: sgd().evaluate(state, BATCH),
                lambda state: dp.evaluate(sgd(), state, [BATCH]),
                lambda state: train(sgd(), [BATCH], 1, state=state),
                lambda state: dp.predict(net, state.params, X),
                lambda state: net(state.params, X)):
        use(jax.tree.map(jnp.copy, copy))
        assert "donated" in refused(use, kept).got
    assert repr(kept).startswith("TrainState(step=int32[]")


def test_the_repr_of_a_state_and_a_fit_is_short():
    net = dp.models.gpt(vocabulary=50, length=8, width=8, depth=2, heads=2)
    step = dp.make_step(net, dp.text.next_token(), optax.adam(1e-3))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if leaf.dtype.name[:3]
                         != "key" else KEY, jax.eval_shape(step.init, KEY, jnp.ones((2, 8), int)))
    assert repr(state).startswith("TrainState(step=0, params={") and len(repr(state)) < 300
    assert len(repr(dp.training.Fit(state, state, [{"step": 1, "loss": 0.0}] * 999))) < 700
    assert jax.eval_shape(lambda state: jnp.zeros(len(repr(state))), state).shape[0] < 300


# Ctrl-C and non-finite losses.


def pressing(where, at):
    """A step, data and a callback, one of which is interrupted in step `at`."""
    count = {"step": 0, "data": 0}

    def press(kind):
        count[kind] += 1
        if kind == where and count[kind] == at:
            signal.raise_signal(signal.SIGINT)

    def apply(state, batch):
        press("step")
        return sgd().apply(state, batch)

    class Data:
        def __iter__(self):
            while True:
                press("data")
                yield BATCH

    def callback(step, state, metrics):
        if where == "callback" and step == at:
            raise KeyboardInterrupt

    return dataclasses.replace(sgd(), apply=apply), Data(), callback


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("where", "taken"), [("step", 5), ("data", 5), ("callback", 5)])
def test_ctrl_c_returns_the_result_so_far(where, taken):
    step, data, callback = pressing(where, 5)
    result = train(step, data, 99, log_every=1, log=callback, validation=[BATCH])
    assert int(result.state.step) == taken
    wanted = train(sgd(), [BATCH], taken, log_every=1, validation=[BATCH])
    assert_same(result.state, wanted.state)
    read = taken - (where != "callback")  # interrupted before the reading of this step
    assert result.history == wanted.history[:read] and int(result.best.step) == read
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_twice_in_one_step_is_not_deferred():
    def apply(state, batch):
        after = sgd().apply(state, batch)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return after

    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(sgd(), apply=apply), [BATCH], 3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_in_another_thread_needs_no_signals():
    found = []
    thread = threading.Thread(target=lambda: found.append(train(sgd(), [BATCH], 2)))
    thread.start()
    thread.join()
    assert int(found[0].state.step) == 2


def breaking(step_loss=None, step_gradient=None):
    """Training on batch numbers: in some the loss is NaN, in others only the gradient."""
    def objective(net, params, state, batch, *, key, train):
        number = batch[0].sum()
        loss = params["bias"].sum() + jnp.where(number == step_loss, jnp.nan, 0.0)
        root = jnp.sqrt(jnp.where(number == step_gradient, 0.0 * params["bias"][0], 1.0))
        return loss + 0 * root, (state, {"loss": loss})

    step = dp.make_step(NET, objective, optax.sgd(0.1))
    return step, [(np.full((2, 4), i + 1, np.float32) / 8, Y[:2]) for i in range(20)]


@pytest.mark.parametrize(("every", "broken"), [(1, 3), (2, 3), (5, 3), (50, 1), (50, 20)])
def test_the_error_of_a_non_finite_loss_has_the_result_so_far(every, broken):
    step, data = breaking(step_loss=broken)
    read = -(-broken // every) * every if every < 20 else 20
    error = refused(train, step, data, 20, log_every=every, validation=data[-1:] if every < 5
        else None)
    assert error.step == broken
    begun = read + (every >= 5 and read < 20)  # without validation the next step has begun
    assert int(error.state.step) == begun
    assert [row["step"] for row in error.history] == list(range(every, read, every))
    assert (error.best is None) == (not error.history or every >= 5)
    again = dp.training.Fit(error.state, error.best, error.history)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(again.state))
    assert f"in step {broken}" in str(error) or broken == read


def test_non_finite_parameters_after_the_last_step_raise():
    step, data = breaking(step_gradient=5)
    error = refused(train, step, data, 5, log_every=3)
    assert "finite parameters" in error.wants and "bias" in error.got
    assert error.step == 5 and int(error.state.step) == 5
    assert [row["step"] for row in error.history] == [3]
    assert refused(train, step, data, 9, log_every=3).step == 6  # its loss shows it


@pytest.mark.slow
def test_parameters_that_begin_infinite_do_not_raise():
    net = dp.stateless(lambda key, x: {"kernel": jnp.ones(3), "floor": jnp.full(1, -jnp.inf)},
                       lambda p, x: jnp.maximum(x[:, :3] * p["kernel"], p["floor"]))
    step = dp.make_step(net, dp.classification(), optax.sgd(0.1))
    assert int(train(step, [BATCH], 2).state.step) == 2


# Streams.


CELL = dp.serial(dp.recurrent(dp.simple_rnn(3)), dp.linear(2))
ROWS = np.random.default_rng(0).normal(size=(2, 12, 4)).astype(np.float32)
CHUNKS = [(ROWS[:, i : i + 4], ROWS[:, i : i + 4, :2]) for i in range(0, 12, 4)]


def streaming(objective=None, net=CELL):
    step = dp.make_step(net, objective or dp.regression(), optax.sgd(0.1))
    state = step.init(KEY, CHUNKS[0][0])
    return step, state._replace(state=net.start(
        state.params, state.state, CHUNKS[0][0], length=12))


@pytest.mark.slow
def test_fit_continues_a_started_stream():
    """The carry passes from batch to batch without its gradient: computed by hand."""
    step, begun = streaming()
    result = train(step, CHUNKS, 3, state=begun, validation=[(ROWS[:1, :3], ROWS[:1, :3, :2])])
    params, carry = begun.params, begun.state

    @jax.jit
    def go(params, carry, x, y):
        def loss(params):
            found, after = CELL.apply(params, carry, x)
            return jnp.square(found - y).mean(), after

        grads, after = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), after

    for x, y in CHUNKS:
        params, carry = go(params, carry, x, y)
    for one, other in ((result.state.params, params), (result.state.state, carry)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                     one, other)
    rest = dp.regression()(CELL, params, {}, (ROWS[:1, :3], ROWS[:1, :3, :2]), key=None,
                           train=False)[0]
    np.testing.assert_allclose(result.history[-1]["validation/loss"], rest, rtol=1e-5)


def test_a_stream_continues_after_a_restart():
    step, begun = streaming()
    part = train(step, CHUNKS[:2], 2, state=begun)
    whole = train(step, CHUNKS, 3, state=begun)
    equal(train(step, CHUNKS[2:], 1, state=part.state).state, whole.state)


@pytest.mark.slow
def test_parameters_of_another_net_are_refused_in_a_stream():
    step, begun = streaming()
    wide = [(np.ones((2, 4, 5), np.float32), CHUNKS[0][1])]
    assert "params" in refused(train, step, wide, 1, state=begun).wants


@pytest.mark.slow
def test_rows_of_a_stream_restart_where_a_sequence_ends():
    """Where the segment number changes, possibly between two batches."""
    step = dp.make_step(CELL, dp.regression(), optax.sgd(0.0))
    first, then = ({"x": x, "y": y} for x, y in CHUNKS[:2])
    state = step.init(KEY, first["x"])
    started = state._replace(state=CELL.start(state.params, {}, first["x"], length=12,
                                              segments=np.zeros((2, 4), np.int32)))
    numbered = [first | {"segments": np.zeros((2, 4), np.int32)},
                then | {"segments": np.array([[0] * 4, [1] * 4], np.int32)}]
    found = train(step, numbered, 2, state=started).state.state
    on = train(step, [first, then], 2, state=started).state.state
    anew = train(step, [then], 1, state=started).state.state
    carried = [next(leaf for path, leaf in dp.tree.paths(state).items() if "#" not in path)
               for state in (found, on, anew)]
    np.testing.assert_allclose(carried[0][0], carried[1][0], rtol=1e-6)
    np.testing.assert_allclose(carried[0][1], carried[2][1], rtol=1e-6)
    assert (jnp.abs(carried[1] - carried[2]) > 1e-3).any(-1).all()
