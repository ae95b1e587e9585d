"""Sample weights in every objective, custom objectives, and checks of logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.refusing import KEY, refused

import diffprog as dp

WEIGHTS = np.array([2, 0, 3, 1])
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(4, 5)).astype(np.float32)
LABELS = np.array([0, 2, 1, 2])
IDS = DRAW.integers(0, 7, (4, 6))
SCORES = dp.embedding(7, 7)
LATENT = dp.branch(dp.linear(5), dp.branch(dp.linear(2), dp.linear(2)))
HIDDEN = np.where(DRAW.random((4, 6)) < 0.5, IDS, -100)
PAIR = dp.program(embed=SCORES, follows=dp.linear(2))(lambda layers, x: (
    y := layers.embed(x), layers.follows(y.mean(1))))
NOT_SURE = np.full((4, 3), 1 / 3, np.float32)

OBJECTIVES = {
    "classification": (dp.classification(top_k=2, label_smoothing=0.1), dp.linear(3), X, LABELS),
    "of weighted classes": (dp.classification(class_weights=np.array([1.0, 2, 4], np.float32)),
                            dp.linear(3), X, LABELS),
    "summed": (dp.classification(reduction="sum"), dp.linear(3), X, LABELS),
    "with ignored labels": (dp.classification(ignore_index=2), dp.linear(3), X, LABELS),
    "soft": (dp.classification(class_weights=np.array([1.0, 2, 4], np.float32)), dp.linear(3), X,
             NOT_SURE),
    "binary": (dp.training.binary_classification(), dp.linear(2), X, DRAW.random((4, 2)) < 0.5),
    "regression": (dp.regression(dp.losses.absolute_error), dp.linear(2), X, X[:, :2]),
    "elbo": (dp.training.elbo(dp.losses.squared_error, beta=0.5), LATENT, X, X),
    "next token": (dp.text.next_token(label_smoothing=0.1), SCORES, IDS, None),
    "chunked": (dp.text.chunked_next_token("body", "head/kernel", chunk=3), dp.serial(
        body=dp.embedding(7, 3), head=dp.linear(7, bias=False)), IDS, None),
    "masked language": (dp.text.masked_language(), PAIR, IDS, (HIDDEN, np.array([0, 1, 1, 0]))),
    "penalized": (dp.training.penalized(dp.classification(), dp.losses.l2), dp.linear(3), X,
        LABELS),
}


@functools.cache
def asked(name):
    """The loss and metrics of an objective on a batch, with fixed parameters."""
    objective, net, x, _ = OBJECTIVES[name]
    params, state = net.init(KEY, x)
    return jax.jit(lambda batch: objective(net, params, state, batch, key=None, train=False))


def batch_of(name, rows=slice(None), **more):
    _, _, x, y = OBJECTIVES[name]
    given = {"x": x} if y is None else {"x": x, "y": y}
    return jax.tree.map(lambda a: a[rows], given) | more


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_weight_equals_repeating_the_example(name):
    """An entry of weight 0 has no effect, even NaN or a label out of range."""
    again = np.repeat(np.arange(4), WEIGHTS)
    wanted, (_, metrics) = asked(name)(batch_of(name, again))
    batch = batch_of(name, sample_weight=WEIGHTS)
    for broken in (False, True):
        if broken:
            batch["x"] = np.where((WEIGHTS == 0)[:, None], np.nan if batch["x"].dtype.kind == "f"
                                  else 99, batch["x"])
        loss, (_, found) = asked(name)(batch)
        np.testing.assert_allclose(loss, wanted, rtol=2e-5)
        assert found.keys() == metrics.keys()
        for metric, value in metrics.items():
            np.testing.assert_allclose(found[metric], value, rtol=2e-5, err_msg=metric)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classification", "of weighted classes", "next token",
                                  "masked language", "elbo"])
def test_weighted_metrics_do_not_depend_on_the_cut(name):
    objective, net, _, _ = OBJECTIVES[name]
    step = dp.make_step(net, objective, optax.sgd(0.1), check_axes=False)
    batch = batch_of(name, sample_weight=WEIGHTS)
    state = step.init(KEY, *step.inputs(batch)[:1])
    parts = [jax.tree.map(lambda a, rows=rows: a[rows], batch)
             for rows in (slice(0, 1), slice(1, 4))]
    whole = dp.evaluate(step, state, [batch])
    assert dp.evaluate(step, state, parts) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_entries_may_have_their_own_weights():
    """Any leading axes of the targets, beside masks."""
    x = jnp.asarray(DRAW.normal(size=(4, 6, 5)), jnp.float32)
    y, net = jnp.asarray(DRAW.normal(size=(4, 6, 2)), jnp.float32), dp.linear(2)
    params, _ = net.init(KEY, x)
    mask = DRAW.random((4, 6)) < 0.6
    errors = (np.asarray(net(params, x)) - np.asarray(y)) ** 2
    for shape in ((4,), (4, 6), (4, 6, 2)):
        weights = DRAW.random(shape)
        wide = np.broadcast_to(weights.reshape(shape + (1,) * (3 - len(shape))), y.shape)
        valid = wide * mask[..., None]
        loss, (_, metrics) = dp.regression()(
            net, params, {}, {"x": x, "y": y, "target_mask": mask, "sample_weight": weights},
            key=None, train=True)
        np.testing.assert_allclose(loss, (errors * valid).sum() / valid.sum(), rtol=1e-5)
        np.testing.assert_allclose(metrics["count"], valid.sum(), rtol=1e-5)


@pytest.mark.slow
def test_tokens_may_have_their_own_weights():
    params, _ = SCORES.init(KEY, IDS)
    weights = DRAW.random((4, 5))
    losses = dp.losses.cross_entropy(SCORES(params, IDS[:, :-1]), IDS[:, 1:], reduction="none")
    loss, (_, metrics) = dp.text.next_token()(
        SCORES, params, {}, {"x": IDS, "sample_weight": weights}, key=None, train=True)
    np.testing.assert_allclose(loss, (losses * weights).sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["count"], weights.sum(), rtol=1e-5)


@pytest.mark.slow
def test_noise_is_weighted():
    """Equal weights have no effect; the weighted mean is that of the single examples."""
    net = dp.program(f=dp.linear(5))(lambda layers, x, *, time: layers.f(x) + time[:, None])
    params, _ = net.init(KEY, X, time=LABELS)
    objective = dp.diffusion.denoising(dp.diffusion.cosine_noise(10))

    def run(weights):
        batch = {"x": X} if weights is None else {"x": X, "sample_weight": np.array(weights)}
        loss, (_, metrics) = objective(net, params, {}, batch, key=KEY, train=True)
        return float(loss), float(metrics["count"])

    plain, alone = run(None), [run(row) for row in np.eye(4)]
    assert run([2.0] * 4) == pytest.approx((plain[0], 40))
    assert np.mean([loss for loss, _ in alone]) == pytest.approx(plain[0])
    assert run([3, 0, 0, 1]) == pytest.approx((0.75 * alone[0][0] + 0.25 * alone[3][0], 20))


@pytest.mark.parametrize("loss", [
    lambda output, y, *, mask: jnp.square(output - y).mean(),
    lambda output, y, **options: jnp.square(output - y).mean(),
    lambda output, y, **options: jnp.square(output - y).mean(-1)], ids=range(3))
def test_a_loss_without_reduction_none_is_refused_with_weights(loss):
    for objective, net in ((dp.regression(loss), dp.linear(5)), (dp.training.elbo(loss), LATENT)):
        params, _ = net.init(KEY, X)
        batch = {"x": X, "y": X, "sample_weight": WEIGHTS}
        error = refused(objective, net, params, {}, batch, key=None, train=True)
        assert "one number per entry, (4, 5)" in error.wants


def test_negative_weights_give_nan():
    loss, _ = asked("classification")(batch_of("classification", sample_weight=-WEIGHTS))
    assert np.isnan(loss)


@pytest.mark.parametrize("name", ["classification", "elbo", "next token"])
def test_weights_that_are_all_zero_give_no_nan(name):
    loss, (_, metrics) = asked(name)(batch_of(name, sample_weight=np.zeros(4)))
    assert float(loss) == float(metrics["count"]) == 0


@pytest.mark.slow
def test_weights_train():
    """A step with weights equals one with repeated examples."""
    net = dp.linear(3)
    step = dp.make_step(net, dp.classification(), optax.sgd(0.5), donate=False)
    state = step.init(KEY, X)
    again = np.repeat(np.arange(4), WEIGHTS)
    weighted, _ = step.apply(state, {"x": X, "y": LABELS, "sample_weight": WEIGHTS})
    repeated, _ = step.apply(state, (X[again], LABELS[again]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
                 weighted.params, repeated.params)


# Custom objectives and losses


def test_the_metrics_of_a_custom_objective_contain_its_loss():
    def own(net, params, state, batch, *, key, train):
        y, state = net.apply(params, state, batch, key=key, train=train)
        return jnp.square(y).mean(), (state, {"largest": jnp.abs(y).max()})

    own.inputs = lambda net, batch: (batch, {})
    step = dp.make_step(dp.linear(3), own, optax.sgd(0.1), donate=False)
    state = step.init(KEY, X)
    y = np.asarray(dp.linear(3)(state.params, X))
    _, metrics = step.apply(state, X)
    assert metrics.keys() == {"loss", "largest", "count"} and int(metrics["count"]) == 4
    np.testing.assert_allclose(metrics["loss"], (y**2).mean(), rtol=1e-6)
    found = dp.evaluate(step, state, [X])
    assert found == pytest.approx({"loss": (y**2).mean(), "largest": np.abs(y).max()}, rel=1e-5)
    with pytest.raises(ValueError, match="finite loss"):
        dp.fit(step, [np.where(X > 1, np.nan, X)], key=KEY, steps=1, progress=False)


class Drawing:
    """An objective that is an object, with attributes of its class."""

    draws = True

    def __call__(self, net, params, state, batch, *, key, train):
        noise = jax.random.normal(key, batch["z"].shape)
        y, state = net.apply(params, state, batch["z"] + noise, train=train)
        return jnp.square(y).mean(), (state, {"part": jnp.abs(y).mean()})

    def inputs(self, net, batch):
        return batch["z"], {}

    def combine(self, found):
        return {"twice": 2 * found["part"]}


@pytest.mark.slow
@pytest.mark.parametrize("objective", [
    Drawing(), dp.training.penalized(Drawing(), dp.losses.l2),
], ids=["plain", "penalized"])
def test_an_object_may_be_an_objective(objective):
    """`evaluate` gives each example its own key, whatever the batch size."""
    step = dp.make_step(dp.linear(2), objective, optax.sgd(0.1))
    state = step.init(KEY, X)
    found = dp.evaluate(step, state, [{"z": X}])
    assert found == pytest.approx(dp.evaluate(step, state, [{"z": X[:1]}, {"z": X[1:]}]))
    assert found["twice"] == pytest.approx(2 * found["part"])


def test_an_objective_may_name_another_loss():
    def own(net, params, state, batch, *, key, train):
        return params["bias"].sum() + 1.0, (state, {"loss": jnp.zeros(())})

    step = dp.make_step(dp.linear(3), own, optax.sgd(0.1))
    _, metrics = step.apply(step.init(KEY, X), (X, LABELS))
    assert float(metrics["loss"]) == 0


@pytest.mark.parametrize("answer", [
    lambda loss, state: loss, lambda loss, state: (loss, state),
    lambda loss, state: (loss, {"error": loss}), lambda loss, state: (loss, (state, loss)),
    lambda loss, state: (loss, ({"error": loss}, state)), lambda loss, state: (loss, state, {}),
    lambda loss, state: {"loss": loss}, lambda loss, state: (loss[None], (state, {})),
    lambda loss, state: (1, (state, {})), lambda loss, state: None])
def test_a_result_of_another_form_is_refused(answer):
    def own(net, params, state, batch, *, key, train):
        return answer(params["bias"].sum(), state)

    for step in (dp.make_step(dp.linear(3), own, optax.sgd(0.1)),
                 dp.training.make_game(dp.serial(one=dp.linear(3)), {"one": dp.training.Player(
                     lambda net, params, *rest, **flags: own(net, params["one"], *rest, **flags),
                     optax.sgd(0.1))}, inputs=lambda batch: batch[0])):
        state = jax.eval_shape(step.init, KEY, X)
        assert refused(jax.eval_shape, step.apply, state, (X, LABELS)).remedy


@pytest.mark.parametrize("batch", [X, {"z": X}, (X, X, X), {"z": X, "y": LABELS}, [X]])
def test_a_custom_batch_requires_inputs(batch):
    def own(net, params, state, batch, *, key, train):
        raise AssertionError

    step = dp.make_step(dp.linear(3), own, optax.sgd(0.1))
    error = refused(dp.fit, step, [batch], key=KEY, steps=1, progress=False)
    assert "objective.inputs = lambda net, batch: (x, {})" in error.remedy


@pytest.mark.parametrize("own", [
    lambda output, y, *, mask=None: jnp.square(output - y).mean(),
    lambda output, y, **options: jnp.square(output - y).mean()])
def test_a_custom_loss_broadcasts_nothing(own):
    net, objective = dp.linear(1), dp.regression(own)
    params, _ = net.init(KEY, X)
    error = refused(objective, net, params, {}, (X, X[:, 0]), key=None, train=True)
    assert error.remedy == "drop the prediction's last axis: y[..., 0]"
    loss, _ = objective(net, params, {}, (X, X[:, :1]), key=None, train=True)
    np.testing.assert_allclose(loss, ((net(params, X) - X[:, :1]) ** 2).mean(), rtol=1e-6)


# Logits


@pytest.mark.parametrize("net", [
    dp.linear(3) >> jax.nn.softmax, dp.serial(a=dp.linear(3), b=jax.nn.sigmoid),
    dp.serial(dp.linear(3), dp.serial(jnp.tanh, functools.partial(jax.nn.softmax, axis=-1))),
    dp.mixed(dp.linear(3) >> jax.nn.softmax, jnp.bfloat16), dp.freeze(
        dp.linear(3) >> jax.nn.softmax, "**/bias"), dp.remat(dp.linear(3) >> jax.nn.sigmoid),
    dp.linear(3) >> jax.jit(jax.nn.softmax),
    dp.linear(3) >> dp.mixed(jax.nn.softmax, jnp.bfloat16)],
    ids=repr)
@pytest.mark.parametrize("objective", [dp.classification(), dp.training.binary_classification(),
                                       dp.training.penalized(dp.classification(), dp.losses.l2)])
def test_probabilities_are_no_logits(net, objective):
    error = refused(objective, net, {}, {}, (X, LABELS), key=None, train=True)
    assert error.wants == "a net that returns logits"
    assert any(name in error.got for name in (
        "jax.nn.softmax", "jax.nn.sigmoid", "ends in softmax"))  # the last one is jitted


def test_a_layer_of_the_kind_serial_may_end_otherwise():
    @dp.program(body=dp.linear(3), gate=jax.nn.softmax)
    def serial(layers, x):
        return layers.body(x) * layers.gate(x[:, :1])

    params, state = serial.init(KEY, X)
    loss, _ = dp.classification()(serial, params, state, (X, LABELS), key=None, train=True)
    assert jnp.isfinite(loss)


def test_other_objectives_of_logits_refuse_probabilities():
    error = refused(dp.text.next_token(), SCORES >> jax.nn.softmax, {}, {}, IDS, key=None,
        train=True)
    assert "jax.nn.softmax" in error.got
    whole = dp.serial(body=dp.embedding(7, 3), head=dp.linear(7, bias=False), p=jax.nn.softmax)
    params, _ = whole.init(KEY, IDS)
    chunked = dp.text.chunked_next_token("body", "head/kernel")
    assert "softmax" in refused(chunked, whole, params, {}, IDS, key=None, train=True).got
    pair = dp.branch(SCORES, dp.serial(SCORES, dp.collapse("mean"), jax.nn.softmax))
    batch = {"x": IDS, "y": (HIDDEN, np.array([0, 1, 1, 0]))}
    for net in (pair, dp.remat(pair)):
        params, _ = net.init(KEY, IDS)
        assert "softmax" in refused(
            dp.text.masked_language(), net, params, {}, batch, key=None, train=True).got
    net = dp.models.vae(dp.branch(dp.linear(2), dp.linear(2)), dp.linear(5) >> jax.nn.sigmoid)
    assert "sigmoid" in refused(dp.training.elbo(), net, {}, {}, (X, X), key=None, train=True).got


@pytest.mark.parametrize(("net", "objective", "y"), [
    (dp.serial(dp.linear(4), jax.nn.softmax, dp.linear(3)), dp.classification(), LABELS),
    (dp.linear(3) >> jax.nn.log_softmax, dp.classification(), LABELS),
    (dp.linear(3) >> jax.nn.sigmoid, dp.regression(), NOT_SURE),
], ids=["inside", "log-probabilities", "regression"])
def test_probabilities_inside_a_net_and_log_probabilities_are_accepted(net, objective, y):
    params, _ = net.init(KEY, X)
    loss, _ = objective(net, params, {}, (X, y), key=None, train=True)
    assert np.isfinite(loss)


# A mask of the targets that is named mask


@pytest.mark.slow
@pytest.mark.parametrize(("net", "x", "tasks"), [
    (dp.serial(dp.linear(6), dp.batch_norm(), dp.linear(3)), X, 3),
    (dp.serial(dp.linear(5), dp.batch_norm()), X, 5),  # as many tasks as features
    (dp.serial(dp.linear(6), dp.batch_norm(), dp.collapse("mean"), dp.linear(3)),
     X[:, None] * np.ones((1, 7, 1), np.float32), 3),
])
def test_a_mask_of_tasks_must_be_named_target_mask(net, x, tasks):
    params, state = net.init(KEY, x)
    mask = DRAW.random((4, tasks)) < 0.7
    run = functools.partial(dp.regression(), net, params, state, key=None, train=True)
    batch = {"x": x, "y": np.ones((4, tasks), np.float32)}
    error = refused(run, batch | {"mask": mask})
    assert error.remedy == "name it target_mask: it marks the valid targets"
    _, (_, metrics) = run(batch | {"target_mask": mask})
    assert int(metrics["count"]) == mask.sum()
    assert refused(run, batch | {"mask": mask[:3]}).remedy != error.remedy  # fits neither x nor y
