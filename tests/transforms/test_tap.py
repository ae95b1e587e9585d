"""`tap`: activations by path, through every combinator."""

import jax
import jax.numpy as jnp
import pytest
from support.comparing import KEY, X, close, equal, gradient, params_of, same
from support.refusing import expect

import diffprog as dp

BLOCK = dp.residual(dp.serial(dp.linear(4), jnp.tanh))


def copy(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


def test_activations_of_a_chain():
    net = dp.serial(dp.linear(5), jnp.tanh, body=dp.serial(dp.linear(4), jax.nn.relu))
    params = params_of(net)
    y, seen = dp.tap(net, "**")(params, X)
    first = X @ params["linear_0"]["kernel"] + params["linear_0"]["bias"]
    inner = params["body"]["linear_0"]
    second = jnp.tanh(first) @ inner["kernel"] + inner["bias"]
    close(seen, {"linear_0": first, "tanh~0": jnp.tanh(first), "body/linear_0": second,
                 "body/relu~0": jax.nn.relu(second), "body": jax.nn.relu(second)})
    same(y, net(params, X))


def wrapped(name):
    return {
        "repeat": dp.repeat(3, BLOCK), "remat of repeat": dp.remat(dp.repeat(3, BLOCK)),
        "repeat of remat": dp.repeat(3, BLOCK, remat=True),
        "mixed": dp.mixed(dp.repeat(3, BLOCK), jnp.float32),
        "unrolled": dp.repeat(3, BLOCK, unroll=3),
    }[name]


@pytest.mark.parametrize("name", ["repeat", "remat of repeat", "repeat of remat", "mixed",
                                  "unrolled"])
def test_activations_inside_repeat_equal_a_loop(name):
    net = wrapped(name)
    params = params_of(net)

    def loop(params, x):
        seen = []
        for i in range(3):
            seen.append(BLOCK.children["body"](copy(params, i)["body"], x))
            x = x + seen[-1]
        return x, {"body/tanh~0": jnp.stack(seen)}

    tapped = dp.tap(net, "**/tanh~0")
    close(jax.jit(tapped)(params, X), loop(params, X))
    # Gradients flow through activations, so that a loss may use them.
    far = lambda f: lambda p, x: f(p, x)[1]["body/tanh~0"] * jnp.arange(1.0, 4)[:, None, None]  # noqa: E731
    close(gradient(far(tapped), params), gradient(far(loop), params))


@pytest.mark.parametrize("wrap", [dp.heads, dp.ensemble])
def test_activations_of_copies(wrap):
    net = wrap(2, dp.serial(dp.linear(3), jnp.tanh))
    params = params_of(net)
    y, seen = dp.tap(net, "linear_0")(params, X)
    wanted = jnp.stack([dp.linear(3)(copy(params, i)["linear_0"], X) for i in range(2)])
    close(seen, {"linear_0": wanted})
    same(y, net(params, X))


@pytest.mark.slow
def test_the_returned_state_is_that_of_the_net():
    net = dp.serial(dp.batch_norm(), dp.repeat(2, dp.batch_norm() >> jnp.tanh), dp.dropout(0.5))
    params, state = net.init(KEY, X)
    tapped = dp.tap(net, "**")
    same(tapped.init(KEY, X), (params, state))
    for options in ({}, {"train": True, "key": KEY}):
        (y, seen), after = tapped.apply(params, state, X, **options)
        same((y, after), net.apply(params, state, X, **options))
        assert set(seen) == {"batch_norm_0", "repeat_0", "repeat_0/batch_norm_0",
                             "repeat_0/tanh~0", "dropout~0"}
        same(seen["dropout~0"], y)


def test_structured_activations():
    net = dp.serial(pair=dp.branch(dp.linear(2), jnp.sin), join=dp.concatenate)
    _, seen = dp.tap(net, "pair")(params_of(net), X)
    assert [a.shape for a in seen["pair"]] == [(3, 2), (3, 4)]


@pytest.mark.slow
def test_activations_of_a_stream():
    causal = dp.conv(3, 2, dims=1, padding="CAUSAL")

    @dp.program(f=causal, g=dp.linear(3))
    def twice(layers, x):
        return layers.f(layers.g(layers.f(x)))

    net = dp.tap(dp.serial(dp.repeat(2, causal >> jnp.tanh), twice, dp.batch_norm()), "**/conv_0")
    x = jax.random.normal(KEY, (2, 4, 3))
    params, state = net.init(KEY, x)
    whole, seen = jax.jit(net)(params, x, state=state)
    now = net.start(params, state, x[:, :1], length=4)
    parts, apply = [], jax.jit(net.apply)
    for t in range(0, 4, 2):
        y, now = apply(params, now, x[:, t : t + 2])
        parts.append(y)
    joined = jax.tree.map(lambda *a: jnp.concatenate(a, -2), *parts)
    close(joined, (whole, seen))
    assert "#" not in str(jax.tree.structure(now))


def test_a_layer_called_several_times_raises():
    @dp.program(f=dp.serial(dp.linear(4), jnp.tanh))
    def twice(layers, x):
        return layers.f(layers.f(x))

    for pattern in ("f", "f/tanh~0"):
        net = dp.tap(twice, pattern)
        expect("", f"{net!r}: wants one call of {pattern}, got 2 calls; tap a layer around it, or "
                   "use a separate layer for each call", net.init, KEY, X)
    # A layer around it may be tapped.
    _, seen = dp.tap(dp.serial(twice, dp.linear(2)), "twice_0")(
        params_of(dp.serial(twice, dp.linear(2))), X)
    assert set(seen) == {"twice_0"}


def test_a_layer_called_only_in_training_raises_in_inference():
    @dp.program(f=dp.linear(4), noise=dp.linear(4))
    def net(layers, x, *, train):
        return layers.f(x) + (layers.noise(x) if train else 0)

    tapped = dp.tap(net, "*")
    params, state = tapped.init(KEY, X)
    (_, seen), _ = tapped.apply(params, state, X, train=True)
    assert set(seen) == {"f", "noise"}
    expect("", f"{tapped!r}: wants a call of noise, got none with train=False; tap a layer that is "
               "called in both modes", tapped, params, X)


def test_plan_kind_and_repr():
    net = dp.tap(dp.repeat(3, BLOCK), "body")
    assert net.name == "repeat" and repr(net) == f"tap(repeat(3, {BLOCK!r}), 'body')"
    y, seen = net.plan(X).y
    assert y.shape == (3, 4) and seen["body"].shape == (3, 3, 4)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_unused_activations_are_not_computed():
    """A tapped net whose activations are not used compiles to the program of the net."""
    net = dp.serial(dp.linear(5), jnp.tanh, dp.linear(2))
    params = params_of(net)
    texts = [jax.jit(f).lower(params, X).compile().as_text().count("fusion(")
             for f in (net, lambda p, x: dp.tap(net, "**")(p, x)[0])]
    assert texts[0] == texts[1]


def test_taps_with_the_same_pattern_are_independent():
    inner = dp.tap(dp.serial(a=dp.linear(4)), "**/a")
    net = dp.tap(dp.serial(inner=inner, first=lambda pair: pair[0]), "**/a")
    params = params_of(net)
    y, seen = net(params, X)
    assert set(seen) == {"inner/a"} and equal(seen["inner/a"], y)
    assert equal(net.apply(params, {}, X)[0][0], inner(params["inner"], X)[1]["a"])


def test_nested_taps():
    net = dp.tap(dp.tap(dp.serial(a=dp.linear(4), b=dp.linear(3)), "a"), "b")
    (y, first), second = net(params_of(net), X)
    assert set(first) == {"a"} and set(second) == {"b"} and equal(second["b"], y)
