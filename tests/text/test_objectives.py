"""Objectives of language models against NumPy, and the loss without logits in memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.refusing import expect, refused

import diffprog as dp

KEY = jax.random.key(0)
IDS = jax.random.randint(KEY, (2, 6), 0, 7)
NET = dp.models.gpt(7, length=5, width=4, depth=1, heads=2, hidden=4)
apply = jax.jit(NET)


@functools.cache
def drawn():
    return NET.init(KEY, IDS[:, :-1])


def measured(objective, batch, net=NET, trees=None):
    run = jax.jit(lambda params, state, batch: objective(
        net, params, state, batch, key=None, train=True))
    loss, (_, metrics) = run(*(trees or drawn()), batch)
    return float(loss), {name: float(value) for name, value in metrics.items()}


def scores(ids):
    return apply(drawn()[0], ids)


def nlls(logits, labels):
    """``-log softmax(logits)[label]`` of each entry, in float64."""
    logits = np.asarray(logits, np.float64)
    own = np.take_along_axis(logits, np.asarray(labels)[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - own


# Next token.


def test_the_loss_is_the_mean_over_all_tokens_but_the_first():
    logits = scores(IDS[:, :-1])
    wanted = nlls(logits, IDS[:, 1:])
    for batch in (IDS, {"x": IDS}):
        loss, metrics = measured(dp.text.next_token(), batch)
        np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-5)
        assert metrics["loss"] == loss and metrics["count"] == 10
        np.testing.assert_allclose(metrics["bits"], loss / math.log(2), rtol=1e-6)
        hits = np.asarray(logits).argmax(-1) == np.asarray(IDS[:, 1:])
        np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [
    [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]])
def test_padding_is_neither_target_nor_input(mask):
    mask = np.array(mask, bool)
    valid = mask[:, 1:] & mask[:, :-1]  # padding predicts nothing
    wanted = [nlls(scores(IDS[i : i + 1, row][:, :-1]), IDS[i : i + 1, row][:, 1:])
              for i, row in enumerate(mask) if row.sum() > 1]
    for filler in (0, 6):
        batch = {"x": jnp.where(mask, IDS, filler), "mask": jnp.asarray(mask)}
        loss, metrics = measured(dp.text.next_token(), batch)
        np.testing.assert_allclose(loss, np.concatenate(wanted, 1).mean(), rtol=1e-5)
        assert metrics["count"] == valid.sum()


@pytest.mark.slow
def test_the_mask_may_be_one_of_texts():
    loss, metrics = measured(dp.text.next_token(), {"x": IDS, "mask": jnp.array([True, False])})
    np.testing.assert_allclose(loss, measured(dp.text.next_token(), IDS[:1])[0], rtol=1e-5)
    assert metrics["count"] == 5


def test_packed_texts_do_not_mix():
    """Two texts packed into a row have the losses that they have alone."""
    row = {"x": IDS[:1], "segments": jnp.array([[0, 0, 1, 1, 1, 1]]),
           "positions": jnp.array([[0, 1, 0, 1, 2, 3]])}
    loss, metrics = measured(dp.text.next_token(), row)
    alone = [measured(dp.text.next_token(), part) for part in (IDS[:1, :2], IDS[:1, 2:])]
    wanted = sum(one * found["count"] for one, found in alone) / 4
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert metrics["count"] == 4


def test_asked_restricts_the_loss():
    """The answer has a loss, the question is input only."""
    asked = jnp.arange(6) >= 3
    loss, metrics = measured(dp.text.next_token(), {"x": IDS, "asked": jnp.tile(asked, (2, 1))})
    wanted = nlls(scores(IDS[:, :-1]), IDS[:, 1:])[:, 2:]
    np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-5)
    assert metrics["count"] == 6


@pytest.mark.slow
def test_the_target_mask_is_one_of_targets():
    asked = np.array([[0, 0, 1, 1, 1], [0, 1, 0, 0, 1]], bool)
    wanted = nlls(scores(IDS[:, :-1]), IDS[:, 1:])
    loss, metrics = measured(dp.text.next_token(), {"x": IDS, "target_mask": jnp.asarray(asked)})
    np.testing.assert_allclose(loss, wanted[asked].mean(), rtol=1e-5)
    assert metrics["count"] == 5
    loss, _ = measured(dp.text.next_token(), {"x": IDS, "target_mask": jnp.array([False, True])})
    np.testing.assert_allclose(loss, wanted[1].mean(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("filler", [-1, -100, 7])
def test_padding_has_no_gradient(filler):
    mask = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    params, state = drawn()

    @jax.jit
    def slopes(x):
        run = lambda params: dp.text.next_token()(  # noqa: E731
            NET, params, state, {"x": x, "mask": mask}, key=None, train=True)[0]
        return jax.grad(run)(params)

    jax.tree.map(np.testing.assert_array_equal, slopes(jnp.where(mask, IDS, filler)),
                 slopes(jnp.where(mask, IDS, 3)))


@pytest.mark.slow
def test_translation_is_trained_by_teacher_forcing():
    """The inputs are source and target prefix."""
    net = dp.models.seq2seq(5, 7, width=4)
    source, mask = jnp.array([[1, 2, 3], [4, 4, 0]]), jnp.array([[1, 1, 1], [1, 1, 0]], bool)
    params, state = net.init(KEY, IDS[:, :-1], source=source)
    batch = {"x": IDS, "source": source, "source_mask": mask}
    loss, _ = measured(dp.text.next_token(), batch, net, (params, state))
    logits = jax.jit(net)(params, IDS[:, :-1], source=source, source_mask=mask)
    np.testing.assert_allclose(loss, nlls(logits, IDS[:, 1:]).mean(), rtol=1e-5)


@pytest.mark.slow
def test_label_smoothing_changes_the_loss_but_not_bits():
    loss, metrics = measured(dp.text.next_token(label_smoothing=0.1), IDS)
    logits = scores(IDS[:, :-1])
    wanted = dp.losses.cross_entropy(logits, IDS[:, 1:], label_smoothing=0.1)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    nll = nlls(logits, IDS[:, 1:]).mean()
    np.testing.assert_allclose(metrics["cross_entropy"], nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["bits"], nll / math.log(2), rtol=1e-5)
    assert abs(metrics["loss"] - nll) > 1e-3


@pytest.mark.slow
def test_perplexity_is_that_without_label_smoothing():
    """Logits are 4 for the true class, 0 for two others: the nll is log(1 + 2 exp(-4))."""
    net = dp.embedding(3, 3)
    step = dp.make_step(net, dp.text.next_token(label_smoothing=0.3), optax.sgd(0.1))
    state = step.init(KEY, IDS % 3)
    state = state._replace(params={"embedding": 4.0 * jnp.roll(jnp.eye(3), 1, axis=1)})
    ids = jnp.arange(8).reshape(1, 8) % 3  # 0, 1, 2, 0, ...
    for objective in (dp.text.next_token(label_smoothing=0.3), dp.text.next_token()):
        found = dp.evaluate(dp.make_step(net, objective, optax.sgd(0.1)), state, [ids])
        wanted = 1 + 2 * math.exp(-4)
        assert dp.metrics.perplexity(found.get("cross_entropy", found["loss"])) == pytest.approx(
            wanted)
        assert 2 ** found["bits"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_evaluate_averages_over_tokens():
    step = dp.make_step(NET, dp.text.next_token(), optax.sgd(0.1))
    state = step.init(KEY, IDS[:, :-1])
    mask = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], bool)
    parts = [{"x": IDS, "mask": jnp.ones_like(mask)}, {"x": IDS, "mask": mask}]
    found = dp.evaluate(step, state, parts)
    each = [measured(dp.text.next_token(), part, trees=(state.params, {})) for part in parts]
    wanted = sum(loss * metrics["count"] for loss, metrics in each) / 13
    np.testing.assert_allclose(found["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(found["bits"], wanted / math.log(2), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [
    dp.text.next_token(),
    dp.training.penalized(dp.text.next_token(), lambda params: 1e-3 * dp.losses.l2(params))])
def test_init_sees_the_inputs_without_the_last_token(objective):
    """So a text may have one token more than there are positions."""
    step = dp.make_step(NET, objective, optax.sgd(0.1))
    assert IDS.shape[1] == NET.children["positions"].settings["length"] + 1
    fit = dp.fit(step, [{"x": np.asarray(IDS), "mask": np.ones(2, bool)}], key=KEY, steps=2,
                 progress=False)
    assert len(fit.history) == 1


def test_invalid_batches_of_next_token_are_refused():
    params, state = drawn()
    ask = lambda batch, net=NET: dp.text.next_token()(  # noqa: E731
        net, params, state, batch, key=None, train=True)
    two = "wants ids as ints (batch, time + 1), at least two tokens, got {}; give at least two " \
          "tokens to each row: the targets are all but the first"
    expect("", two.format("int32[2,1]"), ask, IDS[:, :1])
    expect("", two.format("float32[2,3]"), ask, jnp.ones((2, 3)))
    error = refused(ask, {"x": IDS, "y": IDS})
    assert "x holds inputs and targets" in error.remedy
    unsegmented = dp.embedding(7, 4) >> dp.linear(7)
    assert "segments" in refused(ask, {"x": IDS, "segments": IDS}, unsegmented).got
    error = refused(ask, {"x": IDS, "positions": IDS[:, 1:]})
    assert error.wants == "positions of the shape of x, (2, 6)"
    last = dp.stateless(None, lambda params, x: jnp.ones((len(x), 7)), name="last")
    error = refused(lambda: dp.text.next_token()(last, {}, {}, IDS, key=None, train=True))
    assert error.wants.startswith("a net that returns logits (batch, time, vocabulary)")


# Next token without logits in memory.


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_equals_cross_entropy(chunk, bias):
    draw = np.random.default_rng(0)
    x, kernel = draw.normal(size=(2, 5, 4)), draw.normal(0, 2, size=(4, 7))
    labels = draw.integers(0, 7, (2, 5))
    mask = draw.random((2, 5)) < 0.7
    b = draw.normal(size=7) if bias else None
    logits = x @ kernel + (0 if b is None else b)
    loss, best = jax.jit(functools.partial(dp.losses.linear_cross_entropy, chunk=chunk))(
        jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(labels),
        bias=None if b is None else jnp.asarray(b), mask=jnp.asarray(mask))
    np.testing.assert_allclose(loss, nlls(logits, labels)[mask].mean(), rtol=1e-5)
    assert (np.asarray(best)[mask] == logits.argmax(-1)[mask]).all()


@pytest.mark.slow
def test_gradients_of_linear_cross_entropy():
    draw = np.random.default_rng(1)
    with jax.enable_x64(True):
        given = [jnp.asarray(draw.normal(size=shape)) for shape in ((6, 4), (4, 7), (7,))]
        labels = jnp.asarray(draw.integers(0, 7, 6))

        def chunked(x, kernel, bias):
            return dp.losses.linear_cross_entropy(x, kernel, labels, bias=bias, chunk=3)[0]

        def whole(x, kernel, bias):
            return dp.losses.cross_entropy(x @ kernel + bias, labels)

        wanted = jax.jit(jax.grad(whole, (0, 1, 2)))(*given)
        for mode in (jax.grad, jax.jacfwd):
            found = jax.jit(mode(chunked, (0, 1, 2)))(*given)
            for ours, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose(ours, other, atol=1e-12)
        assert dp.gradients.check_gradients(lambda x: chunked(x, *given[1:]), given[0])


@pytest.mark.slow
def test_labels_outside_the_classes_are_nan_and_ignored_entries_are_not():
    x, kernel = jnp.ones((3, 2)), jnp.ones((2, 5))
    loss, _ = dp.losses.linear_cross_entropy(x, kernel, jnp.array([1, 5, 2]), chunk=2,
        reduction="none")
    assert np.isnan(loss).tolist() == [False, True, False]
    loss, _ = dp.losses.linear_cross_entropy(
        x.at[1].set(jnp.nan), kernel, jnp.array([1, -100, 2]), chunk=2, ignore_index=-100)
    np.testing.assert_allclose(loss, math.log(5), rtol=1e-6)


TABLES = {
    "tied": (NET, "embed/embedding"),
    "untied": (dp.serial(trunk=dp.embedding(7, 4) >> dp.linear(4), head=dp.linear(7)),
               "head/kernel"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_chunked_next_token_equals_next_token(name):
    net, table = TABLES[name]
    params, state = net.init(KEY, IDS[:, :-1])
    params = jax.tree.map(lambda a: a + 0.1, params)  # biases too
    mask = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    batch = {"x": IDS, "mask": mask}

    def run(objective, params):
        return objective(net, params, state, batch, key=None, train=True)

    (loss, (_, found)), grads = jax.jit(jax.value_and_grad(functools.partial(
        run, dp.text.chunked_next_token("trunk", table, chunk=3)), has_aux=True))(params)
    (wanted, (_, metrics)), slopes = jax.jit(jax.value_and_grad(functools.partial(
        run, dp.text.next_token()), has_aux=True))(params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for other in metrics:
        np.testing.assert_allclose(found[other], metrics[other], rtol=1e-5, err_msg=other)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, slopes)


@pytest.mark.slow
def test_chunked_next_token_keeps_no_logits_in_memory(optimized):
    """The compiled step has no array (tokens, vocabulary)."""
    net = dp.models.gpt(640, length=16, width=8, depth=1, heads=2)
    ids = jnp.zeros((4, 17), jnp.int32)
    tokens, vocabulary = 64, 640

    def largest(objective):
        step = dp.make_step(net, objective, optax.sgd(0.1))
        program = step.apply.lower(step.init(KEY, ids[:, :-1]), ids).compile()
        return program.memory_analysis().temp_size_in_bytes

    whole = largest(dp.text.next_token())
    chunked = largest(dp.text.chunked_next_token("trunk", "embed/embedding", chunk=64))
    assert whole > 4 * tokens * vocabulary > chunked, (whole, chunked)


# Masked tokens and next-sentence prediction.


def test_the_loss_of_masked_language_is_a_sum_of_two():
    draw = np.random.default_rng(0)
    scores = jnp.asarray(draw.normal(size=(2, 3, 5))), jnp.asarray(draw.normal(size=(2, 2)))
    net = dp.stateless(None, lambda params, x: scores, name="fixed")
    labels, follows = jnp.array([[-100, 2, -100], [4, 0, -100]]), jnp.array([1, 0])
    batch = {"x": jnp.zeros((2, 3), int), "y": (labels, follows)}
    loss, metrics = measured(dp.text.masked_language(), batch, net, ({}, {}))
    asked = nlls(scores[0], jnp.maximum(labels, 0))[np.asarray(labels) >= 0]
    other = nlls(scores[1], follows)
    np.testing.assert_allclose(loss, asked.mean() + other.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["token_loss"], asked.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["follows_loss"], other.mean(), rtol=1e-5)
    best = np.asarray(scores[0]).argmax(-1)[np.asarray(labels) >= 0]
    np.testing.assert_allclose(metrics["token_accuracy"], (best == [2, 4, 0]).mean(), rtol=1e-6)
    hits = np.asarray(scores[1]).argmax(-1) == np.asarray(follows)
    np.testing.assert_allclose(metrics["follows_accuracy"], hits.mean(), rtol=1e-6)
    assert metrics["count/token_loss"] == metrics["count/token_accuracy"] == 3
    assert metrics["count"] == 2


@pytest.mark.slow
def test_masks_of_masked_language():
    draw = np.random.default_rng(0)
    scores = jnp.asarray(draw.normal(size=(3, 2, 5))), jnp.asarray(draw.normal(size=(3, 2)))
    net = dp.stateless(None, lambda params, x, *, mask=None: (
        scores[0] if x.shape[1] == 2 else jnp.zeros((3, x.shape[1], 5)), scores[1]), name="fixed")
    labels, follows = draw.integers(0, 5, (3, 2)), np.array([1, 0, 1])
    batch = {"x": jnp.zeros((3, 2), int), "y": (jnp.asarray(labels), jnp.asarray(follows))}
    tokens, pairs = nlls(scores[0], labels), nlls(scores[1], follows)
    steps = np.array([[1, 0], [1, 1], [1, 0]], bool)
    rows = np.array([True, False, True])
    for masks, valid, valid_pairs in (
            (dict(mask=steps), steps, rows | True),
            (dict(target_mask=rows), rows[:, None] & np.ones_like(steps), rows),
            (dict(target_mask=(steps, None)), steps, rows | True),
            (dict(target_mask=(None, rows), mask=steps), steps, rows)):
        _, metrics = measured(dp.text.masked_language(), batch | masks, net, ({}, {}))
        np.testing.assert_allclose(metrics["token_loss"], tokens[valid].mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["follows_loss"], pairs[valid_pairs].mean(), rtol=1e-5)
        assert metrics["count/token_loss"] == valid.sum()
        assert metrics["count"] == valid_pairs.sum()


# Metrics.


def test_perplexity_and_bits():
    assert dp.metrics.perplexity(0.0) == 1.0
    np.testing.assert_allclose(dp.metrics.perplexity(math.log(50)), 50)
    np.testing.assert_allclose(dp.metrics.bits_per_character(math.log(2)), 1)
    np.testing.assert_allclose(dp.metrics.bits_per_character(2 * math.log(2), 10, 40), 0.5)
    expect("", "wants characters as an int of at least 1, got 0; pass 1 or more",
           dp.metrics.bits_per_character, 1.0, 1, 0)
