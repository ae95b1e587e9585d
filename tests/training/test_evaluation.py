"""Evaluation and prediction: results do not depend on how the data is cut into batches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.training_nets import KEY, NET, NOISY, examples, sgd

import diffprog as dp
from diffprog.training.averages import average_batches

# evaluate


def test_evaluate_weights_uneven_batches_by_size():
    x, y = examples(11)
    step = sgd(donate=False)
    state, _ = step.apply(step.init(KEY, x), (x, y))
    logits = NET(state.params, jnp.asarray(x))
    wanted = {"loss": float(dp.losses.cross_entropy(logits, jnp.asarray(y))),
              "accuracy": float(dp.metrics.accuracy(logits, jnp.asarray(y)))}
    assert 0 < wanted["accuracy"] < 1
    found = dp.evaluate(step, state, dp.batches((x, y), 4))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert all(type(value) is float for value in found.values())


@pytest.mark.slow
def test_evaluate_leaves_out_masked_entries():
    x, y = examples(11)
    step = sgd(donate=False)
    state = step.init(KEY, x)
    mask = np.arange(11) % 3 != 0
    data = {"x": np.where(mask[:, None], x, np.nan), "y": y, "mask": mask}
    wanted = dp.evaluate(step, state, [(x[mask], y[mask])])
    assert dp.evaluate(step, state, dp.batches(data, 4)) == pytest.approx(wanted, rel=1e-5)
    fully = {**data, "mask": np.zeros(11, bool)}  # a batch without valid entries has no weight
    assert dp.evaluate(step, state, [data, fully]) == pytest.approx(wanted, rel=1e-5)


def test_evaluate_weights_each_metric_by_its_own_count():
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


# Any batch size.


def cuts(step, state, data, *sizes):
    """The result of `evaluate` for each batch size."""
    return [dp.evaluate(step, state, dp.batches(data, size)) for size in sizes]


def of(net, objective, x, **side):
    step = dp.make_step(net, objective, optax.sgd(0.1))
    return step, step.init(KEY, x, **side)


@pytest.mark.slow
def test_a_sum_of_means_with_different_counts_is_exact():
    """Rows have 1, 2, 3, 0 and 5 masked tokens; the reference is in float64."""
    net = dp.program(tokens=dp.linear(4), follows=dp.linear(2))(
        lambda layers, x: (layers.tokens(x), layers.follows(x[:, 0])))
    draw = np.random.default_rng(0)
    x = draw.normal(0, 3, (5, 5, 3)).astype(np.float32)
    masked = np.arange(5) < np.array([1, 2, 3, 0, 5])[:, None]
    labels, order = draw.integers(0, 4, (5, 5)), draw.integers(0, 2, 5)
    data = {"x": x, "y": (np.where(masked, labels, -100), order)}
    step, state = of(net, dp.text.masked_language(), x)

    def nll(child, x, labels):
        logits = x.astype(np.float64) @ np.asarray(state.params[child]["kernel"], np.float64)
        own = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return np.log(np.exp(logits).sum(-1)) - own

    tokens = nll("tokens", x, labels)[masked].mean()
    follows = nll("follows", x[:, 0], order).mean()
    for found in cuts(step, state, data, 1, 2, 3, 5):
        assert found["token_loss"] == pytest.approx(tokens, rel=1e-5)
        assert found["follows_loss"] == pytest.approx(follows, rel=1e-5)
        assert found["loss"] == pytest.approx(tokens + follows, rel=1e-5)
    penalized = dp.training.penalized(dp.text.masked_language(), lambda p: 1e-3 * dp.losses.l2(p))
    step, _ = of(net, penalized, x)
    one, other = cuts(step, state, data, 2, 5)
    assert one == pytest.approx(other, rel=1e-5) and one["loss"] == pytest.approx(tokens + follows)
    row = dp.fit(step, dp.batches(data, 2), key=KEY, steps=3, progress=False).history[0]
    assert row["loss"] == pytest.approx(row["token_loss"] + row["follows_loss"], rel=1e-6)


SILENT = dp.stateless(None, lambda params, x, *, time: 0 * x, name="silent")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 40])
def test_every_example_has_its_own_noise(size):
    """The net predicts 0, so that the loss is the mean square of 2,000 normal numbers."""
    objective = dp.diffusion.denoising(dp.diffusion.cosine_noise(10))
    step, state = of(SILENT, objective, jnp.ones((1, 2)), time=jnp.ones(1))
    found = dp.evaluate(step, state, dp.batches(np.ones((1000, 2), np.float32), size))["loss"]
    assert abs(found - 1) < 4 * np.sqrt(2 / 2000)
    each = {float(step.evaluate(state, np.ones((1, 2), np.float32), i)["loss"]) for i in range(50)}
    assert len(each) == 50


def echo(layers, x, *, time):
    """The prediction depends on the time, a side input of all examples."""
    return x * time[:, None]


DRAWING = {
    "denoising": (dp.program()(echo), dp.diffusion.denoising(dp.diffusion.cosine_noise(10)),
                  lambda x: {"x": x}, {"time": jnp.ones(1, int)}),
    "velocity": (dp.program()(echo),
        dp.diffusion.denoising(dp.diffusion.cosine_noise(10), predict="velocity"),
                 lambda x: x, {"time": jnp.ones(1, int)}),
    "elbo": (dp.models.vae(dp.branch(dp.linear(2), dp.linear(2)), dp.linear(3)),
             dp.training.elbo(dp.losses.squared_error), lambda x: (x, x), {}),
    "masked elbo": (dp.models.vae(dp.branch(dp.linear(2), dp.linear(2)), dp.linear(3)),
                    dp.training.elbo(dp.losses.squared_error),
                    lambda x: {"x": x, "y": x, "mask": np.arange(7) != 2}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWING)
def test_noise_does_not_depend_on_the_batch_size(name):
    net, objective, batch, side = DRAWING[name]
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    for drawing in (objective, dp.training.penalized(objective, lambda params: jnp.float32(1))):
        step, state = of(net, drawing, x[:1], **side)
        whole, *parts = cuts(step, state, batch(x), 7, 1, 2, 3)
        for part in parts:
            assert part == pytest.approx(whole, rel=1e-4)
        assert dp.evaluate(step, state, [batch(x)]) == whole  # and is the same each time


@pytest.mark.slow
def test_a_common_side_input_is_not_split_into_examples():
    """As many features as examples: the side input is one number per feature."""
    @dp.program()
    def net(layers, x, *, time, shift):
        return x * time[:, None] + shift

    x, shift = np.ones((3, 3), np.float32), np.arange(3, dtype=np.float32)
    step, state = of(net, dp.diffusion.denoising(dp.diffusion.cosine_noise(10)), x,
        time=jnp.ones(3), shift=shift)
    whole = dp.evaluate(step, state, [{"x": x, "shift": shift}])
    parts = [{"x": x[:2], "shift": shift}, {"x": x[2:], "shift": shift}]
    assert dp.evaluate(step, state, parts) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_evaluation_samples_the_bound():
    """q is N(0, 1), and the prediction is z: E[(z - 2)**2] is 1 + 4, its variance 2 + 16."""
    still = dp.stateless(None, lambda params, x: (0 * x, 0 * x), name="still")
    net = dp.models.vae(still, lambda z: z)
    x = np.full((1000, 1), 2, np.float32)
    step, state = of(net, dp.training.elbo(dp.losses.squared_error), x[:1])
    found = dp.evaluate(step, state, dp.batches((x, x), 100))
    assert found["kl"] == 0
    assert abs(found["reconstruction"] - 5) < 4 * np.sqrt(18 / 1000)


@pytest.mark.slow
def test_players_draw_for_each_example():
    def guess(net, params, state, x, *, key, train):
        loss = jnp.square(jax.random.normal(key, x.shape) * params["point"]["scale"] - x).mean()
        return loss, (state, {"loss": loss})

    number = dp.stateless(lambda key, x: {"scale": jnp.ones(1)}, lambda params, x: params["scale"])
    x = np.ones((6, 1), np.float32)
    found = []
    for draws in (False, True):
        guess.draws = draws
        step = dp.training.make_game(dp.serial(point=number),
            {"point": dp.training.Player(guess, optax.sgd(0.1))})
        state = step.init(KEY, x)
        found.append([part["point/loss"] for part in cuts(step, state, x, 6, 3, 1)])
        one, other = (float(step.evaluate(state, x[:1], i)["point/loss"]) for i in (0, 1))
        assert one != other  # another batch has other noise
    assert found[1] == pytest.approx([found[1][0]] * 3, rel=1e-5)
    assert abs(found[0][0] - found[0][1]) > 1e-3


def scored(net, params, state, batch, *, key, train):
    """A custom objective without count."""
    x, y = batch
    loss = jnp.square(net(params, x)[..., 0] - y).mean()
    return loss, (state, {"loss": loss})


@pytest.mark.slow
def test_an_objective_without_count_is_weighted_by_examples():
    x, y = examples(9)
    y = y.astype(np.float32)
    y[8] = 100.0  # the last batch is short, and unlike the others
    step, state = of(dp.linear(1), scored, x)
    wanted = ((np.asarray(dp.linear(1)(state.params, x))[:, 0] - y) ** 2).mean()
    for found in cuts(step, state, (x, y), 2, 4, 9):
        assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    each = dp.fit(step, dp.batches((x, y), 4), key=KEY, steps=3, log_every=1,
        progress=False).history
    some = dp.fit(step, dp.batches((x, y), 4), key=KEY, steps=3, progress=False).history
    losses = [row["loss"] for row in each]
    assert some[0]["loss"] == pytest.approx(np.average(losses, weights=[4, 4, 1]), rel=1e-5)


@pytest.mark.slow
def test_a_short_batch_across_examples_is_refused():
    def contrast(net, params, state, batch, *, key, train):
        z = net(params, batch["x"])
        loss = dp.losses.cross_entropy(z @ z.T, jnp.arange(len(z)))
        return loss, (state, {"loss": loss})

    x = examples(9)[0]
    step, state = of(NET, contrast, x)
    dp.evaluate(step, state, dp.batches({"x": x}, 4))  # it has not said so
    contrast.across_examples = True
    for objective in (contrast, dp.training.penalized(contrast, lambda params: jnp.float32(0))):
        step, state = of(NET, objective, x)
        assert dp.evaluate(step, state, dp.batches({"x": x}, 3))
        with pytest.raises(dp.LayerError, match="batches of one size, 4, for an objective across "
                           "examples, got one of 1"):
            dp.evaluate(step, state, dp.batches({"x": x}, 4))
    game = dp.training.make_game(dp.serial(one=NET), {"one": dp.training.Player(
        lambda net, params, *given, **how: contrast(
            net.children["one"], params["one"], *given, **how), optax.sgd(0.1))})
    assert not game.across_examples


def test_a_batch_of_count_zero_has_no_effect():
    x, y = examples(4)
    step = sgd(donate=False)
    state = step.init(KEY, x)
    nothing = {"x": np.full_like(x, np.nan), "y": y, "mask": np.zeros(4, bool)}
    whole = {"x": x, "y": y, "mask": np.ones(4, bool)}
    assert dp.evaluate(step, state, [whole, nothing]) == dp.evaluate(step, state, [whole])


# 64-bit ints.

BEYOND = np.array([0, 2**32 + 1, 2], np.int64)


def test_labels_beyond_32_bits_are_out_of_range():
    x, y = examples(3)[0], BEYOND
    step = sgd(donate=False)
    state = step.init(KEY, x)
    for kind in (np.int64, np.uint64):
        assert np.isnan(dp.evaluate(step, state, [(x, y.astype(kind))])["loss"])
        assert np.isnan(dp.evaluate(step, state, [{"x": x, "y": y.astype(kind)}])["loss"])
    assert np.isfinite(dp.evaluate(step, state, [(x, y % 2**32)])["loss"])
    with pytest.raises(dp.LayerError, match="a finite loss"):
        dp.fit(step, [(x, y)], key=KEY, steps=1, progress=False)
    with pytest.raises(dp.LayerError, match="a finite validation/loss"):
        dp.fit(step, [(x, y % 2**32)], key=KEY, steps=1, validation=[(x, y)], progress=False)


@pytest.mark.slow
def test_ids_beyond_32_bits_have_no_row():
    net = dp.serial(dp.embedding(3, 2), dp.linear(2))
    params, _ = net.init(KEY, BEYOND)
    for size in (2, 5):
        rows = dp.predict(net, params, BEYOND, batch_size=size)
        assert np.isnan(rows).any(1).tolist() == [False, True, False]


def test_evaluate_requires_a_batch():
    x, y = examples()
    step = sgd()
    state = step.init(KEY, x)
    spent = iter([(x, y)])
    dp.evaluate(step, state, spent)
    for data in (spent, []):
        with pytest.raises(dp.LayerError, match="at least one batch"):
            dp.evaluate(step, state, data)


# predict


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7])
def test_predict_equals_apply(length):
    x, _ = examples(7)
    params, _ = NOISY.init(KEY, x)
    state = {"batch_norm_0": {"mean": jnp.arange(4.0), "var": jnp.arange(1.0, 5.0)}}
    wanted = NOISY(params, jnp.asarray(x[:length]), state=state)
    got = dp.predict(NOISY, params, x[:length], state=state, batch_size=3)
    assert got.shape == (length, 3)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_predict_of_no_examples_is_empty():
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
    # Twice to plan, once for one example more; once to see whether it mixes; once to compile.
    assert set(traced) == {(3, 2), (4, 2)} and len(traced) <= 4


def test_predict_requires_a_positive_batch_size():
    params, _ = NET.init(KEY, jnp.ones((1, 4)))
    with pytest.raises(dp.LayerError, match="batch_size"):
        dp.predict(NET, params, jnp.ones((2, 4)), batch_size=0)


# The batch axis, and side inputs without one.


def equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


NETS = {
    "ensemble": dp.ensemble(5, NET),  # (5, examples, 3)
    "ensemble as large as a batch": dp.ensemble(4, NET),
    "tap of a repeat": dp.tap(dp.repeat(3, dp.linear(4) >> jnp.tanh), "**/linear_0"),
    "tap of an ensemble in a repeat": dp.tap(
        dp.repeat(2, dp.ensemble(4, dp.linear(4)) >> (lambda y: y.mean(0))), "**"),
    "last": dp.serial(NET, lambda y: y.T),
    "no examples": dp.program(body=NET)(
        lambda layers, x: {"y": layers.body(x), "table": layers.body.params["kernel"]}),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_outputs_are_concatenated_along_their_batch_axis(name, size):
    net, x = NETS[name], examples(10)[0]
    params, state = net.init(KEY, x)
    whole = net(params, x, state=state)
    found = dp.predict(net, params, x, state=state, batch_size=size)
    chex.assert_trees_all_equal_shapes(found, whole)
    equal(found, whole)


def test_an_output_that_merges_the_batch_axis_is_refused():
    net = dp.serial(NET, lambda y: y.ravel())
    params, _ = net.init(KEY, examples(2)[0])
    with pytest.raises(dp.LayerError, match="outputs with an axis of the 4 examples"):
        dp.predict(net, params, examples(10)[0], batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 7])
def test_a_common_attention_mask_is_not_cut(count):
    net = dp.self_attention(1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(count, 3, 2)), jnp.float32)
    params, _ = net.init(KEY, x)
    one = jnp.tril(jnp.ones((3, 3), bool))[None, None]
    for side in ({"attention_mask": one},
                 {"attention_mask": one, "mask": jnp.arange(3) < jnp.arange(1, count + 1)[:, None]},
                 {"attention_mask": jnp.tile(one, (count, 1, 1, 1))}):
        equal(dp.predict(net, params, x, batch_size=2, **side), net(params, x, **side))


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_common_side_input_may_be_as_long_as_the_batch(count):
    """`shift` has one number per feature, of which there are 4; `own` one per example."""
    @dp.program(head=NET)
    def net(layers, x, *, shift, own):
        return layers.head(x + shift) + own[:, None]

    x = examples(count)[0]
    side = {"shift": jnp.arange(4.0), "own": jnp.arange(float(count))}
    params, _ = net.init(KEY, x, **side)
    for size in (1, 2, count):
        equal(dp.predict(net, params, x, batch_size=size, **side), net(params, x, **side))


@pytest.mark.parametrize("x", [
    np.float32(1), (np.ones((2, 4)), np.ones((3, 4))),
], ids=["scalar", "two lengths"])
def test_predict_requires_a_batch_axis(x):
    params, _ = NET.init(KEY, jnp.ones((1, 4)))
    with pytest.raises(dp.LayerError, match="arrays of one length"):
        dp.predict(NET, params, x)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "value"), [(np.float16, 0.7), (np.float32, 0.7)])
def test_metrics_are_averaged_in_float64_whatever_their_dtype(dtype, value):
    """Summed in float16, 2000 parts of 0.7 have the mean 0.65; 100,000 in float32 have 0.6994."""
    parts = [{"loss": dtype(value), "count": np.int32(1)}] * 100_000
    assert abs(average_batches(parts)["loss"] - float(dtype(value))) < 1e-12
