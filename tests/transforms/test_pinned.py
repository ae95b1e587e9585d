"""`pin`: a layer in a fixed mode; output, randomness, state and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY, X, close, equal, gradient, moved, same

import diffprog as dp

BODY = dp.serial(dp.linear(4), dp.batch_norm(), dp.dropout(0.5))
NET = dp.serial(body=BODY, head=dp.linear(3))
LABELS = jnp.array([0, 1, 2])
INFERENCE = dp.replace(NET, "body", lambda body: dp.pin(body, train=False))
TRAINING = dp.replace(NET, "body/dropout~0", lambda drop: dp.pin(drop, train=True))


def trees(net=NET, x=X):
    params, state = net.init(KEY, x)
    return moved(params), moved(state, 4)


@pytest.mark.slow
def test_pinned_to_inference_training_equals_inference():
    """Output, gradient and state, without a key; parameters are those of the net."""
    params, state = trees()
    same(INFERENCE.init(KEY, X), NET.init(KEY, X))
    y, after = INFERENCE.apply(params, state, X, train=True)
    close(y, NET(params, X, state=state))
    same(after, state)
    slope = gradient(lambda p, x: INFERENCE.apply(p, state, x, train=True)[0], params)
    close(slope, gradient(lambda p, x: NET(p, x, state=state), params))
    assert slope["body"]["linear_0"]["kernel"].any()
    assert not equal(NET.apply(params, state, X, key=KEY, train=True)[1], state)


def test_pinned_to_inference_it_draws_nothing_even_with_a_key():
    net = dp.pin(dp.branch(jnp.sin, jnp.cos) >> dp.estimators.gaussian_sample(), train=False)
    same(net.apply({}, {}, X, key=KEY, train=True)[0], jnp.sin(X))
    same(net({}, X, key=KEY), jnp.sin(X))
    assert not net.random and not INFERENCE.children["body"].random
    assert TRAINING.children["body"].children["dropout~0"].random


def test_monte_carlo_dropout_beside_batch_norm_in_inference():
    """Dropout drops as in training; batch norm uses its running statistics."""
    params, state = trees()
    rest = NET.children["body"](params["body"], X, state=state["body"])
    body = TRAINING.children["body"]
    y, after = body.apply(params["body"], state["body"], X, key=KEY)
    same(after, state["body"])
    kept = np.asarray(y) != 0
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(y, np.where(kept, 2 * rest, 0), rtol=1e-5)
    _, after = NET.apply(params, state, X, key=KEY, train=True)
    wanted, _ = NET.apply(params, state, X, key=KEY, train=True)
    given, moved_on = TRAINING.apply(params, state, X, key=KEY, train=True)
    same((given, moved_on), (wanted, after))


def test_a_key_is_optional_in_inference_and_required_in_training():
    params, state = trees()
    close(TRAINING(params, X, state=state), NET(params, X, state=state))
    with pytest.raises(dp.LayerError, match="a key when train=True"):
        TRAINING.apply(params, state, X, train=True)


@pytest.mark.parametrize("train", [False, True])
def test_pinned_to_training_batch_norm_uses_batch_statistics(train):
    net, (params, state) = dp.pin(dp.batch_norm(), train=True), trees(dp.batch_norm())
    same(net.apply(params, state, X, train=train),
         dp.batch_norm().apply(params, state, X, train=True))


def test_the_inner_of_two_pins_applies():
    """The outer ``train=False`` also takes the key from a dropout pinned to training."""
    params, state = trees(BODY)
    norm = lambda train: dp.replace(  # noqa: E731
        dp.pin(BODY, train=not train), "batch_norm_0", lambda norm: dp.pin(norm, train=train))
    same(norm(False).apply(params, state, X, key=KEY)[1], state)
    assert (norm(False)(params, X, state=state, key=KEY) == 0).any()
    statistics = BODY.apply(params, state, X, key=KEY, train=True)[1]
    same(norm(True).apply(params, state, X, key=KEY, train=False)[1], statistics)
    noisy = dp.pin(dp.serial(dp.pin(dp.dropout(0.5), train=True)), train=False)
    same(noisy.apply({}, {}, X, key=KEY, train=True)[0], X)


WRAPS = {
    "repeat": lambda f: dp.repeat(2, f), "heads": lambda f: dp.heads(2, f), "remat": dp.remat,
    "mixed": lambda f: dp.mixed(f, jnp.float32), "ema": dp.ema, "linearize": dp.linearize,
    "recurrent": dp.recurrent, "hyper": lambda f: dp.hyper(f, dp.linear(2)),
}


@pytest.mark.parametrize("way", WRAPS)
def test_wrappers_around_a_pinned_layer_respect_its_mode(way):
    """A wrapper around a pinned net computes the same program in both modes, except `ema`."""
    wrap = WRAPS[way]
    part = {"hyper": dp.linear(4) >> dp.dropout(0.5),
            "recurrent": dp.simple_rnn(4) >> dp.dropout(0.5)}.get(way, BODY)
    side = {"condition": jnp.ones((3, 2))} if way == "hyper" else {}
    x = jnp.ones((3, 2, 4)) if way == "recurrent" else X
    net = wrap(dp.pin(part, train=False))
    assert not net.random
    params, state = net.init(KEY, x, **side)
    run = lambda train: jax.make_jaxpr(lambda p, s, x: net.apply(  # noqa: E731
        p, s, x, train=train, **side))(params, state, x)
    if way != "ema":
        assert str(run(False)) == str(run(True))
    _, after = net.apply(params, state, x, train=True, **side)
    rest = lambda state: {n: s for n, s in state.items() if n != "#ema"}  # noqa: E731
    same(rest(after), rest(state))
    for wrapped in (dp.pin(wrap(part), train=False), dp.tap(dp.serial(f=net), "f")):
        assert not wrapped.random


@pytest.mark.parametrize("train", [False, True])
def test_merge_respects_the_pinned_mode(train):
    """An `ema` inside `pin` follows the pinned mode, one around it the mode of the net."""
    plain = dp.serial(dp.linear(4), dp.linear(3))
    inside = dp.serial(dp.pin(dp.ema(dp.linear(4), 0.5), train=train), dp.linear(3))
    around = dp.ema(dp.pin(dp.serial(dp.linear(4), dp.linear(3)), train=train), 0.5)
    nested = dp.pin(dp.serial(dp.ema(dp.linear(4), 0.5), dp.linear(3)), train=train)
    for net in (inside, around, nested):
        params, state = trees(net)
        for mode in (False, True):
            merged, rest = dp.tree.merge(net, params, state, train=mode)
            assert rest == {}
            close(plain(merged, X), net.apply(params, state, X, train=mode)[0])
    params, _ = plain.init(KEY, X)
    unmerged, state = dp.tree.unmerge(inside, params, key=KEY)
    close(inside(unmerged, X, state=state), plain(params, X))


def test_a_pinned_batch_norm_does_not_change_in_training():
    """`make_step` updates parameters, and the statistics of the layers that are not pinned."""
    net = dp.serial(dp.linear(4), frozen=dp.pin(dp.batch_norm(), train=False), up=dp.linear(4),
                    moving=dp.batch_norm(), head=dp.linear(3))
    step = dp.make_step(net, dp.classification(), optax.sgd(0.1), donate=False)
    before = step.init(KEY, X)
    after, _ = step.apply(before, (X, LABELS))
    same(after.state["frozen"], before.state["frozen"])
    assert not equal(after.state["moving"], before.state["moving"])
    assert not equal(after.params["frozen"], before.params["frozen"])
    teacher = dp.replace(net, "frozen", lambda norm: dp.freeze(norm))
    step = dp.make_step(teacher, dp.classification(), optax.adamw(0.1), donate=False)
    after, _ = step.apply(before._replace(opt_state=step.init(KEY, X).opt_state), (X, LABELS))
    same((after.params["frozen"], after.state["frozen"]),
         (before.params["frozen"], before.state["frozen"]))


@pytest.mark.slow
def test_a_layer_pinned_to_inference_does_not_mix_examples():
    """Per-example gradients in training have the mean of the batch gradient."""
    net = dp.serial(dp.linear(4), dp.pin(dp.batch_norm(), train=False), dp.linear(3))
    params, state = trees(net)
    objective = dp.classification()
    each = jax.jit(lambda p: dp.gradients.per_example_gradients(
        net, objective, p, state, (X, LABELS), train=True))(params)
    whole = jax.jit(jax.grad(lambda p: objective(
        net, p, state, (X, LABELS), key=None, train=True)[0]))(params)
    close(jax.tree.map(lambda g: g.mean(0), each), whole)
    kept = dp.serial(dp.linear(4), dp.pin(dp.dropout(0.5), train=True), dp.linear(3))
    params, state = trees(kept)
    jax.eval_shape(lambda p: dp.gradients.per_example_gradients(
        kept, objective, p, state, (X, LABELS)), params)
    assert dp.predict(kept, params, X, state=state, batch_size=2).shape == (3, 3)
    mixing = dp.serial(dp.linear(4), dp.pin(dp.batch_norm(), train=True), dp.linear(3))
    params, state = trees(mixing)
    with pytest.raises(dp.LayerError, match="examples along axis 0, unmixed in inference"):
        dp.predict(mixing, params, X, state=state, batch_size=2)


@pytest.mark.slow
def test_gradient_flow_summary_and_diagram_see_through_pin():
    params, state = trees()
    objective = dp.classification()
    flow = lambda net: dp.inspection.gradient_flow(  # noqa: E731
        net, objective, params, (X, LABELS), state=state, key=KEY).rows
    assert [row.path for row in flow(INFERENCE)] == [row.path for row in flow(NET)]
    assert dp.summary(INFERENCE, X).parameters == dp.summary(NET, X).parameters
    assert "body" in dp.inspection.diagram(INFERENCE, X)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_streams_work_in_either_mode(train):
    """Caches of a pinned layer change, so that a pinned teacher streams in training, too."""
    body = dp.conv(3, 2, dims=1, padding="CAUSAL") >> dp.dropout(0.5)
    net = dp.serial(dp.dropout(0.5), dp.pin(body, train=train))
    x = jax.random.normal(KEY, (2, 4, 3))
    params, state = net.init(KEY, x)
    stream, parts = net.start(params, state, x[:, :1], length=4), []
    for begin, end in ((0, 1), (1, 4)):
        y, after = net.apply(params, stream, x[:, begin:end])
        parts.append(y)
        assert not equal(net.apply(params, stream, x[:, begin:end], key=KEY, train=True)[1], stream)
        stream = after
    close(jnp.concatenate(parts, 1), net(params, x))
