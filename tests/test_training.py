"""Training: one step against numpy, a loop around it, and what it writes down and refuses."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_iris

import diffprog as dp

KEY = jax.random.key(0)
NET = dp.linear(3)
NOISY = dp.serial(dp.batch_norm(), dp.dropout(0.3), NET)  # with state, and with a use for keys


def examples(count=12, width=4, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, width)).astype(np.float32)
    return x, (x @ draw.normal(size=(width, 3))).argmax(-1).astype(np.int32)


@functools.cache  # tests share the compiled programs of a step
def sgd(net=NET, rate=0.1, **options):
    return dp.make_step(net, dp.classification(), optax.sgd(rate), **options)


@functools.cache
def noisy():
    return dp.make_step(NOISY, dp.classification(), optax.adam(0.05))


def train(step, data, steps, **options):
    return dp.fit(step, data, steps=steps, **{"key": KEY, "progress": False} | options)


def numbers(state):
    """The leaves of a train state by path, the key as numbers."""
    return {path: np.asarray(leaf) for path, leaf in dp.tree.paths(
        state._replace(key=jax.random.key_data(state.key))).items()}


def assert_same(one, other, **tolerance):
    one, other = numbers(one), numbers(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_allclose(one[path], other[path], err_msg=path, **tolerance)


# one step


def test_a_step_unpacks_as_the_pair():
    step = sgd()
    init, apply = step
    assert init is step.init and apply is step.apply and step.net is NET
    state = init(KEY, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    assert state.params["kernel"].shape == (4, 3) and int(state.step) == 0


def test_a_step_goes_down_the_gradient():
    x, y = examples()
    step = sgd(rate=0.3, donate=False)
    before = step.init(KEY, x)
    before.params["bias"] = jnp.array([0.1, -0.2, 0.3])
    after, metrics = step.apply(before, (x, y))
    kernel, bias = (np.asarray(before.params[name], np.float64) for name in ("kernel", "bias"))
    share = np.exp(x @ kernel + bias)
    share /= share.sum(-1, keepdims=True)
    np.testing.assert_allclose(metrics["loss"], -np.log(share[range(12), y]).mean(), rtol=1e-5)
    share[range(12), y] -= 1
    np.testing.assert_allclose(after.params["kernel"], kernel - 0.3 * x.T @ share / 12, atol=1e-6)
    np.testing.assert_allclose(after.params["bias"], bias - 0.3 * share.mean(0), atol=1e-6)
    assert int(after.step) == 1 and after.params["kernel"].dtype == jnp.float32


def test_evaluate_of_a_step_is_at_rest():
    x, y = examples()
    step = noisy()
    state, training = step.apply(step.init(KEY, x), (x, y))
    rest = step.evaluate(state, (x, y))
    logits = NOISY(state.params, jnp.asarray(x), state=state.state)
    np.testing.assert_allclose(rest["loss"], dp.cross_entropy(logits, jnp.asarray(y)), rtol=1e-6)
    assert float(training["loss"]) != float(rest["loss"])


def test_every_step_has_a_key_of_its_own():
    x, y = examples()
    step = sgd(dp.serial(dp.dropout(0.5), NET), rate=0.0, donate=False)
    state = step.init(KEY, x)
    losses = []
    for _ in range(3):
        state, metrics = step.apply(state, (x, y))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    _, metrics = step.apply(step.init(KEY, x), (x, y))
    assert float(metrics["loss"]) == losses[0]


def test_donation_is_a_choice():
    x, y = examples()
    for donate in (False, True):
        step = sgd(donate=donate)
        old = step.init(KEY, x)
        new, _ = step.apply(old, (x, y))
        assert {leaf.is_deleted() for leaf in jax.tree.leaves(old)} == {donate}
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("make", [optax.contrib.prodigy, optax.contrib.dog])
def test_an_optimizer_may_keep_the_initial_parameters(make):
    # prodigy and dog hold the parameters themselves: the same buffer twice in one state.
    x, y = examples()
    step = dp.make_step(NET, dp.classification(), make())
    state, _ = step.apply(step.init(KEY, x), (x, y))
    assert int(state.step) == 1


def test_an_epoch_may_be_a_scan():
    x, y = examples(20)
    xs, ys = x.reshape(5, 4, 4), y.reshape(5, 4)
    step = noisy()
    scanned, metrics = jax.lax.scan(step.apply, step.init(KEY, x), (xs, ys))
    looped, losses = step.init(KEY, x), []
    for batch in zip(xs, ys, strict=True):
        looped, read = step.apply(looped, batch)
        losses.append(float(read["loss"]))
    assert int(scanned.step) == 5
    assert_same(scanned, looped, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4)


def test_a_sweep_may_be_a_vmap():
    x, y = examples()
    step = sgd(donate=False)
    keys = jax.random.split(KEY, 3)
    states = jax.jit(jax.vmap(lambda key: step.init(key, x)))(keys)
    states, metrics = jax.vmap(step.apply, in_axes=(0, None))(states, (x, y))
    assert len(set(np.asarray(metrics["loss"]).tolist())) == 3
    for i, key in enumerate(keys):
        alone = numbers(step.apply(step.init(key, x), (x, y))[0])
        for path, leaf in numbers(states).items():
            np.testing.assert_allclose(leaf[i], alone[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_the_statistics_of_batch_norm_are_threaded():
    x, y = examples()
    step = sgd(dp.serial(norm=dp.batch_norm(), head=NET), donate=False)
    state = step.init(KEY, x)
    mean, var = np.zeros(4), np.ones(4)
    for part in (slice(0, 6), slice(6, 12)):
        state, _ = step.apply(state, (x[part], y[part]))
        mean = 0.9 * mean + 0.1 * x[part].mean(0)
        var = 0.9 * var + 0.1 * x[part].var(0, ddof=1)
    np.testing.assert_allclose(state.state["norm"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.state["norm"]["var"], var, rtol=1e-5)
    assert "norm" in state.params and set(state.state) == {"norm"}


def test_a_state_that_changes_its_structure_is_refused():
    def apply(params, state, x, *, key=None, train=False):
        return x, {**state, "more": jnp.ones(())}

    grows = dp.Layer(lambda key, x: ({}, {"some": jnp.zeros(())}), apply)
    x, y = examples()
    step = sgd(dp.serial(NET, grows))
    with pytest.raises(dp.LayerError, match="one structure"):
        step.apply(step.init(KEY, x), (x, y))


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


def test_history_is_the_mean_since_the_last_reading():
    x, y = examples()
    data = [(x[:7], y[:7]), (x[7:], y[7:])]  # of unequal size: entries count, not batches
    each = train(sgd(), data, 8, every=1).history
    some = train(sgd(), data, 8, every=3).history
    assert [row["step"] for row in some] == [3, 6, 8]
    weights = np.array([7, 5] * 4)
    for name in ("loss", "accuracy"):
        values = np.array([row[name] for row in each])
        wanted = [np.average(values[at], weights=weights[at])
                  for at in (slice(0, 3), slice(3, 6), slice(6, 8))]
        np.testing.assert_allclose([row[name] for row in some], wanted, rtol=1e-6)
    assert all(set(row) == {"step", "loss", "accuracy"} for row in some)
    assert all(isinstance(row["loss"], float) for row in some)


def test_data_is_begun_anew_when_it_ends():
    x, y = examples()
    once = train(sgd(), dp.batches((x, y), 5), 6).state  # three batches
    twice = train(sgd(), [*dp.batches((x, y), 5)] * 2, 6).state
    assert_same(once, twice)


def test_a_log_is_a_path_of_json_lines(tmp_path):
    x, y = examples()
    for kind in (str, type(tmp_path)):
        path = tmp_path / kind.__name__
        data, options = [(x, y)], dict(every=2, validation=[(x, y)], log=kind(path))
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
    assert train(sgd(), [(x, y)], 5, every=2, log=log).history == seen
    assert len(seen) == 3


def test_the_best_state_has_the_least_validation_loss():
    x, y = examples()
    against = (x, (y + 1) % 3)  # what is learned is wrong here: the first reading is the best
    result = train(sgd(), [(x, y)], 9, every=2, validation=[against])
    losses = [row["validation/loss"] for row in result.history]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert int(result.best.step) == 2 and int(result.state.step) == 9
    assert dp.evaluate(sgd(), result.best, [against])["loss"] == losses[0]
    assert_same(result.best, train(sgd(), [(x, y)], 2).state)
    result = train(sgd(), [(x, y)], 9, every=2, validation=[(x, y)])
    assert int(result.best.step) == 9
    assert_same(result.best, result.state)


def test_going_on_equals_never_stopping():
    x, y = examples()
    step = noisy()
    whole = train(step, [(x, y)], 7)
    part = train(step, [(x, y)], 4)
    rest = train(step, [(x, y)], 3, state=part.state, key=jax.random.key(99), every=5)
    assert int(rest.state.step) == 7
    assert_same(rest.state, whole.state)
    assert [row["step"] for row in rest.history] == [5, 7]


def test_the_given_state_survives():
    x, y = examples()
    step = noisy()
    given = train(step, [(x, y)], 2).state
    before = {path: leaf.copy() for path, leaf in numbers(given).items()}
    train(step, [(x, y)], 3, state=given)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    for path, leaf in numbers(given).items():
        np.testing.assert_array_equal(leaf, before[path])
    assert int(given.step) == 2


def test_the_best_state_survives_the_steps_after_it():
    x, y = examples()
    result = train(sgd(), [(x, y)], 4, every=1, validation=[(x, (y + 1) % 3)])
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


def test_a_generator_must_not_end():
    x, y = examples()
    batches = lambda count: ((x, y) for _ in range(count))  # noqa: E731
    assert int(train(sgd(), batches(3), 3).state.step) == 3
    for data in (batches(2), batches(0), iter([(x, y)] * 2), [], ()):
        with pytest.raises(dp.LayerError, match="a batch for every step"):
            train(sgd(), data, 3)


def test_a_loss_that_explodes_names_the_parameters():
    x, y = examples()
    net = dp.serial(body=dp.linear(4), head=NET)
    with pytest.raises(dp.LayerError, match="a finite loss") as caught:
        train(sgd(net, rate=1e38), [(x, y)], 20, every=5)
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


def test_fit_wants_positive_counts():
    x, y = examples()
    for wrong in (dict(steps=0), dict(steps=2.0), dict(steps=2, every=0)):
        with pytest.raises(dp.LayerError, match="at least 1"):
            dp.fit(sgd(), [(x, y)], key=KEY, progress=False, **wrong)


def test_a_bar_shows_progress(capsys):
    x, y = examples()
    train(sgd(), [(x, y)], 4, progress=True)
    assert "4/4" in capsys.readouterr().err
    train(sgd(), [(x, y)], 4)
    shown = capsys.readouterr()
    assert shown.err == shown.out == ""


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


# evaluate and predict


def test_evaluate_weighs_uneven_batches():
    x, y = examples(11)
    step = sgd(donate=False)
    state, _ = step.apply(step.init(KEY, x), (x, y))
    logits = NET(state.params, jnp.asarray(x))
    wanted = {"loss": float(dp.cross_entropy(logits, jnp.asarray(y))),
              "accuracy": float(dp.accuracy(logits, jnp.asarray(y)))}
    assert 0 < wanted["accuracy"] < 1
    found = dp.evaluate(step, state, dp.batches((x, y), 4))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert all(type(value) is float for value in found.values())


def test_evaluate_leaves_masked_entries_out():
    x, y = examples(11)
    step = sgd(donate=False)
    state = step.init(KEY, x)
    mask = np.arange(11) % 3 != 0
    data = {"x": np.where(mask[:, None], x, np.nan), "y": y, "mask": mask}
    wanted = dp.evaluate(step, state, [(x[mask], y[mask])])
    assert dp.evaluate(step, state, dp.batches(data, 4)) == pytest.approx(wanted, rel=1e-5)
    fully = {**data, "mask": np.zeros(11, bool)}  # a batch with nothing real weighs nothing
    assert dp.evaluate(step, state, [data, fully]) == pytest.approx(wanted, rel=1e-5)


def test_evaluate_wants_a_batch():
    x, y = examples()
    step = sgd()
    state = step.init(KEY, x)
    spent = iter([(x, y)])
    dp.evaluate(step, state, spent)
    for data in (spent, []):
        with pytest.raises(dp.LayerError, match="at least one batch"):
            dp.evaluate(step, state, data)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7])
def test_predict_equals_apply(length):
    x, _ = examples(7)
    params, _ = NOISY.init(KEY, x)
    state = {"batch_norm_0": {"mean": jnp.arange(4.0), "var": jnp.arange(1.0, 5.0)}}
    wanted = NOISY(params, jnp.asarray(x[:length]), state=state)
    got = dp.predict(NOISY, params, x[:length], state=state, size=3)
    assert got.shape == (length, 3)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_predict_of_no_examples_gives_none():
    params, _ = NET.init(KEY, jnp.ones((1, 4)))
    assert dp.predict(NET, params, jnp.ones((0, 4))).shape == (0, 3)


def test_predict_takes_side_inputs_and_pytrees():
    @dp.program(head=NET)
    def net(layers, x, *, shift=None):
        y = layers.head(x["a"] * x["b"])
        return {"y": y if shift is None else y + shift, "n": x["b"]}

    x = {"a": examples(5)[0], "b": np.arange(5.0, dtype=np.float32)[:, None]}
    shift = np.arange(5.0, dtype=np.float32)[:, None]
    params, _ = net.init(KEY, x)
    for side in ({}, {"shift": None}, {"shift": shift}):
        got = dp.predict(net, params, x, size=2, **side)
        wanted = net(params, x, **side)
        for name in ("y", "n"):
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_predict_compiles_one_program():
    traced = []

    def forward(params, x):
        traced.append(x.shape)
        return 2 * x

    net = dp.stateless(None, forward)
    for _ in range(2):
        dp.predict(net, {}, jnp.ones((7, 2)), size=3)
        dp.predict(net, {}, jnp.ones((8, 2)), size=3)
    assert set(traced) == {(3, 2)} and len(traced) <= 2  # once to plan, once to compile


def test_predict_wants_a_positive_size():
    params, _ = NET.init(KEY, jnp.ones((1, 4)))
    with pytest.raises(dp.LayerError, match="size"):
        dp.predict(NET, params, jnp.ones((2, 4)), size=0)
