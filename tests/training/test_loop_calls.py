"""Several steps in one call of the device: as if they were taken one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.training_nets import KEY, NOISY, assert_same, examples, noisy, numbers, train

import diffprog as dp

X, Y = examples()
DATA = dp.batches((X, Y), 4, seed=0)
STEP = dp.make_step(NOISY, dp.classification(), optax.adam(0.05), steps_per_call=4)


def counted(step, calls):
    """The step, which notes the number of steps of each call."""
    def one(state, batch):
        calls.append(1)
        return step.apply(state, batch)

    def many(state, batches):
        calls.append(len(batches[0]))
        return step.apply_many(state, batches)

    return dataclasses.replace(step, apply=one, apply_many=many)


def test_the_result_is_that_of_single_steps():
    """With dropout and batch norm, and steps that fill no call at the begin and at the end."""
    for validation in (None, [(X, Y)]):  # readings are late, or at once
        single = train(noisy(), DATA, 22, log_every=8, validation=validation)
        calls = []
        found = train(counted(STEP, calls), DATA, 22, log_every=8, validation=validation)
        assert calls == [4, 4, 4, 4, 4, 1, 1]
        assert_same(found.state, single.state)
        assert [row["step"] for row in found.history] == [8, 16, 22]
        for one, other in zip(found.history, single.history, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    begun = train(noisy(), DATA, 2)
    calls = []
    train(counted(STEP, calls), DATA, 8, state=begun.state, log_every=8)
    assert calls == [1, 1, 4, 1, 1]


def test_a_resumed_run_has_the_same_bits(tmp_path):
    options = {"log_every": 4, "validation": [(X, Y)]}
    whole = train(STEP, DATA, 18, **options)

    def stop(step, state, metrics):
        if step == 8:
            raise KeyboardInterrupt

    part = train(STEP, DATA, 18, checkpoints=tmp_path, log=stop, **options)
    assert int(part.state.step) == 8
    again = train(STEP, DATA, 18, checkpoints=tmp_path, resume=True, **options)
    for path, leaf in numbers(whole.state).items():
        np.testing.assert_array_equal(numbers(again.state)[path], leaf, err_msg=path)
    assert again.history == whole.history


def test_batches_of_other_shapes_are_taken_one_by_one():
    data, calls = [(X[:5], Y[:5]), (X[5:10], Y[5:10]), (X[10:], Y[10:])], []
    found = train(counted(STEP, calls), data, 8, log_every=8)
    assert calls == [1] * 8
    assert_same(found.state, train(noisy(), data, 8).state)


def test_batches_on_the_device_and_lists_are_stacked_too():
    expected = train(noisy(), DATA, 4).state
    batches = [batch for batch, _ in zip(DATA, range(4), strict=False)]
    arrays = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    calls = []
    assert_same(train(counted(STEP, calls), arrays, 4, log_every=4).state, expected)
    lists = [(x, y.tolist()) for x, y in batches]
    assert_same(train(counted(STEP, calls), lists, 4, log_every=4).state, expected)
    assert calls == [4, 4]


def test_the_first_broken_step_of_a_call_is_named():
    data = [(X[:4], Y[:4])] * 2 + [(X[:4] * np.nan, Y[:4])] + [(X[:4], Y[:4])] * 5
    for step in (STEP, dp.make_step(NOISY, dp.classification(), optax.adam(0.05), steps_per_call=4,
                                    non_finite="raise")):
        with pytest.raises(dp.LayerError, match="in step 3") as error:
            train(step, data, 8, log_every=4)
        assert vars(error.value)["step"] == 3


def test_a_skipped_step_of_a_call_is_counted():
    data = [(X[:4], Y[:4])] * 2 + [(X[:4] * np.nan, Y[:4])] + [(X[:4], Y[:4])] * 5
    step = dp.make_step(NOISY, dp.classification(), optax.adam(0.05), steps_per_call=4,
                        non_finite="skip")
    found = train(step, data, 8, log_every=4)
    assert [row["skipped"] for row in found.history] == [0.25, 0]


def test_a_net_of_convolutions_is_refused_on_cpu():
    """Their gradients in a scan are many times slower; see `diffprog.core.loops`."""
    net = dp.serial(dp.conv(2, 3), jax.nn.relu, dp.flatten(), dp.linear(3))
    images, labels = np.ones((4, 6, 6, 1), np.float32), np.arange(4) % 3
    step = dp.make_step(net, dp.classification(), optax.sgd(0.1), steps_per_call=2)
    if jax.default_backend() == "cpu":
        with pytest.raises(dp.LayerError, match="convolutions on CPU"):
            train(step, [(images, labels)], 2, log_every=2)
    else:
        assert int(train(step, [(images, labels)], 2, log_every=2).state.step) == 2


def test_apply_many_is_a_pure_function_for_loops_of_ones_own():
    batches = [batch for batch, _ in zip(DATA, range(3), strict=False)]
    state = noisy().init(KEY, X)
    stacked = jax.tree.map(lambda *a: np.stack(a), *batches)
    many, metrics = STEP.apply_many(jax.tree.map(jnp.copy, state), stacked)
    assert metrics["loss"].shape == (3,)
    for i, batch in enumerate(batches):
        state, one = noisy().apply(state, batch)
        np.testing.assert_allclose(metrics["loss"][i], one["loss"], rtol=1e-5)
    assert_same(many, state)
