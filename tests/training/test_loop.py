"""`fit`: history, logs, resuming, and errors."""

import dataclasses
import json
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_iris
from support.refusing import expect, refused
from support.training_nets import KEY, NET, assert_same, examples, noisy, numbers, sgd, train

import diffprog as dp

# fit


def iris():
    x, y = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)[order], y.astype(np.int32)[order]


def test_fit_learns_irises():
    x, y = iris()
    step = dp.make_step(NET, dp.classification(), optax.adam(0.05))
    result = train(step, dp.batches((x[:100], y[:100]), 25, seed=0), 150,
                   validation=dp.batches((x[100:], y[100:]), 16))
    assert result.history[-1]["accuracy"] > 0.9
    assert result.history[-1]["validation/accuracy"] > 0.9
    assert result.history[0]["loss"] > result.history[-1]["loss"]
    labels = dp.predict(NET, result.state.params, x[100:]).argmax(-1)
    assert (np.asarray(labels) == y[100:]).mean() > 0.9


@pytest.mark.slow
def test_fit_is_a_loop_of_steps():
    x, y = examples()
    data = dp.batches((x, y), 5, seed=1)
    step = noisy()
    result = train(step, data, 4)
    state = step.init(KEY, x)
    for _, batch in zip(range(4), data, strict=False):
        state, _ = step.apply(state, batch)
    assert_same(result.state, state)
    assert result.best is None and [row["step"] for row in result.history] == [4]


@pytest.mark.slow
def test_history_is_the_mean_since_the_last_reading():
    x, y = examples()
    data = [(x[:7], y[:7]), (x[7:], y[7:])]  # the mean is over entries, not batches
    each = train(sgd(), data, 8, log_every=1).history
    some = train(sgd(), data, 8, log_every=3).history
    assert [row["step"] for row in some] == [3, 6, 8]
    weights = np.array([7, 5] * 4)
    for name in ("loss", "accuracy"):
        values = np.array([row[name] for row in each])
        wanted = [np.average(values[at], weights=weights[at])
                  for at in (slice(0, 3), slice(3, 6), slice(6, 8))]
        np.testing.assert_allclose([row[name] for row in some], wanted, rtol=1e-6)
    assert all(set(row) == {"step", "loss", "accuracy"} for row in some)
    assert all(isinstance(row["loss"], float) for row in some)


def test_data_is_iterated_again_when_it_ends():
    x, y = examples()
    once = train(sgd(), dp.batches((x, y), 5), 6).state  # three batches
    twice = train(sgd(), [*dp.batches((x, y), 5)] * 2, 6).state
    assert_same(once, twice)


def test_a_log_is_a_path_of_json_lines(tmp_path):
    x, y = examples()
    for kind in (str, type(tmp_path)):
        path = tmp_path / kind.__name__
        data, options = [(x, y)], dict(log_every=2, validation=[(x, y)], log=kind(path))
        first = train(sgd(), data, 5, **options).history
        second = train(sgd(), data, 2, **options).history
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines == [*first, *second]
        assert [line["step"] for line in lines] == [2, 4, 5, 2]
        assert set(lines[0]) == {"step", "loss", "accuracy", "validation/loss",
                                 "validation/accuracy"}


def test_a_log_is_a_function():
    x, y = examples()
    seen = []
    log = lambda step, metrics: seen.append({"step": step, **metrics})  # noqa: E731
    assert train(sgd(), [(x, y)], 5, log_every=2, log=log).history == seen
    assert len(seen) == 3


def test_the_best_state_has_the_least_validation_loss():
    x, y = examples()
    against = (x, (y + 1) % 3)  # other labels: the first reading is the best
    result = train(sgd(), [(x, y)], 9, log_every=2, validation=[against])
    losses = [row["validation/loss"] for row in result.history]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert int(result.best.step) == 2 and int(result.state.step) == 9
    assert dp.evaluate(sgd(), result.best, [against])["loss"] == losses[0]
    assert_same(result.best, train(sgd(), [(x, y)], 2).state)
    result = train(sgd(), [(x, y)], 9, log_every=2, validation=[(x, y)])
    assert int(result.best.step) == 9
    assert_same(result.best, result.state)


def readings(losses, **options):
    """A fit with given validation losses, one per step."""
    def objective(net, params, state, batch, *, key, train):
        loss = params["kernel"].sum() if train else jnp.asarray(losses)[batch]
        return loss, (state, {"loss": loss})

    net = dp.stateless(lambda key, x: {"kernel": jnp.zeros(1)}, lambda params, x: x)
    step = dp.make_step(net, objective, optax.sgd(1.0))

    class Validation:
        """Batches that count their iterations."""

        times = 0

        def __iter__(self):
            self.times += 1
            return iter([max(self.times - 2, 0)])  # the first is the rehearsal

    batch = (np.zeros(1, np.float32), np.zeros(1, np.float32))
    steps = options.pop("steps", len(losses))
    return train(step, [batch], steps, log_every=1, validation=Validation(), **options)


@pytest.mark.parametrize(("losses", "patience", "stop", "best"), [
    ([3, 2, 1, 2, 2, 0], 2, 5, 3),
    ([3, 2, 1, 2, 2, 0], 3, 6, 6),  # the lowest is the last reading
    ([3, 2, 1, 2, 2, 0], None, 6, 6),
    ([3, 2, 2, 2, 1, 9], 2, 4, 2),  # equal to the lowest is not lower
    ([1, 2, 0, 2, 3, 0], 2, 5, 3),  # a new lowest restarts the count
    ([1, 2, 3], 1, 2, 1),
    ([3, 2, 1], 1, 3, 3),
])
def test_patience_stops_early(losses, patience, stop, best):
    result = readings([float(loss) for loss in losses], patience=patience)
    assert [row["step"] for row in result.history] == [*range(1, stop + 1)]
    assert [row["validation/loss"] for row in result.history] == losses[:stop]
    assert int(result.state.step) == stop and int(result.best.step) == best
    assert result.best.params["kernel"].tolist() == [-best]


def test_the_bar_closes_when_it_stops_early(capsys):
    readings([1.0, 2.0, 3.0, 4.0], patience=2, steps=4, progress=True)
    shown = capsys.readouterr().err
    assert "3/4" in shown and "4/4" not in shown and shown.endswith("\n")


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("patience", [None, 1])
def test_a_validation_loss_that_is_not_finite_is_an_error(broken, patience):
    expect("", f"wants a finite validation/loss, got {broken} by step 2, with finite parameters; "
           "look for NaN and for labels outside their range in the data",
           readings, [1.0, broken, 0.0], patience=patience)


@pytest.mark.parametrize("wrong", [0, 1.0, True])
def test_patience_is_a_positive_int(wrong):
    data = [examples()]
    assert "patience" in refused(train, sgd(), data, 1, patience=wrong, validation=data).wants


def test_without_a_loss_no_state_is_the_best():
    x, y = examples()
    game = dp.training.make_game(dp.serial(one=NET), {"one": dp.training.Player(
        lambda net, params, state, batch, *, key, train: (
            params["one"]["bias"].sum(), (state, {"error": params["one"]["bias"].sum()})),
        optax.sgd(0.1))}, inputs=lambda batch: batch[0])
    assert train(game, [(x, y)], 1, validation=[(x, y)]).best is None


@pytest.mark.slow
def test_ignored_labels_and_masks_pass_through_fit():
    x, y = examples()
    mask = np.arange(12) % 4 != 0
    kept = mask & (y != 1)
    options = dict(class_weights=np.array([0.5, 1.0, 2.0]))
    step, plain = (dp.make_step(NET, dp.classification(**options, **more), optax.sgd(0.1))
                   for more in ({"ignore_index": 1}, {}))
    data = {"x": np.where(mask[:, None], x, 1e6), "y": y, "mask": mask}
    results = [
        train(step, [data], 3, validation=dp.batches(data, 5)),
        train(plain, [(x[kept], y[kept])], 3, validation=[(x[kept], y[kept])])]
    assert_same(results[0].state, results[1].state, rtol=1e-5, atol=1e-6)
    assert results[0].history[0] == pytest.approx(results[1].history[0], rel=1e-5)


def test_continuing_equals_one_long_run():
    x, y = examples()
    step = noisy()
    whole = train(step, [(x, y)], 7)
    part = train(step, [(x, y)], 4)
    rest = train(step, [(x, y)], 3, state=part.state, log_every=5)
    assert int(rest.state.step) == 7
    assert_same(rest.state, whole.state)
    assert [row["step"] for row in rest.history] == [5, 7]


def test_the_state_argument_stays_valid():
    x, y = examples()
    step = noisy()
    given = train(step, [(x, y)], 2).state
    before = {path: leaf.copy() for path, leaf in numbers(given).items()}
    train(step, [(x, y)], 3, state=given)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    for path, leaf in numbers(given).items():
        np.testing.assert_array_equal(leaf, before[path])
    assert int(given.step) == 2


def test_the_best_state_stays_valid_after_later_steps():
    x, y = examples()
    result = train(sgd(), [(x, y)], 4, log_every=1, validation=[(x, (y + 1) % 3)])
    assert int(result.best.step) == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(result.best))


def test_the_state_of_another_net_is_refused():
    x, y = examples()
    wide, _ = examples(width=5)
    state = sgd().init(KEY, x)
    with pytest.raises(dp.LayerError, match=r"kernel as float32\[5,3\], got float32\[4,3\]"):
        train(sgd(), [(wide, y)], 1, state=state)
    with pytest.raises(dp.LayerError, match="params"):
        train(sgd(dp.serial(NET)), [(x, y)], 1, state=state)
    net = dp.serial(dp.batch_norm(), NET)
    full = sgd(net).init(KEY, x)
    with pytest.raises(dp.LayerError, match="state with batch_norm_0"):
        train(sgd(net), [(x, y)], 1, state=full._replace(state={}))


def test_a_generator_may_end_after_the_last_step():
    assert int(train(sgd(), (examples() for _ in range(3)), 3).state.step) == 3


@pytest.mark.parametrize("begin", [
    lambda: (examples() for _ in range(2)), lambda: iter([examples()] * 2), lambda: iter(()),
    list, tuple,
], ids=["generator", "iterator", "empty iterator", "empty list", "empty tuple"])
def test_data_that_end_before_the_last_step_are_refused(begin):
    with pytest.raises(dp.LayerError, match="a batch for every step"):
        train(sgd(), begin(), 3)


def test_a_loss_that_explodes_names_the_parameters():
    x, y = examples()
    net = dp.serial(body=dp.linear(4), head=NET)
    with pytest.raises(dp.LayerError, match="a finite loss") as caught:
        train(sgd(net, rate=1e38), [(x, y)], 20, log_every=5)
    assert all(path in str(caught.value) for path in (
        "body/bias", "body/kernel", "head/bias", "head/kernel"))
    assert "by step 5" in str(caught.value)


def test_infinite_inputs_name_the_parameters():
    x, y = examples()
    frozen = optax.masked(optax.set_to_zero(), lambda p: dp.tree.mask(p, "head/**"))
    net = dp.serial(body=dp.linear(4), head=NET)
    step = dp.make_step(net, dp.classification(), optax.chain(frozen, optax.sgd(0.1)))
    x[3, 1] = np.inf
    with pytest.raises(dp.LayerError, match="non-finite body/bias, body/kernel;"):
        train(step, [(x, y)], 2)


@pytest.mark.parametrize("wrong", [
    dict(steps=0), dict(steps=2.0), dict(steps=2, log_every=0),
], ids=str)
def test_fit_requires_positive_counts(wrong):
    x, y = examples()
    with pytest.raises(dp.LayerError, match="at least 1"):
        dp.fit(sgd(), [(x, y)], key=KEY, progress=False, **wrong)


def test_a_bar_shows_progress(capsys):
    x, y = examples()
    train(sgd(), [(x, y)], 4, progress=True)
    assert "4/4" in capsys.readouterr().err
    train(sgd(), [(x, y)], 4)
    shown = capsys.readouterr()
    assert shown.err == shown.out == ""


@pytest.mark.slow
def test_side_inputs_and_masks_come_with_the_batch():
    @dp.program(head=NET)
    def net(layers, x, *, shift):
        return layers.head(x + shift)

    x, y = examples()
    mask = np.arange(12) < 8
    shift = np.ones((12, 4), np.float32)
    broken = np.where(mask[:, None], x, 1e6)
    data = [{"x": broken, "y": y, "shift": shift, "mask": mask}]
    result = train(sgd(net), data, 3)
    wanted = train(sgd(dp.serial(head=NET)), [(x[:8] + 1, y[:8])], 3)
    assert_same(result.state, wanted.state, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.history[-1]["loss"], wanted.history[-1]["loss"], rtol=1e-5)


def test_fit_takes_either_a_key_or_a_state():
    step = sgd()
    state = step.init(KEY, examples()[0])
    for both in ({"key": KEY, "state": state}, {}):
        with pytest.raises(dp.LayerError, match="a key to begin with or a state"):
            dp.fit(step, [examples()], steps=1, progress=False, **both)


def order(steps=5, end=None, **options):
    """Which steps begin and which metrics are fetched, in order; step `end` presses Ctrl-C."""
    happened = []

    class Metric(np.ndarray):
        """A number of a step that notes when it is fetched."""

        def __array__(self, *args, **kwargs):
            happened.append(f"read {self.step}")
            return np.asarray(1.0)

    def apply(state, batch):
        state, _ = sgd().apply(state, batch)
        number = int(state.step)
        happened.append(f"begin {number}")
        metric = np.zeros(()).view(Metric)
        metric.step = number
        if number == end:
            signal.raise_signal(signal.SIGINT)
        return state, {"count": 1, "value": metric}

    result = train(dataclasses.replace(sgd(), apply=apply), [examples()], steps, log_every=2,
                   **options)
    return happened, [row["step"] for row in result.history]


def test_metrics_are_fetched_after_the_next_step_has_begun(tmp_path):
    late = ["begin 1", "begin 2", "begin 3", "read 1", "read 2", "begin 4", "begin 5", "read 3",
            "read 4", "read 5"]
    for log in (None, tmp_path / "log", lambda step, metrics: None):
        assert order(log=log) == (late, [2, 4, 5])
    at_once = ["begin 1", "begin 2", "read 1", "read 2", "begin 3", "begin 4", "read 3", "read 4",
               "begin 5", "read 5"]
    with dp.runtime.Checkpoints(tmp_path / "run", save_every=1) as due:
        for needing in (dict(log=lambda step, state, metrics: int(state.step)),
                        dict(validation=[examples()]), dict(checkpoints=due)):
            assert order(**needing) == (at_once, [2, 4, 5])


def test_a_reading_is_made_though_the_next_step_is_not():
    """The data ends, or Ctrl-C is pressed, before the next step has begun."""
    seen = []
    with pytest.raises(dp.LayerError, match="a batch for every step"):
        train(sgd(), iter([examples()] * 2), 3, log_every=2,
              log=lambda step, metrics: seen.append(step))
    assert seen == [2]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("end", "read"), [(2, []), (3, [2]), (4, [2]), (5, [2, 4])])
def test_ctrl_c_loses_no_reading(end, read):
    """A reading is due once its step has ended without Ctrl-C."""
    happened, history = order(9, end)
    assert f"begin {end + 1}" not in happened and history == read


def test_a_step_of_fit_makes_few_calls_of_python():
    """The calls of this package that a further step adds; readings cost more."""
    package = str(pathlib.Path(dp.__file__).parent)

    def calls(steps):
        count = 0

        def counted(frame, event, _):
            nonlocal count
            count += event == "call" and frame.f_code.co_filename.startswith(package)

        sys.setprofile(counted)
        try:
            train(sgd(), dp.batches(examples(), 4, seed=0), steps, log_every=1000)
        finally:
            sys.setprofile(None)
        return count

    calls(2)  # which compiles
    assert (calls(42) - calls(12)) / 30 <= 45
