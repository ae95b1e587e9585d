"""A training step is a pair of pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.training_nets import KEY, NET, NOISY, assert_same, examples, noisy, numbers, sgd, train

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
    probability = np.exp(x @ kernel + bias)
    probability /= probability.sum(-1, keepdims=True)
    loss = -np.log(probability[range(12), y]).mean()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    residual = probability
    residual[range(12), y] -= 1
    np.testing.assert_allclose(
        after.params["kernel"], kernel - 0.3 * x.T @ residual / 12, atol=1e-6)
    np.testing.assert_allclose(after.params["bias"], bias - 0.3 * residual.mean(0), atol=1e-6)
    assert int(after.step) == 1 and after.params["kernel"].dtype == jnp.float32


@pytest.mark.slow
def test_evaluate_of_a_step_computes_in_inference():
    x, y = examples()
    step = noisy()
    state, training = step.apply(step.init(KEY, x), (x, y))
    rest = step.evaluate(state, (x, y))
    logits = NOISY(state.params, jnp.asarray(x), state=state.state)
    np.testing.assert_allclose(rest["loss"], dp.losses.cross_entropy(logits, jnp.asarray(y)),
        rtol=1e-6)
    assert float(training["loss"]) != float(rest["loss"])


def test_every_step_has_its_own_key():
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


@pytest.mark.parametrize("donate", [False, True])
def test_donation_is_a_choice(donate):
    x, y = examples()
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def distance(net, params, state, batch, *, key, train):
    loss = jnp.abs(params["z"] - (2 - 3j)) ** 2
    return loss.sum(), (state, {"loss": loss.sum()})


COMPLEX = dp.stateless(
    lambda key, x: {"z": jnp.zeros(1, jnp.complex64)}, lambda params, x: x, name="point")


@pytest.mark.parametrize("game", [False, True])
def test_a_complex_parameter_descends(game):
    """By hand: z moves by -0.1 * 2 * (z - c), so that the error shrinks by 0.8."""
    if game:
        play = lambda net, params, *given, **how: distance(net, params["z"], *given, **how)  # noqa: E731
        step = dp.training.make_game(dp.serial(z=COMPLEX),
            {"z": dp.training.Player(play, optax.sgd(0.1), 2)})
        state = step.init(KEY, jnp.ones(2))
        state, _ = step.apply(state, jnp.ones(2))
        params = state.params["z"]
    else:
        step = dp.make_step(COMPLEX, distance, optax.sgd(0.1))
        state = step.init(KEY, jnp.ones(2))
        for _ in range(2):
            state, _ = step.apply(state, jnp.ones(2))
        params = state.params
    np.testing.assert_allclose(params["z"], (1 - 0.8**2) * (2 - 3j), rtol=1e-5)


def test_a_state_that_changes_its_structure_is_refused():
    def apply(params, state, x, *, key=None, train=False):
        return x, {**state, "more": jnp.ones(())}

    grows = dp.Layer(lambda key, x: ({}, {"some": jnp.zeros(())}), apply)
    x, y = examples()
    step = sgd(dp.serial(NET, grows))
    with pytest.raises(dp.LayerError, match="unchanged structure"):
        step.apply(step.init(KEY, x), (x, y))


@pytest.mark.parametrize("state", [{"kernel": 0}, ({}, {}), ()], ids=str)
@pytest.mark.parametrize("call", [
    lambda step, state, batch: step.apply(state, batch),
    lambda step, state, batch: step.evaluate(state, batch),
    lambda step, state, batch: train(step, [batch], 1, state=state),
], ids=["apply", "evaluate", "fit"])
def test_a_state_of_another_type_is_refused(state, call):
    with pytest.raises(dp.LayerError, match=r"a TrainState.*pass fit"):
        call(sgd(), state, examples())


@pytest.mark.slow
@pytest.mark.parametrize("ask", [
    lambda params, x: jax.grad(lambda params: NET(params, x).sum())(params),
    lambda params, x: jax.vmap(lambda x: NET(params, x))(x),
    lambda params, x: jax.linearize(lambda params: NET(params, x), params),
], ids=["grad", "vmap", "linearize"])
def test_a_donated_state_raises_inside_transformations(ask):
    x, y = examples()
    step = sgd()
    state = step.init(KEY, x)
    step.apply(state, (x, y))
    with pytest.raises(dp.LayerError, match="donated to a later step; keep a copy"):
        ask(state.params, jnp.asarray(x))
