"""`fit` with checkpoints: a run that was interrupted and resumed equals one that was not."""

import dataclasses
import itertools
import json
import os
import signal

import numpy as np
import optax
import pytest
from support.comparing import KEY, equal
from support.refusing import refused
from support.training_nets import NET, examples, noisy, sgd, train

import diffprog as dp

BATCH = examples()
DATA = dp.batches(BATCH, 4, seed=3)
VALIDATION = dp.training.Validation([BATCH], metric="accuracy", highest=True, patience=50)


def run(folder, steps=12, **options):
    """A run of `noisy` with readings every 3 steps, each of which is saved."""
    checkpoints = dp.runtime.Checkpoints(folder, save_every=1, last=2)
    with checkpoints:
        return train(noisy(), DATA, steps, log_every=3, validation=VALIDATION,
                     checkpoints=checkpoints, **options)


def stopping(at):
    """A step of `noisy` at which Ctrl-C is pressed, once it is done, in call number `at`."""
    calls = itertools.count(1)

    def apply(state, batch):
        result = noisy().apply(state, batch)
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return result

    return dataclasses.replace(noisy(), apply=apply)


def assert_equal_runs(one, other):
    equal(one.state, other.state)
    equal(one.best, other.best)
    assert one.history == other.history


@pytest.fixture(scope="module")
def whole():
    return train(noisy(), DATA, 12, log_every=3, validation=VALIDATION)


def test_a_run_with_checkpoints_is_that_without(whole, tmp_path):
    assert_equal_runs(run(tmp_path), whole)
    assert dp.runtime.Checkpoints(tmp_path).steps == [9, 12]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at", [6, 7])
def test_an_interrupted_run_resumes_bit_for_bit(whole, tmp_path, at):
    """At a reading, and between two: metrics since the last reading are saved too."""
    with dp.runtime.Checkpoints(tmp_path, save_every=1) as checkpoints:
        part = train(stopping(at), DATA, 12, log_every=3, validation=VALIDATION,
                     checkpoints=checkpoints)
    assert int(part.state.step) == at
    assert_equal_runs(run(tmp_path, resume=True), whole)


@pytest.mark.usefixtures("interruptible")
def test_a_run_interrupted_while_a_reading_waits_resumes(tmp_path):
    """Without validation the metrics of step 6 are fetched after step 7 has begun."""
    wanted = train(noisy(), DATA, 12, log_every=3)
    part = train(stopping(7), DATA, 12, log_every=3, checkpoints=tmp_path)
    assert part.history == wanted.history[:2] and int(part.state.step) == 7
    assert_equal_runs(train(noisy(), DATA, 12, log_every=3, checkpoints=tmp_path, resume=True),
                      wanted)


@pytest.mark.usefixtures("interruptible")
def test_the_last_reading_is_made_up_for(tmp_path):
    """The last step is between two readings, and the run is interrupted there."""
    wanted = train(noisy(), DATA, 7, log_every=3, validation=VALIDATION)
    with dp.runtime.Checkpoints(tmp_path, save_every=1) as checkpoints:
        train(stopping(7), DATA, 7, log_every=3, validation=VALIDATION, checkpoints=checkpoints)
    assert_equal_runs(run(tmp_path, 7, resume=True), wanted)


@pytest.mark.usefixtures("interruptible")
def test_a_state_between_two_readings_is_not_ranked_by_the_one_before(tmp_path):
    with dp.runtime.Checkpoints(tmp_path, save_every=1, last=3, best=1, metric="accuracy",
                                highest=True) as checkpoints:
        train(stopping(7), DATA, 12, log_every=3, validation=VALIDATION, checkpoints=checkpoints)
        assert checkpoints.steps[-1] == 7 and 7 not in checkpoints.best_steps


def test_a_metric_that_is_nan_is_saved(tmp_path):
    def objective(net, params, state, batch, *, key, train):
        loss, (state, metrics) = dp.classification()(
            net, params, state, batch, key=key, train=train)
        return loss, (state, {**metrics, "ratio": np.float32(np.nan)})

    step = dp.make_step(NET, objective, optax.sgd(0.1))
    for _ in range(2):
        result = train(step, DATA, 3, checkpoints=tmp_path, resume=True)
    assert np.isnan(result.history[-1]["ratio"])


def test_a_finished_run_is_read_from_its_checkpoint(whole, tmp_path):
    run(tmp_path)
    assert_equal_runs(run(tmp_path, resume=True), whole)


def test_without_a_checkpoint_a_run_begins_at_0(whole, tmp_path):
    assert_equal_runs(run(tmp_path / "new", resume=True), whole)


@pytest.mark.usefixtures("interruptible")
def test_a_run_that_continues_a_state_resumes(whole, tmp_path):
    begun = train(noisy(), DATA, 6, log_every=3, validation=VALIDATION)
    with dp.runtime.Checkpoints(tmp_path, save_every=1) as checkpoints:
        train(stopping(2), DATA, 6, state=begun, log_every=3, validation=VALIDATION,
              checkpoints=checkpoints)
    assert_equal_runs(run(tmp_path, 6, state=begun, resume=True), whole)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="the system has no SIGTERM")
def test_sigterm_saves_and_ends(tmp_path):
    def end(step, metrics):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    result = train(noisy(), DATA, 12, log_every=3, log=end, checkpoints=tmp_path)
    assert int(result.state.step) == 7  # had begun when the metrics of step 6 were fetched
    assert dp.runtime.Checkpoints(tmp_path).steps == [7]
    assert signal.getsignal(signal.SIGTERM) is before


class Numbered:
    """An iterator of batches with a position, as loaders of other libraries have."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return BATCH[0][self.at % 3 :][:4], BATCH[1][self.at % 3 :][:4]

    def get_state(self):
        return json.dumps({"at": self.at}).encode()

    def set_state(self, state):
        self.at = json.loads(state)["at"]


class Loader:
    """An iterable with a position of its own, as a stateful loader has."""

    def __init__(self):
        self.inner = Numbered()

    def __iter__(self):
        return iter([next(self.inner) for _ in range(1)])

    def state_dict(self):
        return {"at": self.inner.at}

    def load_state_dict(self, state):
        self.inner.at = state["at"]


@pytest.mark.parametrize("make", [Numbered, Loader])
def test_data_with_a_position_resumes(make, tmp_path):
    wanted = train(sgd(), make(), 7)
    with dp.runtime.Checkpoints(tmp_path, save_every=1) as checkpoints:
        train(sgd(), make(), 4, checkpoints=checkpoints)
        found = train(sgd(), make(), 7, checkpoints=checkpoints, resume=True)
    equal(found.state, wanted.state)


def test_other_data_is_refused_before_a_folder_is_made(tmp_path):
    error = refused(train, sgd(), [BATCH], 2, checkpoints=tmp_path / "new", resume=True)
    assert "position" in error.wants and "get_state" in error.remedy
    assert not (tmp_path / "new").exists()


def test_a_folder_of_another_run_is_refused_before_training(tmp_path):
    train(sgd(), DATA, 2, checkpoints=tmp_path)
    error = refused(train, sgd(), DATA, 5, checkpoints=tmp_path)
    assert "of step 2" in error.got and "resume=True" in error.remedy
    train(sgd(), DATA, 2, state=train(sgd(), DATA, 2).state, checkpoints=tmp_path)


def test_resume_needs_checkpoints():
    assert "checkpoints" in refused(train, sgd(), DATA, 2, resume=True).wants


def test_the_checkpoint_of_another_net_is_refused(tmp_path):
    train(sgd(), DATA, 2, checkpoints=tmp_path)
    other = dp.make_step(dp.linear(5), dp.classification(), optax.sgd(0.1))
    with pytest.raises(dp.LayerError):
        train(other, DATA, 2, checkpoints=tmp_path, resume=True)


# Epochs.

@pytest.mark.parametrize(("data", "epochs", "steps"), [
    (dp.batches(BATCH, 5, seed=0), 2, -(-2 * len(BATCH[0]) // 5)),
    (dp.batches(BATCH, 5), 2, 2 * -(-len(BATCH[0]) // 5)), ([BATCH] * 3, 4, 12)],
    ids=["shuffled", "in order", "a list"])
def test_epochs_are_passes_over_the_data(data, epochs, steps):
    result = dp.fit(sgd(), data, epochs=epochs, key=KEY, progress=False)
    assert int(result.state.step) == steps


def test_epochs_need_a_length_and_steps_exclude_them():
    begin = {"key": KEY, "progress": False}
    assert "length" in refused(dp.fit, sgd(), iter([BATCH]), epochs=1, **begin).wants
    for options in ({}, {"steps": 1, "epochs": 1}):
        assert "steps or of epochs" in refused(dp.fit, sgd(), [BATCH], **options, **begin).wants


# Logs and validation.

def test_several_logs_are_told(tmp_path):
    seen = []
    logs = [tmp_path / "log.jsonl", lambda step, metrics: seen.append(step),
            lambda step, state, metrics: seen.append(int(state.step))]
    result = train(sgd(), [BATCH], 4, log_every=2, log=logs)
    assert seen == [2, 2, 4, 4]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


def test_validation_is_tried_before_the_first_step():
    taken = []
    step = dataclasses.replace(sgd(), apply=lambda *given: taken.append(given))
    x = np.zeros((4, 9), np.float32)  # another number of features
    with pytest.raises(dp.LayerError):
        train(step, [BATCH], 4, validation=[(x, BATCH[1][:4])])
    assert not taken

