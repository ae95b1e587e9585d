"""Computed parameters meet the tools: each against the plain net, after all trees were moved apart.

At init an average is the parameter, an origin too, so that nothing can be told apart.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY, X, close, gradient, moved, names
from support.refusing import refused

import diffprog as dp

NET = dp.serial(dp.linear(4), jnp.tanh, head=dp.linear(3))
IDS = jnp.array([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2]])
LABELS = jnp.array([0, 1, 2])
OBJECTIVE = dp.classification()
# What carries something, alone and in each other.
CARRYING = {
    "ema": dp.ema, "spectral_norm": dp.spectral_norm,
    "ema of spectral_norm": lambda f: dp.ema(dp.spectral_norm(f)),
    "spectral_norm of ema": lambda f: dp.spectral_norm(dp.ema(f)),
    "ema of ema": lambda f: dp.ema(dp.ema(f, 0.5)), "ema of lora": lambda f: dp.ema(dp.lora(f, 1)),
    "ema of repeat of ema": lambda f: dp.ema(dp.remat(dp.ema(f))),
}
WAYS = CARRYING | {
    "weight_norm": dp.weight_norm, "quantize": lambda f: dp.quantize(f, 4),
    "lora": lambda f: dp.lora(f, 1), "quantize of ema": lambda f: dp.quantize(dp.ema(f), 4),
}


def trees(net, x=X):
    params, state = jax.jit(net.init)(KEY, x)
    return moved(params), moved(state, 4)


def both(f):
    """f(train) in both modes, as one compiled program."""
    return jax.jit(lambda: [f(train) for train in (False, True)])()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_merged_trees_are_those_of_the_plain_net_in_both_modes(way):
    net = WAYS[way](NET)
    params, state = trees(net)
    assert dp.tree.merge(net, params, state)[1] == {}
    close(both(lambda train: NET(dp.tree.merge(net, params, state, train=train)[0], X)),
          both(lambda train: net.apply(params, state, X, train=train)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "linearize"])
def test_children_are_shown_and_composed_anew_but_not_called_on_raw_parameters(way):
    wrap = WAYS.get(way, dp.linearize)
    net = wrap(dp.serial(encoder=NET, head=dp.linear(2)))
    params, state = net.init(KEY, X)
    encoder = net.children["encoder"]
    assert repr(encoder) == repr(NET) and encoder.plan(X).y == NET.plan(X).y
    for call in (lambda: encoder(params["encoder"], X),
                 lambda: encoder.apply(params["encoder"], {}, X, train=True),
                 lambda: next(iter(encoder.children.values()))({}, X)):
        with pytest.raises(dp.LayerError, match="a call of the whole net"):
            call()
    fresh, _ = NET.init(KEY, X)
    for other in (dp.serial(encoder), encoder >> dp.linear(3), dp.remat(encoder), encoder**2):
        given, _ = other.init(KEY, X)
        assert other(given, X).shape
    for said in ({"name": "mine"}, {"random": True}, {"side": frozenset({"scale"})}):
        close(dataclasses.replace(encoder, **said)(fresh, X), NET(fresh, X))
    assert dp.serial(dataclasses.replace(encoder, random=True)).random
    edited = dp.replace(net, "encoder/*", lambda old: old >> jnp.sin)
    given, held = edited.init(KEY, X)
    assert edited(given, X, state=held).shape == net(params, X, state=state).shape


@pytest.mark.slow
@pytest.mark.parametrize(("way", "layer"), [
    ("ema", dp.self_attention(2, causal=True)),
    ("ema of spectral_norm", dp.self_attention(2, causal=True)),
    ("spectral_norm of ema", dp.heads(2, dp.attention_head(2, causal=True))),
    ("ema of ema", dp.recurrent(dp.gru(4))), ("spectral_norm", dp.recurrent(dp.lstm(4))),
    ("ema of lora", dp.repeat(2, dp.self_attention(1, causal=True))),
    *(pytest.param(way, layer, marks=pytest.mark.slow) for way in WAYS for layer in (
        dp.self_attention(1, causal=True), dp.recurrent(dp.gru(4)),
        dp.conv(4, 2, dims=1, padding="CAUSAL"))),
], ids=lambda given: given if isinstance(given, str) else given.name)
def test_a_stream_equals_the_whole_sequence_whatever_the_names_of_its_cache(way, layer):
    net = WAYS[way](layer)
    x = jax.random.normal(KEY, (2, 4, 4))
    params, state = trees(net, x)

    @jax.jit
    def streamed(params, state):
        stream, parts = net.start(params, state, x[:, :1], length=4), []
        for begin, end in ((0, 1), (1, 3), (3, 4)):
            y, stream = net.apply(params, stream, x[:, begin:end])
            parts.append(y)
        return jnp.concatenate(parts, 1)

    close(streamed(params, state), jax.jit(net.apply)(params, state, x)[0])


def likeliest(net, params, state, text, steps, **side):
    """The text with the likeliest ids behind it, each after reading all anew."""
    text = jnp.pad(text, ((0, 0), (0, steps)))
    run = jax.jit(lambda text: net(params, text, state=state, **side))  # the net is causal
    for at in range(text.shape[1] - steps, text.shape[1]):
        text = text.at[:, at].set(run(text)[:, at - 1].argmax(-1))
    return text[:, -steps:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ema", "ema of spectral_norm", "quantize"])
def test_generated_tokens_are_the_likeliest_of_the_whole_net(way):
    net = dp.serial(dp.embedding(7, 4), WAYS[way](dp.self_attention(2, causal=True)),
                    WAYS[way](dp.recurrent(dp.gru(4))), dp.linear(7))
    params, state = trees(net, IDS)
    found = dp.text.generate(net, params, IDS, 4, state=state)
    assert found.tokens.tolist() == likeliest(net, params, state, IDS, 4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ema", "quantize"])
def test_memory_is_what_the_net_itself_makes_of_the_source(way):
    plain = dp.models.transformer(7, 7, width=4, depth=1, heads=2, hidden=8)
    net = WAYS[way](plain)
    params, state = jax.jit(net.init)(KEY, IDS, source=IDS)
    params, state = moved(params), moved(state, 4)
    seen = jax.jit(dp.tap(net, "encoder").apply)(params, state, IDS[:, :1], source=IDS)[0][1]
    merged, _ = dp.tree.merge(net, params, state)
    close(seen["encoder"], jax.jit(plain.children["encoder"])(merged["encoder"], IDS))
    written = dp.text.generate(net, params, IDS[:, :1], 3, state=state, memory=seen["encoder"])
    assert written.tokens.tolist() == likeliest(net, params, state, IDS[:, :1], 3, source=IDS)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["spectral_norm", "quantize", "ema of lora"])
def test_the_next_token_in_chunks_reads_the_table_that_the_net_reads(way):
    tables = {"spectral_norm": lambda f: dp.spectral_norm(f, ("**/kernel", "**/embedding")),
              "quantize": lambda f: dp.quantize(f, 3, ("**/kernel", "**/embedding"))}
    net = tables.get(way, WAYS[way])(dp.models.gpt(11, length=8, width=4, depth=1, heads=2))
    params, state = trees(net, IDS)
    of_chunks = dp.text.chunked_next_token("trunk", "embed/embedding", chunk=4)
    found, wanted = (
        both(lambda train, objective=objective: jax.value_and_grad(
            lambda p: objective(net, p, state, IDS, key=None, train=train)[0])(params))
        for objective in (of_chunks, dp.text.next_token()))
    close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ema", "spectral_norm", "weight_norm", "lora", "quantize of ema"])
def test_a_penalty_speaks_of_what_the_net_computes_with(way):
    net = WAYS[way](NET)
    params, state = trees(net)
    objective = dp.training.penalized(OBJECTIVE, dp.losses.l2)

    def penalized(params, train):
        loss, (_, metrics) = objective(net, params, state, (X, LABELS), key=None, train=train)
        return loss, metrics["penalty"]

    def by_hand(params, train):
        kernels = dp.tree.select(dp.tree.merge(net, params, state, train=train)[0], "**/kernel")
        penalty = sum(jnp.sum(w * w) for w in kernels.values())
        return total(net, params, state, train) + penalty, penalty

    found, wanted = (both(lambda train, f=f: jax.value_and_grad(f, has_aux=True)(params, train))
                     for f in (penalized, by_hand))
    close(found, wanted)


def test_a_penalty_of_kernels_of_norm_one_in_numpy():
    net = dp.spectral_norm(dp.serial(dp.linear(4), dp.linear(3)))
    params, state = net.init(KEY, X)
    objective = dp.training.penalized(OBJECTIVE, dp.losses.l2)
    _, (_, metrics) = objective(net, params, state, (X, LABELS), key=None, train=False)
    singular = [np.linalg.svd(np.asarray(leaf), compute_uv=False)
                for leaf in dp.tree.select(params, "**/kernel").values()]
    wanted = sum((s * s).sum() / s[0] ** 2 for s in singular)
    np.testing.assert_allclose(metrics["penalty"], wanted, rtol=1e-3)


def test_carried_names_are_those_of_no_child_and_stay_in_every_place():
    net = dp.serial(key=dp.ema(dp.ema(dp.linear(4))), value=dp.repeat(2, dp.spectral_norm(
        dp.linear(4))))
    _, state = net.init(KEY, X)
    assert {path for path in dp.tree.paths(state) if "bias" not in path} == {
        "key/#ema/kernel/average", "key/#ema/kernel/count", "key/#ema_1/kernel/average",
        "key/#ema_1/kernel/count", "value/#spectral_norm/kernel"}
    assert state["value"]["#spectral_norm"]["kernel"].shape == (2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["quantize", "spectral_norm", "weight_norm", "lora"])
def test_merging_what_was_linearized(way):
    """The tangent of the plain net at what is made of the origin, along what is made of the way."""
    net, plain = dp.linearize(WAYS[way](NET)), dp.linearize(NET)
    params, state = trees(net)
    merged, rest = dp.tree.merge(net, params, state)
    dp.tree.verify(plain, merged, X, state=rest)
    close(plain(merged, X, state=rest), net(params, X, state=state))
    if way == "quantize":  # the gradient passes straight through: the way is not rounded
        for path, kernel in dp.tree.select(merged, "**/kernel").items():
            begin, end = (dp.tree.paths(t)[path] for t in (state["origin"], params))
            close(kernel - dp.tree.paths(rest["origin"])[path], end - begin)


@pytest.mark.slow
def test_activations_of_what_was_linearized_are_on_the_line():
    net = dp.linearize(NET)
    params, state = trees(net)
    origin, seen = state["origin"], dp.tap(net, "**")(params, X, state=state)[1]
    way = jax.tree.map(jnp.subtract, params, origin)
    wanted, slope = jax.jvp(lambda p: dp.tap(NET, "**")(p, X)[1], (origin,), (way,))
    close(seen, jax.tree.map(jnp.add, wanted, slope))
    read = lambda p, x: dp.tap(net, "linear_0")(p, x, state=state)[1]["linear_0"]  # noqa: E731
    assert gradient(read, params)["linear_0"]["kernel"].any()


@pytest.mark.slow
def test_averages_go_around_what_is_linearized():
    assert "averages bias, kernel" in refused(
        dp.linearize(dp.ema(dp.linear(3))).init, KEY, X).got
    net = dp.ema(dp.linearize(NET))
    params, state = trees(net)
    average = jax.tree.map(lambda held: held["average"], state["#ema"],
                           is_leaf=lambda held: "average" in held)
    close(net(params, X, state=state),
          dp.linearize(NET)(average, X, state={"origin": state["origin"]}))


def total(net, params, state, train, examples=slice(None)):
    batch = X[examples], LABELS[examples]
    return OBJECTIVE(net, params, state, batch, key=None, train=train)[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ema", "quantize of ema"])
def test_a_net_without_gradient_in_inference_is_differentiated_in_training_alone(way):
    net = WAYS[way](NET)
    params, state = trees(net)
    for f in (dp.gradients.per_example_gradients, dp.gradients.per_example_gradient_norms):
        assert "train=True" in refused(f, net, OBJECTIVE, params, state, (X, LABELS)).remedy
    seen = jax.jit(lambda params: dp.gradients.per_example_gradients(
        net, OBJECTIVE, params, state, (X, LABELS), train=True))(params)
    alone = jax.jit(jax.grad(lambda p: total(net, p, state, True, slice(1, 2))))(params)
    close(jax.tree.map(lambda g: g[1], seen), alone)
    refused(dp.gradients.tangent_kernel, functools.partial(net, state=state), params, X)
    refused(dp.gradients.tangent_kernel, lambda p, x: net(p, x, state=state), params, X)
    refused(dp.gradients.hessian_product, lambda p: total(net, p, state, False), params, params)
    curve = jax.jit(lambda params: dp.gradients.hessian_product(
        lambda p: total(net, p, state, True), params, params))(params)
    assert any(leaf.any() for leaf in jax.tree.leaves(curve))
    refused(dp.gradients.fisher_product, lambda p: net(p, X, state=state), params, params,
            distribution="categorical")
    # The remedy: the plain net, where it computes.
    plain, _ = dp.tree.merge(net, params, state)
    assert jax.jit(lambda plain: dp.gradients.per_example_gradient_norms(
        NET, OBJECTIVE, plain, {}, (X, LABELS)))(plain).min() > 0


@pytest.mark.slow
def test_statistics_are_refused_beside_averages():
    net = dp.ema(dp.serial(dp.batch_norm(), NET))
    params, state = trees(net)
    error = refused(dp.gradients.per_example_gradients, net, OBJECTIVE, params, state, (X, LABELS),
                    train=True)
    assert error.got == "train=True and batch_norm_0/mean, batch_norm_0/var"


@pytest.mark.slow
def test_only_what_is_trained_is_differentiated():
    net = dp.freeze(dp.lora(NET, 1), exclude=("**/down", "**/up"))
    params, state = trees(net)
    seen = dp.gradients.per_example_gradients(net, OBJECTIVE, params, state, (X, LABELS))
    assert {path.rsplit("/", 1)[-1] for path in dp.tree.paths(seen)} == {"down", "up"}
    assert dp.tree.count(seen) == 3 * (4 + 4 + 4 + 3)
    whole = jax.grad(lambda p: total(net, p, state, False))(params)
    for path, leaf in dp.tree.paths(seen).items():
        np.testing.assert_allclose(leaf.mean(0), dp.tree.paths(whole)[path], atol=1e-6)
    norms = dp.gradients.per_example_gradient_norms(net, OBJECTIVE, params, state, (X, LABELS))
    squares = sum((np.asarray(leaf) ** 2).reshape(3, -1).sum(1) for leaf in jax.tree.leaves(seen))
    np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-5)
    kernel = dp.gradients.tangent_kernel(net, params, X)
    jacobian = jax.jacobian(lambda p: net(p, X))(params)
    rows = [np.asarray(leaf).reshape(3, 3, -1) for leaf in jax.tree.leaves(jacobian)]
    close(kernel, jnp.asarray(sum(np.einsum("iap,jbp->ijab", r, r) for r in rows)))


# Every wrapper before every tool: what it shows is what the plain net shows on the merged trees.

DEEP = dp.serial(dp.linear(4), dp.repeat(2, dp.residual(dp.linear(4) >> jnp.tanh)),
                 head=dp.linear(3))


def metrics(net, params, state):
    step = dp.make_step(net, OBJECTIVE, optax.sgd(0.1))
    begun = step.init(KEY, X)._replace(params=params, state=state)
    return jax.tree.map(jnp.asarray, dp.evaluate(step, begun, [(X, LABELS)]))


TOOLS = {
    "predict": lambda net, params, state: dp.predict(net, params, X, state=state, batch_size=2),
    "evaluate": metrics,
    "tap": lambda net, params, state: jax.jit(dp.tap(net, "**").apply)(params, state, X)[0],
    "replace": lambda net, params, state: jax.jit(
        dp.replace(net, "**/tanh~*", lambda _: jnp.sin).apply)(params, state, X)[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_tools_show_what_the_plain_net_does(way):
    net = WAYS[way](DEEP)
    params, state = trees(net)
    merged, _ = dp.tree.merge(net, params, state)
    for name, tool in TOOLS.items():
        found, wanted = tool(net, params, state), tool(DEEP, merged, {})
        assert jax.tree.structure(found) == jax.tree.structure(wanted), name
        close(found, wanted)
    seen, other = ({row.path: (row.input, row.output) for row in dp.summary(of, X).rows}
                   for of in (net, DEEP))
    assert seen == other and len(seen) > 5
    assert dp.inspection.diagram(net, X) == dp.inspection.diagram(DEEP, X)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_flow_of_gradients_is_that_of_the_plain_net(way):
    net = WAYS[way](DEEP)
    params, state = trees(net)
    seen = dp.inspection.gradient_flow(net, OBJECTIVE, params, (X, LABELS), state=state)
    merged, _ = dp.tree.merge(net, params, state, train=True)
    wanted = dp.inspection.gradient_flow(DEEP, OBJECTIVE, merged, (X, LABELS))
    assert [row.path for row in seen.rows] == [row.path for row in wanted.rows]
    for row, other in zip(seen.rows, wanted.rows, strict=True):
        np.testing.assert_allclose([row.activation, row.gradient],
                                   [other.activation, other.gradient], rtol=1e-4)


@pytest.mark.slow
def test_the_flow_of_what_is_linearized_has_one_row():
    net = dp.serial(deep=dp.repeat(2, dp.linearize(dp.residual(dp.linear(4) >> jnp.tanh))),
                    head=dp.linear(3))
    params, state = trees(net)
    seen = {row.path: row for row in dp.inspection.gradient_flow(
        net, OBJECTIVE, params, (X, LABELS), state=state).rows}
    assert list(seen) == ["deep[0]", "deep[1]", "head", ""]
    grads = jax.grad(lambda p: total(net, p, state, True))(params)["deep"]
    squares = [np.asarray(g[1]).ravel() ** 2 for g in jax.tree.leaves(grads)]
    np.testing.assert_allclose(
        seen["deep[1]"].parameter_gradient, np.sqrt(np.concatenate(squares).mean()), rtol=1e-5)


def replaced(layer, factor):
    """The layer, whose output is multiplied: a wrapper as one writes it by hand."""
    def apply(params, state, x, **given):
        y, state = layer.apply(params, state, x, **given)
        return factor * y, state

    return dataclasses.replace(layer, apply=apply)


def test_a_layer_with_a_replaced_apply_is_not_absorbed_into_a_chain():
    pair = dp.serial(dp.linear(4), jnp.tanh)
    wrapped = replaced(pair, 5.0)
    for net in (wrapped >> dp.linear(3), dp.linear(4) >> wrapped, wrapped ** 2):
        assert "serial_0" in names(net)
    net = wrapped >> dp.linear(3)
    params, _ = net.init(KEY, X)
    close(net(params, X), dp.linear(3)(
        params["linear_0"], 5 * pair(params["serial_0"], X)))
    assert repr(wrapped) == repr(pair)
    again = dataclasses.replace(pair, name="other")  # with the same functions
    assert names(again >> dp.linear(3)) == ["linear_0", "tanh~0", "linear_1"]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [
    lambda f: replaced(f, -1.0), lambda f: replaced(dp.serial(f), -1.0),
    lambda f: dp.remat(replaced(f, -1.0))], ids=["repeat", "serial", "remat"])
def test_a_net_with_a_replaced_apply_generates_what_it_computes(wrap):
    wrapped = wrap(dp.repeat(2, dp.residual(dp.linear(4) >> jnp.tanh)))
    net = dp.serial(dp.embedding(7, 4), wrapped, dp.linear(7))
    params, state = trees(net, IDS)
    written = dp.text.generate(net, params, IDS, 4)
    assert written.tokens.tolist() == likeliest(net, params, state, IDS, 4)


INNER = dp.linear(4)


@pytest.mark.parametrize("layer", [
    dp.Layer(INNER.init, INNER.apply, children={"inside": INNER}, name="own"),
    replaced(dp.serial(inside=INNER), 2.0),
], ids=["without rebuild", "with a replaced apply"])
@pytest.mark.parametrize("wrap", [
    lambda f: f, dp.remat, dp.ema, lambda f: dp.repeat(2, f),
], ids=["alone", "remat", "ema", "repeat"])
def test_surgery_in_a_layer_that_cannot_be_rebuilt_is_refused_by_name(layer, wrap):
    net = dp.serial(at=wrap(layer))
    error = refused(dp.replace, net, "at/inside", dp.linear(4, bias=False))
    assert error.path == "at" and "another inside" in error.wants
    assert "another inside" in refused(dp.tap, net, "at/inside").wants
    dp.replace(net, "at", dp.linear(4))  # as a whole it can be exchanged
    assert "at" in str(dp.summary(net, X)) and dp.inspection.diagram(net, X)
