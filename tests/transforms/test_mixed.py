"""`mixed`: dtypes of computation, parameters and state, and nesting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from support.comparing import KEY, X, gradient, params_of, same, spy

import diffprog as dp
from diffprog.core.plans import spec

BF16 = jnp.bfloat16
BODY = dp.residual(dp.serial(dp.linear(6), jnp.tanh, dp.linear(4)))


def rounded(tree):
    return jax.tree.map(lambda a: a.astype(BF16), tree)


@pytest.mark.slow
def test_it_equals_the_layer_on_rounded_parameters_and_inputs():
    net = dp.mixed(BODY, BF16)
    params = params_of(net)
    same(params, params_of(BODY))
    wanted = BODY(rounded(params), X.astype(BF16))
    same(net(params, X), wanted.astype(jnp.float32))
    # Layers get float32 and cast it themselves, so that gradients are summed in float32.
    same(gradient(net, params), gradient(
        lambda p, x: BODY(p, x.astype(BF16)).astype(jnp.float32), params))


def test_inner_layers_compute_in_the_narrow_dtype():
    seen = []
    net = dp.mixed(dp.serial(dp.linear(3), spy(seen)), BF16)
    params = params_of(net)  # init calls the layers in the dtype of x
    seen.clear()
    y = net(params, X)
    assert {x.dtype for x in seen} == {jnp.dtype(BF16)} and y.dtype == jnp.float32
    text = str(jax.make_jaxpr(net)(params_of(net), X))
    assert "dot_general" in text and "bf16[3,3] = dot_general" in text


def test_gradients_have_the_dtype_of_the_parameters():
    net = dp.mixed(BODY, BF16)
    grads = gradient(net, params_of(net))
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_small_updates_are_not_lost():
    """bfloat16 cannot hold 1.001; parameters stored in float32 can."""
    net = dp.mixed(dp.linear(1, bias=False, kernel_init="ones"), BF16)
    params = params_of(net)
    moved = optax.apply_updates(params, jax.tree.map(lambda a: 1e-3 * jnp.ones_like(a), params))
    assert np.all(np.asarray(moved["kernel"]) > 1.0009)


def test_statistics_keep_their_dtype():
    net = dp.mixed(dp.linear(4) >> dp.batch_norm(), BF16)
    params, state = net.init(KEY, X)
    _, after = net.apply(params, state, X, train=True)
    assert {a.dtype for a in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
    # The change of the mean is below the precision of bfloat16, so it was never rounded.
    plain = (dp.linear(4) >> dp.batch_norm()).apply(rounded(params), state, X.astype(BF16),
                                                    train=True)
    same(after, plain[1])


@pytest.mark.slow
def test_caches_are_narrow_and_statistics_are_not():
    net = dp.mixed(dp.serial(dp.batch_norm(), dp.conv(3, 2, dims=1, padding="CAUSAL")), BF16)
    x = jax.random.normal(KEY, (2, 4, 3))
    params, state = net.init(KEY, x)
    state = net.start(params, state, x[:, :1], length=4)
    dtypes = {path: leaf.dtype for path, leaf in dp.tree.paths(state).items()}
    assert dtypes == {"batch_norm_0/mean": jnp.float32, "batch_norm_0/var": jnp.float32,
                      "conv_0/past": BF16, "conv_0/segment": jnp.int32}
    _, after = net.apply(params, state, x[:, :1])
    assert {path: leaf.dtype for path, leaf in dp.tree.paths(after).items()} == dtypes


@pytest.mark.slow
def test_it_nests_with_repeat_in_any_order():
    plain = dp.repeat(3, BODY)
    inside, outside = dp.repeat(3, dp.mixed(BODY, BF16)), dp.mixed(plain, BF16)
    params = params_of(plain)
    same(params_of(inside), params)
    same(params_of(outside), params)
    unrolled = X
    for i in range(3):
        own = rounded(jax.tree.map(lambda a, i=i: a[i], params))
        unrolled = BODY(own, unrolled.astype(BF16)).astype(jnp.float32)
    # XLA may skip roundings between operations: equal up to one unit in the last place.
    unit = float(jnp.finfo(BF16).eps)
    for net in (inside, outside):
        np.testing.assert_allclose(net(params, X), unrolled, rtol=unit, atol=unit)


@pytest.mark.parametrize("x", [
    jnp.arange(6).reshape(3, 2), (jnp.arange(3), jnp.ones((3, 2), jnp.float16)),
], ids=["ints", "pair"])
def test_outputs_have_the_dtype_of_x(x):
    def last(x):
        return jax.tree.leaves(x)[-1].astype(BF16) * 2

    floats = [a.dtype for a in jax.tree.leaves(x) if a.dtype == jnp.float16]
    wanted = floats[0] if floats else jnp.dtype(jnp.float32)
    net = dp.mixed(last, BF16)
    assert net({}, x).dtype == net.plan(x).y.dtype == wanted


def test_float_side_inputs_are_cast_and_integers_are_not():
    seen = {}

    def forward(params, x, *, positions=None, condition=None):
        seen.update(positions=positions.dtype, condition=condition.dtype)
        return x, positions

    net = dp.mixed(dp.stateless(None, forward), BF16)
    y, positions = net({}, X, positions=jnp.arange(3), condition=jnp.ones(3))
    assert seen == {"positions": jnp.int32, "condition": BF16}
    assert (y.dtype, positions.dtype) == (jnp.float32, jnp.int32)


def test_kind_and_children_stay():
    net = dp.serial(dp.linear(4), dp.mixed(dp.linear(4), BF16), dp.mixed(BODY, "bfloat16"))
    assert list(net.children) == ["linear_0", "linear_1", "residual_0"]
    assert repr(dp.mixed(dp.linear(4), BF16)) == "mixed(linear(4), jnp.bfloat16)"


# Custom layers.


def forward(params, x):
    return params["scale"] * x


SCALING = dp.stateless(lambda key, x: {"scale": jnp.ones(x.shape[-1])}, forward)


def noting(seen, **settings):
    """A layer that notes the dtypes of its parameters."""
    def noted(params, x):
        seen.add(params["scale"].dtype)
        return params["scale"].astype(x.dtype) * x

    return dp.stateless(lambda key, x: {"scale": jnp.ones(x.shape[-1])}, noted, **settings)


def composed(inner):
    """A custom layer that reads the parameters of its child."""
    return dp.Layer(
        lambda key, x: ({"inner": inner.init(key, x)[0]}, {}),
        lambda params, state, x, **_: (x * params["inner"]["scale"], state),
        children={"inner": inner}, name="composed")


@pytest.mark.parametrize("around", [
    dp.residual, lambda f: dp.repeat(2, f), lambda f: dp.repeat(2, dp.residual(f)),
    lambda f: dp.repeat(2, f, remat=True), lambda f: dp.remat(f) >> f,
    lambda f: dp.residual(dp.ema(f)),
    lambda f: dp.residual(dp.freeze(f)), lambda f: dp.residual(composed(f)),
    lambda f: dp.fixed_point(dp.parallel(f, jnp.sin) >> (lambda pair: pair[0] / 4 + pair[1]),
                             tolerance=0.05),
], ids=["residual", "repeat", "repeat of residual", "repeat with remat", "remat", "ema", "freeze",
        "composed", "fixed_point"])
def test_the_plan_has_the_dtypes_of_the_call(around):
    """With float32 parameters the layer would return float32, and `residual` would raise."""
    net = dp.mixed(around(SCALING), BF16)
    params, state = net.init(KEY, X)
    y, after = net.apply(params, state, X)
    assert y.dtype == net.plan(X).y.dtype == jnp.float32
    assert spec(after) == spec(state)
    np.testing.assert_allclose(y, around(SCALING)(params, X, state=state), atol=0.1)


@pytest.mark.parametrize("around", [
    lambda f: f, lambda f: dp.serial(f), lambda f: dp.repeat(2, f), lambda f: dp.heads(2, f),
    lambda f: dp.ensemble(2, f), lambda f: dp.remat(f), lambda f: dp.ema(f),
    lambda f: dp.linearize(f), lambda f: dp.tap(dp.serial(f), "*"), lambda f: dp.mixed(f, BF16),
    lambda f: dp.reparam(f, lambda key, w: {"half": w / 2}, lambda tree: 2 * tree["half"], "scale"),
], ids=["alone", "serial", "repeat", "heads", "ensemble", "remat", "ema", "linearize", "tap",
        "mixed", "reparam"])
@pytest.mark.parametrize("casts", [False, True])
def test_a_layer_gets_parameters_in_dtype_unless_it_casts_them_itself(around, casts):
    seen = set()
    net = dp.mixed(around(noting(seen, casts=casts)), BF16)
    params, state = net.init(KEY, X)
    seen.clear()
    jax.eval_shape(net.apply, params, state, X)
    assert seen == {jnp.dtype(jnp.float32 if casts else BF16)}


@pytest.mark.slow
@pytest.mark.parametrize("net", [
    dp.serial(dp.linear(4)), dp.repeat(1, dp.linear(4)), dp.linear(4),
], ids=repr)
def test_a_layer_with_a_replaced_apply_keeps_it(net):
    """An apply from `dataclasses.replace` stays inside `mixed`."""
    def doubled(params, state, x, **given):
        y, state = net.apply(params, state, x, **given)
        return 2 * y, state

    other = dp.mixed(dataclasses.replace(net, apply=doubled), BF16)
    params, _ = other.init(KEY, X)
    np.testing.assert_allclose(other(params, X), 2 * net(params, X), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_a_program_reads_parameters_in_dtype():
    seen = {}

    @dp.program(embed=dp.embedding(5, 4), own=SCALING, inner=dp.serial(up=dp.linear(4)))
    def net(layers, x):
        y = layers.inner(layers.own(layers.embed(x)))
        seen.update(embed=layers.embed.params["embedding"].dtype,
                    own=layers.own.params["scale"].dtype,
                    inner=layers.inner.params["up"]["kernel"].dtype)
        return dp.unembed(layers.embed.params, y)

    ids = jnp.arange(3)
    for narrow in (dp.mixed(net, BF16), dp.tap(dp.mixed(net, BF16), "inner/up"),
                   dp.mixed(dp.tap(net, "inner/up"), BF16), dp.mixed(dp.remat(net), BF16)):
        params = narrow.init(KEY, ids)[0]
        seen.clear()
        narrow(params, ids)
        assert set(seen.values()) == {jnp.dtype(BF16)} and len(seen) == 3
    net(params, ids)
    assert set(seen.values()) == {jnp.dtype(jnp.float32)}


def test_inside_another_it_keeps_its_own_dtype():
    seen = []
    net = dp.mixed(dp.serial(spy(seen), dp.mixed(dp.serial(dp.linear(4), spy(seen)), jnp.float32),
                             spy(seen)), BF16)
    params = params_of(net)
    seen.clear()
    net(params, X)
    assert [x.dtype for x in seen] == [BF16, jnp.float32, BF16]
    # The parameters of the inner one are not rounded.
    exact = dp.mixed(dp.mixed(dp.linear(4), jnp.float32), BF16)
    params = params_of(exact)
    x = X.astype(BF16).astype(jnp.float32)
    same(exact(params, x), dp.linear(4)(params, x).astype(BF16).astype(jnp.float32))


def test_averages_are_of_the_stored_parameters():
    """An average of rounded weights would have their rounding errors."""
    net = dp.mixed(dp.ema(dp.serial(dp.linear(4), SCALING)), BF16)
    params, state = net.init(KEY, X)
    params = jax.tree.map(lambda a: a + 1.003, params)
    _, state = net.apply(params, state, X, train=True)
    for path in ("kernel", "bias"):
        same(state["#ema"]["linear_0"][path]["average"], params["linear_0"][path])
    same(state["#ema"]["forward_0"]["scale"]["average"], params["forward_0"]["scale"])


def test_a_small_difference_of_parameters_is_not_rounded_in_linearize():
    net = dp.mixed(dp.linearize(dp.linear(1, kernel_init="ones")), BF16)
    params, state = net.init(KEY, jnp.ones((1, 1)))
    moved = jax.tree.map(lambda a: a + 1e-3, params)
    change = jax.jvp(lambda p: net(p, jnp.ones((1, 1)), state=state), (params,), (
        jax.tree.map(jnp.subtract, moved, params),))[1]
    np.testing.assert_allclose(change, 2e-3, rtol=0.01)


def test_the_outputs_of_copies_are_tapped():
    net = dp.tap(dp.mixed(dp.repeat(2, dp.serial(a=dp.linear(4), b=jnp.tanh)), BF16), "a")
    params, _ = net.init(KEY, X)
    _, seen = net(params, X)
    assert seen["a"].shape == (2, *X.shape) and seen["a"].dtype == jnp.float32


def test_replace_inside_mixed():
    net = dp.replace(dp.mixed(dp.serial(a=dp.linear(4), b=SCALING), BF16), "a",
                     dp.linear(4, bias=False))
    assert repr(net).startswith("mixed(serial(a=linear(4, bias=False), b=")
    params = params_of(net)
    assert set(params["a"]) == {"kernel"} and net(params, X).dtype == jnp.float32


def test_a_layer_inside_a_custom_layer_is_tapped():
    def composed_of(children):
        layer = composed(children["inner"])
        return dataclasses.replace(layer, rebuild=composed_of)

    plain = dp.serial(whole=composed_of({"inner": SCALING}))
    for net in (dp.tap(dp.mixed(plain, BF16), "whole"), dp.mixed(dp.tap(plain, "whole"), BF16)):
        y, seen = net(params_of(net), X)
        same(seen["whole"], y)
        same(y, X.astype(BF16).astype(jnp.float32))


@pytest.mark.slow
def test_training_in_bfloat16_is_as_accurate_as_in_float32():
    """Digits, the mean of five seeds: within half a point."""
    images, labels = load_digits(return_X_y=True)
    images, labels = np.float32(images / 16), np.int32(labels)
    training, held_out = (images[:1437], labels[:1437]), (images[1437:], labels[1437:])

    def accuracy(net):
        step = dp.make_step(net, dp.classification(), optax.adam(3e-3))
        found = []
        for seed in range(5):
            fit = dp.fit(step, dp.batches(training, 64, seed=seed), steps=400, log_every=400,
                         key=jax.random.key(seed), progress=False)
            found.append(dp.evaluate(step, fit.state, [held_out])["accuracy"])
        return np.mean(found)

    net = dp.models.mlp([64, 64], 10)
    exact, rounded = accuracy(net), accuracy(dp.mixed(net, jnp.bfloat16))
    assert exact > 0.9 and abs(exact - rounded) <= 0.005
