"""A batch computed in parts: loss, gradient and metrics are those of the whole batch."""

import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY
from support.refusing import refused

import diffprog as dp
from diffprog.gradients.agreement import widened

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 5)), RNG.integers(0, 3, 8)
IDS = RNG.integers(1, 7, (8, 6))
LENGTHS = np.array([6, 2, 3, 6, 4, 2, 5, 3])
VALID = np.arange(6) < LENGTHS[:, None]
SMALL = dp.serial(dp.linear(4), jnp.tanh, dp.linear(3))
TEXT = dp.models.gpt(7, length=6, width=8, depth=1, heads=2)
PAIRS = dp.models.bert_pretraining(7, length=6, width=8, depth=1, heads=2)
MASKED = np.where(VALID & (RNG.random((8, 6)) < 0.5), IDS, -100)

CASES = {
    "classes": (SMALL, dp.classification(), (X, Y)),
    "masked classes": (SMALL, dp.classification(), {
        "x": X, "y": Y, "target_mask": np.array([1, 0, 0, 1, 1, 0, 0, 0], bool)}),
    "a part without a target": (SMALL, dp.classification(), {
        "x": X, "y": Y, "target_mask": np.array([1, 0, 1, 1, 1, 0, 0, 1], bool)}),
    "weights": (SMALL, dp.classification(), {"x": X, "y": Y, "sample_weight": np.arange(8.0)}),
    "smoothing": (SMALL, dp.classification(label_smoothing=0.1), (X, Y)),
    "regression": (SMALL, dp.regression(), (X, X[:, :3])),
    "a penalty": (SMALL, dp.training.penalized(
        dp.classification(), lambda params: 0.1 * dp.losses.l2(params)), (X, Y)),
    "texts": (TEXT, dp.text.next_token(), {"x": IDS, "mask": VALID}),
    "two means": (PAIRS, dp.text.masked_language(), {
        "x": IDS, "y": (MASKED, Y % 2), "mask": VALID}),
    "two means and a penalty": (PAIRS, dp.training.penalized(
        dp.text.masked_language(), lambda params: 0.1 * dp.losses.l2(params)), {
        "x": IDS, "y": (MASKED, Y % 2), "mask": VALID}),
}


class Taken(NamedTuple):
    """What is left of a step, in NumPy."""

    params: Any
    state: Any
    metrics: dict[str, Any]


def taken(net, objective, batch, accumulate, **options):
    """The state and the metrics after a step of gradient descent by 1."""
    step = dp.make_step(net, objective, optax.sgd(1.0), accumulate=accumulate, donate=False,
                        report=["gradient_norm", "total_loss"], **options)
    x, side = step.inputs(batch)
    start = step.init(KEY, x, **side)
    if jax.config.jax_enable_x64:
        start = start._replace(params=jax.tree.map(widened, start.params),
                               state=jax.tree.map(widened, start.state))
    after, metrics = step.apply(start, batch)
    parts = jax.device_get((after.params, after.state, step.combine(metrics)))
    return Taken(*parts)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_whole_batch_in_float64(name):
    with jax.enable_x64(True):
        net, objective, batch = CASES[name]
        whole, cut = (taken(net, objective, batch, parts) for parts in (1, 4))
    chex.assert_trees_all_close(cut.params, whole.params, rtol=0, atol=1e-12)
    for metric, value in whole.metrics.items():
        if not metric.startswith("count"):
            np.testing.assert_allclose(cut.metrics[metric], value, rtol=1e-12, err_msg=metric)
    assert whole.metrics["gradient_norm"] > 1e-3


def test_weights_may_sum_to_less_than_one():
    """The loss alone: accuracies are float32, and rounded in each part."""
    net, objective, batch = CASES["two means"]
    batch = {**batch, "sample_weight": np.arange(8.0) / 100}
    with jax.enable_x64(True):
        whole, cut = (taken(net, objective, batch, parts) for parts in (1, 4))
    assert 0 < whole.metrics["count"] < 1
    chex.assert_trees_all_close(cut.params, whole.params, rtol=0, atol=1e-12)
    np.testing.assert_allclose(cut.metrics["loss"], whole.metrics["loss"], rtol=1e-12)


def test_an_average_of_averages_would_differ():
    """The witness of the masks above: parts of different counts."""
    net, objective, batch = CASES["texts"]
    halves = [jax.tree.map(lambda a, i=i: a[i::2], batch) for i in range(2)]
    found = [taken(net, objective, half, 1).metrics["loss"] for half in halves]
    assert abs(np.mean(found) - taken(net, objective, batch, 1).metrics["loss"]) > 1e-4


@pytest.mark.parametrize("name", ["texts", "two means"])
def test_in_float32_the_gradient_differs_by_rounding(name):
    net, objective, batch = CASES[name]
    whole, cut = (taken(net, objective, batch, parts) for parts in (1, 2))
    error = optax.tree.norm(jax.tree.map(np.subtract, whole.params, cut.params))
    assert error <= 1e-5 * whole.metrics["gradient_norm"]


def test_a_convolution_is_unrolled_on_cpu():
    net = dp.serial(dp.conv(2, 3), jnp.tanh, dp.flatten(), dp.linear(3))
    batch = RNG.normal(size=(4, 4, 4, 1)), Y[:4]
    with jax.enable_x64(True):
        whole, cut = (taken(net, dp.classification(), batch, parts) for parts in (1, 2))
        chex.assert_trees_all_close(cut.params, whole.params, rtol=0, atol=1e-12)
        step = dp.make_step(net, dp.classification(), optax.sgd(1.0), accumulate=2)
        text = step.apply.lower(step.init(KEY, batch[0]), batch).compile().as_text()
    loops = {body: text.partition(f"%{body} (")[2].partition("\n}")[0]
             for body in re.findall(r"body=%([\w.]+)", text)}
    assert "convolution" in text
    assert not [body for body, lines in loops.items() if "convolution" in lines]


def test_batch_norm_has_the_statistics_of_each_part():
    net = dp.batch_norm(momentum=0.5)
    x = RNG.normal(size=(4, 3)) + 1

    with jax.enable_x64(True):
        state = taken(net, dp.regression(), (x, x), 2).state
    mean = 0.5 * (0.5 * 0 + 0.5 * x[::2].mean(0)) + 0.5 * x[1::2].mean(0)
    np.testing.assert_allclose(state["mean"], mean, atol=1e-12)


def test_averages_of_ema_move_once():
    net = dp.ema(dp.linear(3), decay=0.5)
    with jax.enable_x64(True):
        whole, cut = (taken(net, dp.classification(), (X, Y), parts) for parts in (1, 4))
    chex.assert_trees_all_close(cut.state, whole.state, rtol=0, atol=1e-12)


def test_each_part_has_its_own_noise():
    net = dp.dropout(0.5)
    x = np.ones((4, 16))

    def objective(net, params, state, batch, *, key, train):
        y, state = net.apply(params, state, batch[0], key=key, train=train)
        return y.mean(), (state, {"seen": (y * 2.0 ** jnp.arange(16)).mean()})

    metrics = taken(net, objective, (x, x), 2).metrics
    step = dp.make_step(net, objective, optax.sgd(1.0), donate=False)
    key = jax.random.fold_in(step.init(KEY, x).key, 0)
    keys = [jax.random.fold_in(key, number) for number in range(2)]
    seen = [objective(net, {}, {}, (x[:2], None), key=key, train=True)[1][1]["seen"]
            for key in keys]
    assert seen[0] != seen[1]
    np.testing.assert_allclose(metrics["seen"], np.mean(seen), rtol=1e-6)


def test_a_line_search_sees_the_whole_batch():
    found = []
    for parts in (1, 4):
        with jax.enable_x64(True):
            step = dp.make_step(SMALL, dp.classification(), optax.lbfgs(), accumulate=parts,
                                donate=False)
            state = step.init(KEY, X)
            for _ in range(3):
                state, metrics = step.apply(state, (X, Y))
        found.append(metrics["loss"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)


def test_a_step_with_a_nan_in_one_part_is_skipped_as_a_whole():
    optimizer = optax.apply_if_finite(optax.sgd(1.0), 5)
    step = dp.make_step(SMALL, dp.classification(), optimizer, accumulate=4, donate=False)
    start = step.init(KEY, X)
    x = X.copy()
    x[3] = np.nan
    after, metrics = step.apply(start, (x, Y))
    assert metrics["skipped"] == 1
    chex.assert_trees_all_equal(start.params, after.params)


def test_fit_accumulates():
    step = dp.make_step(SMALL, dp.classification(), optax.adam(0.1), accumulate=2)
    result = dp.fit(step, dp.batches((X, Y), 8, seed=0), key=KEY, steps=60, progress=False)
    assert result.history[-1]["accuracy"] == 1


@pytest.mark.parametrize(("batch", "wants"), [
    ((X[:6], Y[:6]), "a batch that can be cut into accumulate=4 equal parts"),
    ((X[:2], Y[:2]), "a batch that can be cut into accumulate=4 equal parts"),
], ids=["6 examples", "2 examples"])
def test_a_batch_that_it_does_not_divide_is_refused(batch, wants):
    error = refused(taken, SMALL, dp.classification(), batch, 4)
    assert error.wants == wants and "batch_size" in error.remedy


def test_objectives_across_examples_and_streams_are_refused():
    def contrast(net, params, state, batch, *, key, train):
        y, state = net.apply(params, state, batch[0], key=key, train=train)
        return (y.mean(0) ** 2).sum(), (state, {})

    contrast.across_examples = True
    assert "single examples" in refused(taken, SMALL, contrast, (X, Y), 4).wants
    net = dp.recurrent(dp.gru(3))
    x = RNG.normal(size=(4, 5, 2))
    step = dp.make_step(net, dp.regression(), optax.sgd(0.1), accumulate=2, donate=False)
    state = step.init(KEY, x)
    state = state._replace(state=net.start(state.params, state.state, x[:, :1], length=5))
    assert "without a stream" in refused(step.apply, state, (x, np.ones((4, 5, 3)))).wants


def test_arrays_of_several_lengths_without_an_x_are_refused():
    def objective(net, params, state, batch, *, key, train):
        y, state = net.apply(params, state, batch[0], key=key, train=train)
        return (y @ batch[1]).mean(), (state, {})

    objective.inputs = lambda net, batch: (batch[0], {})
    batch = X, RNG.normal(size=(3, 40))
    assert "one length" in refused(taken, SMALL, objective, batch, 4).wants


# Metrics on request.

def test_the_norm_of_the_gradient_and_the_total_loss_are_those_of_the_step():
    net, objective, batch = CASES["a penalty"]
    with jax.enable_x64(True):
        after = taken(net, objective, batch, 1)
        start = jax.device_get(dp.make_step(net, objective, optax.sgd(1.0)).init(KEY, X).params)
    squares = [((a.astype(float) - b) ** 2).sum()
               for a, b in zip(*map(jax.tree.leaves, (start, after.params)), strict=True)]
    metrics = after.metrics
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(sum(squares)), rtol=1e-12)
    np.testing.assert_allclose(metrics["total_loss"], metrics["loss"] + metrics["penalty"])


def test_the_norm_leaves_out_what_is_frozen():
    net = dp.serial(dp.freeze(dp.linear(4)), dp.linear(3))

    def objective(net, params, state, batch, *, key, train):
        y, state = net.apply(params, state, batch[0], key=key, train=train)
        frozen = sum((leaf**2).sum() for leaf in jax.tree.leaves(params["linear_0"]))
        return (y**2).mean() + frozen, (state, {})

    with jax.enable_x64(True):
        found = taken(net, objective, (X, Y), 1)
        start = jax.device_get(dp.make_step(net, objective, optax.sgd(1.0)).init(KEY, X).params)
    squares = [((a.astype(float) - b) ** 2).sum() for a, b in zip(
        *map(jax.tree.leaves, (start["linear_1"], found.params["linear_1"])), strict=True)]
    np.testing.assert_allclose(found.metrics["gradient_norm"], np.sqrt(sum(squares)), rtol=1e-12)


def test_the_learning_rate_is_that_of_the_schedule():
    optimizer = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(1.0, 0.0, 4))
    step = dp.make_step(SMALL, dp.classification(), optimizer, report=["learning_rate"])
    state, rates = step.init(KEY, X), []
    for _ in range(3):
        state, metrics = step.apply(state, (X, Y))
        rates.append(float(metrics["learning_rate"]))
    assert rates == [1.0, 0.75, 0.5]


def test_an_unknown_report_and_an_unknown_learning_rate_are_refused():
    objective = dp.classification()
    for wrong in (["loss"], "gradient_norm"):
        assert "report" in refused(
            dp.make_step, SMALL, objective, optax.sgd(1.0), report=wrong).wants
    step = dp.make_step(SMALL, objective, optax.sgd(1.0), report=["learning_rate"])
    assert "inject_hyperparams" in refused(step.init, KEY, X).remedy
