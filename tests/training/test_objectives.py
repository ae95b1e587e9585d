"""Objectives: metrics and their counts, masks, side inputs, and the forms of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.refusing import expect, refused

import diffprog as dp


def drawn(*shape, seed=0, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, size=shape)


def nll(logits, labels):
    """``-log softmax(logits)[label]`` of each row, in float64."""
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum(-1)) - logits[range(len(logits)), np.asarray(labels)]


# classification


def classifier():
    net, x, y = dp.linear(3), drawn(4, 5), np.array([0, 2, 1, 2])
    params, state = net.init(jax.random.key(0), jnp.asarray(x, jnp.float32))
    logits = x @ np.asarray(params["kernel"], np.float64)
    return net, params, state, jnp.asarray(x), jnp.asarray(y), logits


@pytest.mark.slow
def test_classification_of_a_pair_and_of_a_dict():
    net, params, state, x, y, logits = classifier()
    objective = dp.classification()
    for batch in ((x, y), [x, y], {"x": x, "y": y}):
        loss, (new, metrics) = objective(net, params, state, batch, key=None, train=True)
        assert new == {} and set(metrics) == {"loss", "accuracy", "count"}
        np.testing.assert_allclose(loss, nll(logits, y).mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], loss)
        np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == y).mean())
        assert float(metrics["count"]) == 4


def test_classification_with_a_mask():
    net, params, state, x, y, logits = classifier()
    mask = np.array([True, True, False, True])
    batch = {"x": x.at[2].set(jnp.nan), "y": y, "mask": jnp.asarray(mask)}
    loss, (_, metrics) = dp.classification()(net, params, state, batch, key=None, train=True)
    np.testing.assert_allclose(loss, nll(logits, y)[mask].mean(), rtol=1e-5)
    hits = (logits.argmax(-1) == np.asarray(y))[mask]
    np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)
    assert float(metrics["count"]) == 3
    loss, _ = dp.classification(reduction="sum")(net, params, state, batch, key=None, train=True)
    np.testing.assert_allclose(loss, nll(logits, y)[mask].sum(), rtol=1e-5)


def test_the_sum_is_the_loss_but_metrics_stay_means():
    net, params, state, x, y, logits = classifier()
    loss, (_, metrics) = dp.classification(reduction="sum")(
        net, params, state, (x, y), key=None, train=True)
    np.testing.assert_allclose(loss, nll(logits, y).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], nll(logits, y).mean(), rtol=1e-5)


def at_once_and_in_parts(objective, net, params, data, size=3):
    """Metrics by `evaluate` over unequal batches, and over one batch."""
    step = dp.make_step(net, objective, optax.sgd(0.1))
    state = step.init(jax.random.key(0), data["x"])._replace(params=params)
    return (dp.evaluate(step, state, dp.batches(data, size)), dp.evaluate(step, state, [data]))


@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.1}, {"ignore_index": 2}, {"class_weights": np.array([0.2, 1.0, 3.0])},
    {"class_weights": np.array([0.2, 1.0, 3.0]), "ignore_index": 2, "label_smoothing": 0.1}],
        ids=str)
def test_classification_averages_over_valid_entries(options):
    net, params, _, _, _, _ = classifier()
    draw = np.random.default_rng(1)
    x, y = drawn(11, 5).astype(np.float32), draw.integers(0, 3, 11)
    mask = draw.random(11) < 0.7
    data = {"x": np.where(mask[:, None], x, np.nan), "y": y, "mask": mask}
    parts, whole = at_once_and_in_parts(
        dp.classification(top_k=2, **options), net, params, data, size=4)
    logits = net(params, jnp.asarray(x))
    ignore = {"ignore_index": options.get("ignore_index"), "mask": mask}
    wanted = {"loss": dp.losses.cross_entropy(logits, y, mask=mask, **options),
              "accuracy": dp.metrics.accuracy(logits, y, **ignore),
              "top_2": dp.metrics.top_k_accuracy(logits, y, k=2, **ignore)}
    if "label_smoothing" in options:
        wanted["cross_entropy"] = dp.losses.cross_entropy(logits, y, **ignore)
    assert 0 < float(wanted["accuracy"]) < float(wanted["top_2"]) <= 1
    for found in (parts, whole):
        assert found == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-5)


def test_the_counts_of_a_weighted_loss():
    net, params, state, x, y, _ = classifier()
    weights = np.array([0.5, 1.0, 2.0])
    objective = dp.classification(class_weights=weights, ignore_index=1)
    _, (_, metrics) = objective(net, params, state, (x, y), key=None, train=True)
    assert set(metrics) == {"loss", "accuracy", "count", "count/loss"}
    assert (float(metrics["count"]), float(metrics["count/loss"])) == (3.0, 4.5)  # y is 0 2 1 2


def test_classification_of_soft_targets():
    net, params, state, x, _, logits = classifier()
    soft = np.random.default_rng(2).dirichlet(np.ones(3), 4)
    weights = np.array([0.5, 1.0, 2.0])
    mask = np.array([True, True, False, True])
    for batch in ((x, soft), {"x": x, "y": soft, "mask": mask}):
        valid = mask if isinstance(batch, dict) else mask | True
        loss, (_, metrics) = dp.classification(label_smoothing=0.1, class_weights=weights)(
            net, params, state, batch, key=None, train=True)
        wanted = dp.losses.cross_entropy(logits, soft, label_smoothing=0.1, class_weights=weights,
            mask=valid)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        hits = (logits.argmax(-1) == soft.argmax(-1))[valid]
        np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)
        assert float(metrics["count"]) == valid.sum() and "count/loss" not in metrics
    assert refused(dp.classification(ignore_index=1), net, params, state, (x, soft), key=None,
                   train=True).remedy


@pytest.mark.parametrize("wrong", [
    {"reduction": "none"}, {"label_smoothing": 1.0}, {"top_k": 0}, {"top_k": 1.0}], ids=str)
def test_classification_is_checked_when_it_is_made(wrong):
    assert refused(dp.classification, **wrong).remedy


@pytest.mark.parametrize("wrong", [{"top_k": 4}, {"class_weights": np.ones(2)}], ids=str)
def test_options_of_more_or_fewer_classes_are_refused(wrong):
    net, params, state, x, y, _ = classifier()
    assert "3" in refused(dp.classification(**wrong), net, params, state, (x, y), key=None,
                          train=True).wants


def test_classification_requires_one_array():
    net, _, _, x, y, _ = classifier()
    two = dp.branch(net, net)
    params, state = two.init(jax.random.key(0), x)
    error = refused(dp.classification(), two, params, state, (x, y), key=None, train=True)
    assert error.wants == "one array" and error.remedy


# binary classification


def test_binary_classification():
    x, y = drawn(7, 5).astype(np.float32), np.array([0, 1, 1, 0, 1, 0, 0])
    net = dp.linear(1) >> (lambda y: y[..., 0])
    params, _ = net.init(jax.random.key(0), x)
    log_odds = np.asarray(net(params, x), np.float64)
    mask = np.array([True, False, True, True, True, True, True])
    losses = np.where(y == 1, np.log1p(np.exp(-log_odds)), np.log1p(np.exp(log_odds)))
    hits = (log_odds > 0) == y
    assert 0 < hits[mask].mean() < 1
    for kind in (int, bool, float):
        data = {"x": np.where(mask[:, None], x, np.nan), "y": y.astype(kind), "mask": mask}
        for found in at_once_and_in_parts(dp.training.binary_classification(), net, params, data):
            assert found == pytest.approx(
                {"loss": losses[mask].mean(), "accuracy": hits[mask].mean()}, rel=1e-5)
    _, (_, metrics) = dp.training.binary_classification()(net, params, {}, data, key=None,
        train=True)
    assert float(metrics["count"]) == 6


def test_binary_classification_of_several_targets():
    net, params, state, x, _, logits = classifier()
    y = (drawn(4, 3, seed=5) > 0).astype(np.float32)
    loss, (_, metrics) = dp.training.binary_classification()(
        net, params, state, (x, y), key=None, train=True)
    np.testing.assert_allclose(loss, dp.losses.binary_cross_entropy(jnp.asarray(logits), y),
        rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], ((logits > 0) == y).mean())
    assert float(metrics["count"]) == 12


@pytest.mark.parametrize("objective", [dp.training.binary_classification(), dp.regression()])
def test_an_axis_of_size_one_is_refused(objective):
    net, x = dp.linear(1), jnp.ones((3, 4))
    params, state = net.init(jax.random.key(0), x)
    for y in (jnp.ones(3), jnp.ones(3, int)):
        expect("", f"wants a target of the prediction's shape (3, 1), got {y.dtype}[3]; drop the "
               "prediction's last axis: y[..., 0]",
               objective, net, params, state, (x, y), key=None, train=True)


# regression


@pytest.mark.parametrize("loss", [
    dp.losses.squared_error, dp.losses.absolute_error,
    functools.partial(dp.losses.huber, delta=0.5)])
@pytest.mark.parametrize("mask", [None, "rows", "elements"])
def test_regression(loss, mask):
    x, y = drawn(7, 5).astype(np.float32), drawn(7, 2, seed=1, spread=1.0).astype(np.float32)
    net = dp.linear(2)
    params, _ = net.init(jax.random.key(0), x)
    valid = np.random.default_rng(2).random((7, 2)) < 0.6
    data = {"x": x, "y": y}
    if mask:
        valid = valid[:, 0] if mask == "rows" else valid
        data["mask" if mask == "rows" else "target_mask"] = valid
        data["y"] = np.where(valid[:, None] if mask == "rows" else valid, y, np.nan)
    wanted = float(loss(net(params, x), y, mask=valid if mask else None))
    for found in at_once_and_in_parts(dp.regression(loss), net, params, data):
        assert found == pytest.approx({"loss": wanted}, rel=1e-5)


def test_regression_is_of_squares():
    net, params, state, x, _, outputs = classifier()
    y = drawn(4, 3, seed=1)
    loss, (_, metrics) = dp.regression()(net, params, state, (x, y), key=None, train=True)
    np.testing.assert_allclose(loss, ((outputs - y) ** 2).mean(), rtol=1e-5)
    assert set(metrics) == {"loss", "count"} and float(metrics["count"]) == 12


@pytest.mark.slow
def test_a_mask_of_positions_serves_net_and_loss():
    @dp.program(head=dp.linear(2))
    def net(layers, x, *, mask):
        return layers.head(jnp.where(mask[..., None], x, 0))

    x, mask = jnp.asarray(drawn(2, 4, 5)), jnp.arange(4) < jnp.array([[2], [3]])
    y = jnp.asarray(drawn(2, 4, 2, seed=1))
    params, state = net.init(jax.random.key(0), x, mask=mask)
    broken = {"x": jnp.where(mask[..., None], x, jnp.nan), "y": y, "mask": mask}
    loss, (_, metrics) = dp.regression()(net, params, state, broken, key=None, train=True)
    outputs = np.asarray(x) @ np.asarray(params["head"]["kernel"])
    wanted = ((outputs - np.asarray(y)) ** 2)[np.asarray(mask)].mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert float(metrics["count"]) == 10


# batches


def pooled(layers, x, *, mask):
    weights = mask[..., None].astype(x.dtype)
    return layers.head((x * weights).sum(1) / weights.sum(1))


@pytest.mark.slow
def test_a_mask_of_positions_goes_to_the_net_alone():
    net = dp.program(head=dp.linear(3))(pooled)
    x, y = jnp.asarray(drawn(2, 4, 5)), jnp.array([0, 2])
    mask = jnp.array([[True, True, False, False], [True, True, True, False]])
    params, state = net.init(jax.random.key(0), x, mask=mask)
    batch = {"x": x, "y": y, "mask": mask}
    loss, (_, metrics) = dp.classification()(net, params, state, batch, key=None, train=True)
    means = np.stack([np.asarray(x[0, :2]).mean(0), np.asarray(x[1, :3]).mean(0)])
    wanted = nll(means @ np.asarray(params["head"]["kernel"]), y)
    np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-5)
    assert float(metrics["count"]) == 2


RAGGED = np.arange(5) < np.array([2, 5, 4])[:, None]


@pytest.mark.slow
def test_a_mask_of_time_is_no_mask_of_equally_many_outputs():
    """Five steps and five outputs: the mask is over steps, and all 15 targets are valid."""
    net = dp.recurrent(dp.gru(4)) >> dp.collapse("last") >> dp.linear(5)
    x = jnp.asarray(drawn(3, 5, 2), jnp.float32)
    y = jnp.asarray(drawn(3, 5, seed=1, spread=1.0), jnp.float32)
    params, state = net.init(jax.random.key(0), x)
    batch = {"x": jnp.where(RAGGED[..., None], x, 9.0), "y": y, "mask": jnp.asarray(RAGGED)}
    loss, (_, metrics) = dp.regression()(net, params, state, batch, key=None, train=True)
    alone = [net(params, x[i : i + 1, :n])[0] for i, n in enumerate((2, 5, 4))]
    np.testing.assert_allclose(loss, ((np.stack(alone) - y) ** 2).mean(), rtol=1e-5)
    assert float(metrics["count"]) == 15
    shown = np.array([[1, 1, 0, 1, 1]] * 3, bool)
    loss, (_, metrics) = dp.regression()(
        net, params, state, batch | {"target_mask": shown}, key=None, train=True)
    np.testing.assert_allclose(loss, ((np.stack(alone) - y) ** 2)[shown].mean(), rtol=1e-5)
    assert float(metrics["count"]) == 12


@pytest.mark.parametrize("net", [
    dp.linear(3), dp.recurrent(dp.gru(3)), dp.self_attention(1, causal=True),
    dp.learned_positions(5) >> dp.self_attention(1), dp.conv(3, 3, dims=1)], ids=repr)
def test_a_mask_of_time_masks_targets_if_the_net_keeps_time(net):
    """Whether or not the net takes it, and at the maximal length."""
    x = jnp.asarray(drawn(3, 5, 3), jnp.float32)
    y = jnp.asarray(drawn(3, 5, 3, seed=1, spread=1.0), jnp.float32)
    params, state = net.init(jax.random.key(0), x)
    side = {"mask": jnp.asarray(RAGGED)}
    loss, (_, metrics) = dp.regression()(
        net, params, state, {"x": x, "y": y, **side}, key=None, train=True)
    outputs = net(params, x, **{name: side[name] for name in net.side & side.keys()})
    np.testing.assert_allclose(
        loss, ((np.asarray(outputs) - y) ** 2)[RAGGED].mean(), rtol=1e-5)
    assert float(metrics["count"]) == 33


@pytest.mark.slow
def test_side_inputs_over_time_are_resized_with_x():
    """Side inputs over time are resized when the net is planned for another length."""
    net = dp.program(body=dp.self_attention(1))(lambda layers, x, *, extra: layers.body(x) + extra)
    x = jnp.asarray(drawn(3, 5, 4), jnp.float32)
    every = jnp.ones((3, 5), bool)
    side = {"mask": jnp.asarray(RAGGED), "extra": x, "segments": jnp.asarray(1 * RAGGED),
            "attention_mask": every[:, None, None] & every[:, None, :, None]}
    params, state = net.init(jax.random.key(0), x, **side)
    _, (_, metrics) = dp.regression()(
        net, params, state, {"x": x, "y": x, **side}, key=None, train=True)
    assert float(metrics["count"]) == 44


@pytest.mark.slow
def test_masked_targets_do_not_mask_the_input():
    """Two series with gaps: the recurrence reads all of x; the loss is where y is known."""
    net = dp.recurrent(dp.simple_rnn(1))
    x = jnp.asarray(drawn(2, 6, 2, spread=1.0), jnp.float32)
    y = jnp.asarray(drawn(2, 6, 1, seed=1, spread=1.0), jnp.float32)
    gaps = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1]], bool)
    params, state = net.init(jax.random.key(0), x)
    outputs = np.asarray(net(params, x), np.float64)
    wanted = ((outputs - np.asarray(y)) ** 2)[gaps].mean()
    batch = {"x": x, "y": jnp.where(gaps[..., None], y, jnp.nan), "target_mask": gaps}
    loss, (_, metrics) = dp.regression()(net, params, state, batch, key=None, train=True)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert float(metrics["count"]) == 7
    hidden = dict(batch, mask=batch.pop("target_mask"))  # as a mask of x
    assert abs(dp.regression()(net, params, state, hidden, key=None, train=True)[0] - wanted) > 0.01


TARGETS = {
    "classification": (dp.classification(top_k=2), dp.linear(3), np.arange(20).reshape(4, 5) % 3,
                       (4, 5)),
    "soft": (dp.classification(), dp.linear(3), np.full((4, 5, 3), 1 / 3, np.float32), (4, 5)),
    "binary": (dp.training.binary_classification(), dp.linear(3), np.ones((4, 5, 3)), (4, 5, 3)),
    "regression": (dp.regression(), dp.linear(3), np.ones((4, 5, 3)), (4, 5, 3)),
    "elbo": (dp.training.elbo(dp.losses.squared_error),
        dp.models.vae(dp.branch(dp.linear(2), dp.linear(2)), dp.linear(3)),
             np.ones((4, 5, 3)), (4, 5, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_mask_is_of_any_leading_axes(name):
    """Masked targets have no effect, whatever they hold; a single valid one is the mean."""
    objective, net, y, entries = TARGETS[name]
    x = jnp.asarray(drawn(4, 5, 2), jnp.float32)
    params, state = net.init(jax.random.key(0), x)
    run = lambda batch: objective(  # noqa: E731
        net, params, state, batch, key=None, train=False)[1][1]
    for axes in range(1, len(entries) + 1):
        mask = np.random.default_rng(axes).random(entries[:axes]) < 0.6
        wide = mask.reshape(mask.shape + (1,) * (y.ndim - axes))
        broken = np.where(wide, y, np.nan if y.dtype.kind == "f" else -7)
        found = run({"x": x, "y": broken, "target_mask": mask})
        assert all(np.isfinite(value) for value in found.values())
        valid = np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(entries) - axes)), entries)
        count = valid.reshape(4, -1).any(1).sum() if name == "elbo" else valid.sum()
        assert float(found["count"]) == count
        if name != "elbo":
            logits = np.asarray(net(params, x))[valid]
            assert float(found["loss"]) == pytest.approx(float(objective(
                dp.stateless(None, lambda p, x: x), {}, {}, (jnp.asarray(logits), y[valid]),
                key=None, train=False)[0]), rel=1e-5)


def test_side_inputs_are_in_the_batch_by_name():
    @dp.program(head=dp.linear(3))
    def net(layers, x, *, shift):
        return layers.head(x + shift)

    x, y, shift = jnp.asarray(drawn(4, 5)), jnp.array([0, 2, 1, 2]), jnp.asarray(drawn(5, seed=3))
    params, state = net.init(jax.random.key(0), x, shift=shift)
    batch = {"x": x, "y": y, "shift": shift}
    loss, _ = dp.classification()(net, params, state, batch, key=None, train=True)
    logits = np.asarray(x + shift) @ np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(loss, nll(logits, y).mean(), rtol=1e-5)


@pytest.mark.parametrize("batch_of", [
    lambda x, y: {"x": x, "y": y, "weight": y}, lambda x, y: {"x": x},
    lambda x, y: {"inputs": x, "y": y}, lambda x, y: x, lambda x, y: (x,), lambda x, y: (x, y, y),
], ids=["another name", "no y", "no x", "an array", "one", "three"])
def test_batches_of_another_form_are_refused(batch_of):
    net, params, state, x, y, _ = classifier()
    with pytest.raises(dp.LayerError, match="a batch"):
        dp.classification()(net, params, state, batch_of(x, y), key=None, train=True)


@pytest.mark.slow
def test_state_key_and_flag_reach_the_net():
    net = dp.serial(dp.batch_norm(), dp.dropout(0.5), dp.linear(3))
    x, y = jnp.asarray(drawn(4, 5)), jnp.array([0, 2, 1, 2])
    params, state = net.init(jax.random.key(0), x)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(seed, train):
        key = None if seed is None else jax.random.key(seed)
        return dp.classification()(net, params, state, (x, y), key=key, train=train)

    one, (moved, _) = run(1, True)
    other, _ = run(2, True)
    rest, (same, _) = run(None, False)
    assert float(one) != float(other) != float(rest)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    mean = moved["batch_norm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * np.asarray(x).mean(0), rtol=1e-5)
