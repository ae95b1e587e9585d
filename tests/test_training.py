"""A training step is a pure pair; evaluation and prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_nets import KEY, NET, NOISY, assert_same, examples, noisy, numbers, sgd

import diffprog as dp

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


def test_evaluate_weighs_each_metric_by_its_own_count():
    def objective(net, params, state, batch, *, key, train):
        return batch["loss"], (state, dict(batch))

    step = dp.make_step(NET, objective, optax.sgd(0.1))
    state = step.init(KEY, examples()[0])
    one = {"loss": 1.0, "share": 0.0, "plain": 2.0, "count": 3.0, "count/loss": 0.5}
    two = {"loss": 4.0, "share": 1.0, "plain": 2.0, "count": 1.0, "count/loss": 1.0}
    found = dp.evaluate(step, state, [one, two])
    assert found == pytest.approx({"loss": 3.0, "share": 0.25, "plain": 2.0})
    for part in (one, two):
        del part["count"]
    assert dp.evaluate(step, state, [one, two])["share"] == pytest.approx(0.5)


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
    got = dp.predict(NOISY, params, x[:length], state=state, batch_size=3)
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
        got = dp.predict(net, params, x, batch_size=2, **side)
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
        dp.predict(net, {}, jnp.ones((7, 2)), batch_size=3)
        dp.predict(net, {}, jnp.ones((8, 2)), batch_size=3)
    assert set(traced) == {(3, 2)} and len(traced) <= 2  # once to plan, once to compile


def test_predict_wants_a_positive_batch_size():
    params, _ = NET.init(KEY, jnp.ones((1, 4)))
    with pytest.raises(dp.LayerError, match="batch_size"):
        dp.predict(NET, params, jnp.ones((2, 4)), batch_size=0)
