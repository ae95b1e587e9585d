"""Optimizers of optax: extra arguments, parameters for evaluation, and errors."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.refusing import expect, refused
from support.training_nets import KEY, NET, examples, taken, train

import diffprog as dp

X, Y = examples()
BATCH = (X, Y)
DROPPED = dp.serial(dp.dropout(0.5), NET)
CLASSES = dp.classification()
NAN = (np.full_like(X, np.nan), Y)


def make(optimizer, net=NET, **options):
    return dp.make_step(net, CLASSES, optimizer, **options)


# Extra arguments.


ASKING = {
    "plateau": lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "polyak": optax.polyak_sgd,
    "momo": optax.contrib.momo,
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)),
    "sophia": lambda: optax.contrib.sophia(0.1, update_interval=1),
    "finite": lambda: optax.apply_if_finite(optax.polyak_sgd(), 3),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.5),
    "steps": lambda: optax.MultiSteps(optax.polyak_sgd(), 2),
}


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def by_hand(optimizer, net, steps, second_order):
    """Parameters after some steps, taken as in the documentation of optax."""
    first, later = jax.random.split(KEY)
    params, state = net.init(first, X)
    opt = optimizer.init(params)

    @jax.jit
    def go(params, opt, key):
        def value_fn(params):
            return CLASSES(net, params, state, BATCH, key=key, train=True)[0]

        value, grad = jax.value_and_grad(value_fn)(params)
        asked = {"obj_fn": value_fn} if second_order else {"value_fn": value_fn}
        updates, opt = optimizer.update(grad, opt, params, value=value, grad=grad, **asked)
        return optax.apply_updates(params, updates), opt

    for i in range(steps):
        params, opt = go(params, opt, jax.random.fold_in(later, i))
    return params


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    name if name == "plateau" else pytest.param(name, marks=pytest.mark.slow)
    for name in ASKING])
def test_optimizers_get_value_gradient_and_value_fn(name):
    """Dropout shows that the key of the step is fixed in `value_fn`."""
    state, _ = taken(make(ASKING[name](), DROPPED), [BATCH] * 3)
    wanted = by_hand(ASKING[name](), DROPPED, 3, name == "sophia")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5),
                 state.params, wanted)


@pytest.mark.slow
def test_lbfgs_comes_down_in_a_few_steps():
    net = dp.linear(1, bias=False)
    x = np.array([[1.0, 0.0], [0.0, 10.0]], np.float32)  # a valley so narrow that sgd is slow
    y = np.array([[1.0], [-10.0]], np.float32)
    step = dp.make_step(net, dp.regression(), optax.lbfgs(memory_size=3))
    state = step.init(KEY, x)
    for _ in range(6):
        state, metrics = step.apply(state, (x, y))
    assert metrics["loss"] < 1e-6
    np.testing.assert_allclose(state.params["kernel"], [[1.0], [-1.0]], atol=1e-3)


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.polyak_sgd()], ids=["lbfgs", "polyak"])
def test_the_loss_of_a_net_with_frozen_parts_is_a_function_of_the_rest(optimizer):
    net = dp.serial(dp.freeze(dp.linear(4)), NET)
    step = make(optimizer, net)
    state = jax.eval_shape(step.init, KEY, X)
    after, _ = jax.eval_shape(step.apply, state, BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_custom_optimizer_gets_the_arguments_it_names():
    def update(updates, state, params, *, value):
        return jax.tree.map(lambda g: 0 * g + value, updates), state

    own = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state, (metrics,) = taken(make(own, donate=False), [BATCH])
    before = make(own).init(KEY, X)
    np.testing.assert_allclose(state.params["bias"] - before.params["bias"],
                               jnp.full(3, metrics["loss"]), rtol=1e-5)


# Parameters for evaluation.


@pytest.mark.slow
def test_evaluation_uses_the_slow_parameters_of_lookahead():
    fast, rate, share, period = NET.init(jax.random.split(KEY)[0], X)[0], 0.3, 0.5, 2
    slow = fast
    step = make(optax.lookahead(optax.sgd(rate), period, share))
    state, _ = taken(step, [BATCH] * 5)
    gradient = jax.jit(jax.grad(lambda p: CLASSES(NET, p, {}, BATCH, key=None, train=True)[0]))
    for i in range(1, 6):  # Zhang et al. 2019, algorithm 1
        grad = gradient(fast)
        fast = jax.tree.map(lambda p, g: p - rate * g, fast, grad)
        if i % period == 0:
            slow = fast = jax.tree.map(lambda s, f: s + share * (f - s), slow, fast)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                 (state.params, step.eval_params(state)), (fast, slow))
    np.testing.assert_allclose(step.evaluate(state, BATCH)["loss"],
                               CLASSES(NET, slow, {}, BATCH, key=None, train=False)[0], rtol=1e-5)


def test_lookahead_logs_no_false_warning(caplog):
    """Optax warns unless it gets fast and slow parameters, which the step passes."""
    with caplog.at_level(logging.WARNING):
        make(optax.lookahead(optax.sgd(0.1), 2, 0.5)).init(KEY, X)
    assert not caplog.records


@pytest.mark.parametrize("wrap", [
    lambda inner: inner, lambda inner: optax.chain(optax.clip(1.0), inner),
    lambda inner: optax.apply_if_finite(inner, 3),
], ids=["alone", "chain", "finite"])
def test_evaluation_uses_the_average_of_schedule_free(wrap):
    step = make(wrap(optax.contrib.schedule_free_sgd(0.5)), donate=False)
    state, _ = taken(step, [BATCH] * 3)
    (inner,) = (part for part in jax.tree.leaves(
        state.opt_state, is_leaf=lambda part: hasattr(part, "weight_sum"))
        if hasattr(part, "weight_sum"))
    average = optax.contrib.schedule_free_eval_params(inner, state.params)
    jax.tree.map(np.testing.assert_array_equal, step.eval_params(state), average)
    loss = CLASSES(NET, average, {}, BATCH, key=None, train=False)[0]
    np.testing.assert_allclose(step.evaluate(state, BATCH)["loss"], loss, rtol=1e-6)
    assert abs(loss - CLASSES(NET, state.params, {}, BATCH, key=None, train=False)[0]) > 1e-3


@pytest.mark.parametrize("optimizer", [
    optax.contrib.schedule_free_sgd(0.5), optax.lookahead(optax.sgd(0.1), 2, 0.5)],
    ids=["schedule_free", "lookahead"])
def test_evaluation_uses_frozen_parameters_unchanged(optimizer):
    net = dp.serial(still=dp.freeze(dp.linear(4)), moved=NET)
    step = make(optimizer, net, donate=False)
    state, _ = taken(step, [BATCH] * 3)
    seen = step.eval_params(state)
    jax.tree.map(np.testing.assert_array_equal, seen["still"], state.params["still"])
    assert (seen["moved"]["kernel"] != state.params["moved"]["kernel"]).any()


def test_eval_params_selects_the_parameters_of_evaluation():
    step = make(optax.sgd(0.1), donate=False,
                eval_params=lambda opt_state, params: jax.tree.map(jnp.zeros_like, params))
    state, _ = taken(step, [BATCH])
    np.testing.assert_allclose(step.evaluate(state, BATCH)["loss"], np.log(3), rtol=1e-6)
    assert dp.evaluate(step, state, [BATCH])["loss"] == pytest.approx(np.log(3), rel=1e-6)


def test_a_player_is_evaluated_at_the_parameters_of_its_optimizer():
    def guess(net, params, state, batch, *, key, train):
        loss = jnp.square(params["point"]["scale"] - batch).sum()
        return loss, (state, {"loss": loss})

    number = dp.stateless(lambda key, x: {"scale": jnp.ones(1)}, lambda p, x: p["scale"])
    step = dp.training.make_game(dp.serial(point=number), {
        "point": dp.training.Player(guess, optax.lookahead(optax.sgd(0.25), 3, 0.5))})
    state, _ = step.apply(step.init(KEY, jnp.zeros(1)), jnp.zeros(1))
    assert state.params["point"]["scale"] == 0.5  # 1 - 0.25 * 2
    assert step.eval_params(state)["point"]["scale"] == 1.0
    assert step.evaluate(state, jnp.zeros(1))["point/loss"] == 1.0
    step = dp.training.make_game(dp.serial(point=number),
        {"point": dp.training.Player(guess, optax.polyak_sgd())})
    state, _ = step.apply(step.init(KEY, jnp.zeros(1)), jnp.zeros(1))
    assert state.params["point"]["scale"] == 0.5  # 1 - (1 / 2**2) * 2


# Skipped steps and accumulation.


SKIPPING = {
    "finite": lambda: optax.apply_if_finite(optax.adam(0.1), 2),
    "steps": lambda: optax.MultiSteps(
        optax.adam(0.1), 1, should_skip_update_fn=optax.skip_not_finite),
}
MOVING = dp.ema(dp.serial(dp.batch_norm(), NET))


@pytest.mark.slow
@pytest.mark.parametrize("name", SKIPPING)
def test_a_skipped_step_changes_neither_net_nor_metrics(name):
    step = make(SKIPPING[name](), MOVING)
    plain, _ = taken(step, [BATCH, BATCH])
    state, metrics = taken(step, [BATCH, NAN, BATCH])
    same((plain.params, plain.state), (state.params, state.state))
    assert [float(read["skipped"]) for read in metrics] == [0, 1, 0]
    assert [float(read["count"]) for read in metrics] == [12, 0, 12]


def test_fit_does_not_raise_for_a_skipped_step():
    step = make(optax.apply_if_finite(optax.sgd(0.1), 2), MOVING)
    result = train(step, [BATCH, NAN, BATCH], 3)
    wanted = train(step, [BATCH, BATCH], 2)
    same(result.state.params, wanted.state.params)
    (row,), (plain,) = result.history, wanted.history
    assert row.pop("skipped") == pytest.approx(1 / 3) and plain.pop("skipped") == 0
    assert row == {**plain, "step": 3}
    assert train(step, [BATCH, NAN, BATCH], 2, log_every=1).history[1] == {"step": 2,
        "skipped": 1.0}


def test_a_skipped_step_inside_accumulation_counts_once():
    """The inner optimizer is called at the second of two halves, and keeps its result between."""
    step = make(optax.MultiSteps(optax.apply_if_finite(optax.sgd(0.1), 3), 2), MOVING)
    _, metrics = taken(step, [BATCH, NAN, BATCH])
    assert [float(read["skipped"]) for read in metrics] == [0, 1, 0]


def test_an_optimizer_that_stops_skipping_raises():
    step = make(optax.apply_if_finite(optax.sgd(0.1), 1), NET)
    assert refused(train, step, [BATCH, NAN, NAN, NAN], 4).step == 3


@pytest.mark.parametrize("gather", [
    lambda: optax.MultiSteps(optax.sgd(0.3), 2),
    lambda: optax.chain(optax.apply_every(2), optax.sgd(0.15)),
    pytest.param(lambda: optax.apply_if_finite(
        optax.chain(optax.apply_every(2), optax.sgd(0.15)), 2), marks=pytest.mark.slow),
], ids=["steps", "every", "nested"])
def test_averages_count_the_steps_of_the_optimizer(gather):
    """Two accumulated halves equal the whole, also in the average of `ema`."""
    net = dp.serial(one=dp.linear(3), two=dp.ema(NET, 0.6))
    halves = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    state, _ = taken(make(gather(), net), halves * 3)
    wanted, _ = taken(make(optax.sgd(0.3), net), [BATCH] * 3)
    found = state.state["two"]["#ema"]["kernel"]
    assert found["count"] == wanted.state["two"]["#ema"]["kernel"]["count"] == 3
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                 (state.params, state.state), (wanted.params, wanted.state))


# Errors.


SAM = optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))
PRIVATE = optax.chain(
    optax.contrib.differentially_private_aggregate(1.0, 0.1, 0), optax.sgd(0.1))  # dpsgd


@pytest.mark.parametrize(("optimizer", "name"), [
    (SAM, "sam"), (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True), "sam"),
    (optax.chain(optax.clip(1.0), SAM), "sam"), (PRIVATE, "per_example_gradients"),
    (optax.MultiSteps(PRIVATE, 2), "per_example_gradients"),
], ids=["sam", "opaque", "chain", "private", "steps"])
@pytest.mark.parametrize("net", [NET, dp.repeat(4, dp.linear(4)),
                                 dp.serial(dp.freeze(dp.linear(4)), NET)], ids=str)
def test_optimizers_of_another_step_are_named(optimizer, name, net):
    error = refused(make(optimizer, net).init, KEY, X)
    assert name in error.got + error.remedy and "write your own step" in error.remedy


def test_updates_of_another_shape_are_refused():
    """As by an optimizer that takes the axis of a stack for the batch axis: it would broadcast."""
    mean = optax.stateless(lambda updates, params: jax.tree.map(lambda g: g.mean(0), updates))
    net = dp.repeat(4, dp.linear(4))
    step = make(mean, dp.serial(body=net, head=NET))
    state = step.init(KEY, X)
    expect("", "wants an update of body/bias of its shape, float32[4,4], got float32[4]; write "
           "your own step with per_example_gradients, if the optimizer takes axis 0 for the batch "
           "axis", jax.eval_shape, step.apply, state, BATCH)


def test_an_unknown_extra_argument_is_named():
    def update(updates, state, params, *, curvature, **extra):
        return updates, state

    own = optax.GradientTransformationExtraArgs(lambda params: (), update)
    step = make(optax.chain(own, optax.sgd(0.1)))
    error = refused(jax.eval_shape, step.apply, step.init(KEY, X), BATCH)
    assert "curvature" in error.got


def weights(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@pytest.mark.parametrize("around", [
    lambda **more: optax.masked(optax.lbfgs(), weights, **more),
    lambda **more: optax.partition({True: optax.lbfgs(), False: optax.adam(0.1)}, weights, **more)],
    ids=["masked", "partition"])
def test_a_line_search_on_a_part_gets_the_gradient_of_that_part(around):
    step, told = make(around()), make(around(mask_compatible_extra_args=True))
    state = jax.eval_shape(step.init, KEY, X)
    error = refused(jax.eval_shape, step.apply, state, BATCH)
    assert "mask_compatible_extra_args=True" in error.remedy
    jax.eval_shape(told.apply, state, BATCH)


@pytest.mark.parametrize("inner", [
    optax.lbfgs(), optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())],
    ids=["lbfgs", "plateau"])
def test_optimizers_that_need_more_than_lookahead_passes_are_refused(inner):
    step = make(optax.lookahead(inner, 2, 0.5))
    error = refused(jax.eval_shape, step.apply, jax.eval_shape(step.init, KEY, X), BATCH)
    assert "value" in error.got and "lookahead" in error.remedy


@pytest.mark.parametrize("optimizer", [
    optax.lookahead(optax.contrib.schedule_free_sgd(0.1), 2, 0.5),
    optax.contrib.schedule_free(optax.lookahead(optax.sgd(0.1), 2, 0.5), 0.1)],
    ids=["inside", "around"])
def test_one_net_has_one_slow_average(optimizer):
    assert refused(jax.eval_shape, make(optimizer).init, KEY, X).wants == "one slow average"


@pytest.mark.parametrize("around", [
    lambda inner: optax.MultiSteps(inner, 2), lambda inner: optax.apply_if_finite(inner, 2),
    lambda inner: optax.chain(optax.add_decayed_weights(0.1), inner)],
    ids=["steps", "finite", "decay"])
def test_wrappers_that_cannot_be_around_lookahead_go_inside(around):
    step = make(around(optax.lookahead(optax.sgd(0.1), 2, 0.5)))
    state = step.init(KEY, X)
    assert "lookahead around all" in refused(jax.eval_shape, step.apply, state, BATCH).wants
    step = make(optax.lookahead(around(optax.sgd(0.1)), 2, 0.5))
    state = step.init(KEY, X)
    after, _ = jax.eval_shape(step.apply, state, BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(state)
