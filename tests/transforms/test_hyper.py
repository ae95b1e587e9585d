"""`hyper`: the formula in NumPy, the batch axis, initial values, and layers inside it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY, close, computes, drawn, same, spy

import diffprog as dp
from diffprog.core.parameters import fold
from diffprog.inspection.costs import flops
from diffprog.transforms.unroll import unrolled

X = jax.random.normal(jax.random.key(1), (5, 2))
CONDITION = jax.random.normal(jax.random.key(2), (5, 4))
BODY = dp.serial(dp.linear(6), jnp.tanh, out=dp.linear(3))
NET = dp.hyper(BODY, dp.linear(8) >> jnp.tanh)


def row(tree, i):
    return jax.tree.map(lambda a: a[i : i + 1], tree)


def tried(net, x=X, condition=CONDITION, **side):
    """The parameters and the jitted net, compiled once for these shapes."""
    params, _ = jax.jit(net.init)(KEY, x, condition=condition, **side)
    return params, jax.jit(net)


def each_leaf(f, params):
    """The target's tree with leaves ``f(kernel, bias)`` in NumPy."""
    if isinstance(params.get("bias"), jax.Array):
        return f(np.asarray(params["kernel"]), np.asarray(params["bias"]))
    return {name: each_leaf(f, own) for name, own in params.items()}


# The formula.

def linear_by_hand():
    """Parameters of ``hyper(linear(3), linear(4))``, x, the condition and y, all from NumPy."""
    x, condition = drawn(5, 2), drawn(5, 6, seed=1)
    a, b = drawn(6, 4, seed=2), drawn(4, seed=3)
    kernel, kernel_0 = drawn(4, 2, 3, seed=4), drawn(2, 3, seed=5)
    bias, bias_0 = drawn(4, 3, seed=6), drawn(3, seed=7)
    params = {"generator": {"kernel": a, "bias": b}, "target": {
        "kernel": {"kernel": kernel, "bias": kernel_0}, "bias": {"kernel": bias, "bias": bias_0}}}
    z = condition @ a + b
    y = np.einsum("bi,bh,hij->bj", x, z, kernel) + x @ kernel_0 + z @ bias + bias_0
    return params, x, condition, y


def conditioned(condition):
    return dp.program(f=dp.hyper(dp.linear(3), dp.linear(4)))(
        lambda layers, x: layers.f(x, condition=jnp.asarray(condition)))


@pytest.mark.slow
def test_each_example_has_its_own_parameters():
    params, x, condition, y = linear_by_hand()
    computes(conditioned(condition), {"f": params}, x, y)


def test_one_condition_is_shared_by_all_examples():
    params, x, condition, _ = linear_by_hand()
    z = condition[2] @ params["generator"]["kernel"] + params["generator"]["bias"]
    kernel, bias = (np.tensordot(z, params["target"][leaf]["kernel"], 1)
                    + params["target"][leaf]["bias"] for leaf in ("kernel", "bias"))
    computes(conditioned(condition[2]), {"f": params}, x, x @ kernel + bias)


@pytest.mark.slow
def test_the_target_alone_with_the_generated_parameters():
    params, net = tried(NET)
    y, alone = net(params, X, condition=CONDITION), jax.jit(BODY)
    features = NET.children["generator"](params["generator"], CONDITION)
    for i, z in enumerate(np.asarray(features)):
        own = each_leaf(lambda kernel, bias, z=z: np.tensordot(z, kernel, 1) + bias,
                        params["target"])
        close(row(y, i), alone(own, row(X, i)))
        close(net(params, X, condition=CONDITION[i]), BODY(own, X))


@pytest.mark.slow
def test_only_the_first_axis_of_x_is_the_batch():
    x = jnp.stack([X, 2 * X, 3 * X], 1)  # (5, 3, 2)
    params, net = tried(NET, x)
    y = net(params, x, condition=CONDITION)
    for i in range(3):
        close(y[:, i], net(params, x[:, i], condition=CONDITION))


@pytest.mark.slow
def test_a_condition_may_be_an_int():
    tasks = jnp.array([6, 0, 2, 2, 1])
    params, net = tried(dp.hyper(dp.linear(3), dp.embedding(7, 4)), condition=tasks)
    y = net(params, X, condition=tasks)
    for i, task in enumerate(tasks):
        close(y[i], net(params, X, condition=task)[i])


# Initial values.

@pytest.mark.slow
def test_initial_parameters_are_near_those_of_the_target():
    params, net = tried(dp.hyper(BODY, dp.linear(8), kernel_init="zeros"))
    biases = each_leaf(lambda kernel, bias: bias, params["target"])
    same(biases, jax.jit(BODY.init)(fold(KEY, "target"), X)[0])
    close(net(params, X, condition=CONDITION), BODY(biases, X))
    near, net = tried(NET)
    assert jax.tree.map(jnp.shape, near["target"]) == jax.tree.map(jnp.shape, params["target"])
    difference = net(near, X, condition=CONDITION) - BODY(biases, X)
    assert 0 < jnp.sqrt(jnp.mean(difference**2)) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("options", "scale"), [({}, 0.01), ({"kernel_init": "lecun_normal"}, 1)])
def test_the_variance_of_generated_parameters(options, scale):
    """For features of variance 1; a standard deviation of n numbers has error 1 / sqrt(2 n)."""
    z = drawn(4000)
    params, _ = tried(dp.hyper(dp.linear(50), lambda z: z, **options), jnp.ones((1, 40)),
                      jnp.asarray(z, jnp.float32))
    for leaf, fan_in in (("kernel", 40), ("bias", 1)):
        added = np.tensordot(z, params["target"][leaf]["kernel"], 1)
        assert abs(added.std() / np.sqrt(scale / fan_in) - 1) < 3 / np.sqrt(2 * added.size) + 0.03


@pytest.mark.slow
def test_a_scalar_parameter_is_generated():
    gain = dp.stateless(lambda key, x: {"gain": jnp.ones(())}, lambda params, x: params["gain"] * x)
    params, net = tried(dp.hyper(gain, lambda z: z))
    kernel = params["target"]["gain"]["kernel"]
    close(net(params, X, condition=CONDITION), X * (1 + CONDITION @ kernel)[:, None])


# Layers inside and wrappers around.

@pytest.mark.slow
def test_examples_draw_different_noise():
    net = dp.hyper(dp.linear(40) >> dp.dropout(0.5), dp.linear(3))
    assert net.random and not NET.random
    params, _ = tried(net)
    y, _ = net.apply(params, {}, X, key=KEY, train=True, condition=CONDITION)
    dropped = np.asarray(y) == 0
    assert 0.3 < dropped.mean() < 0.7
    assert all((dropped[i] != dropped[j]).any() for i in range(5) for j in range(i))


@pytest.mark.slow
def test_the_generator_may_have_state_and_side_inputs():
    mask = jnp.array([[True] * 3, [True, True, False], *[[True, False, False]] * 3])
    steps = jax.random.normal(KEY, (5, 3, 4))
    net = dp.hyper(dp.linear(3), dp.serial(dp.batch_norm(), dp.collapse("mean")))
    assert net.side == {"condition", "mask", "segments"}
    params, state = jax.jit(net.init)(KEY, X, condition=steps, mask=mask)
    assert list(params) == ["generator", "target"] and list(state) == ["generator"]
    step = jax.jit(net.apply, static_argnames="train")
    first, second = (step(params, state, X, train=True, condition=c, mask=mask)
                     for c in (steps, jnp.where(mask[..., None], steps, 9.0)))
    same(first, second)
    assert np.abs(first[1]["generator"]["batch_norm_0"]["mean"]).min() > 1e-3


@pytest.mark.slow
def test_side_inputs_of_the_target_are_mapped_with_their_examples():
    mask = jnp.array([[True, True, False], [True, False, False]])
    x, conditions = jax.random.normal(KEY, (2, 3, 4)), CONDITION[:2]
    params, net = tried(dp.hyper(dp.self_attention(2), lambda z: z), x, conditions, mask=mask)
    y = net(params, x, condition=conditions, mask=mask)
    for i in range(2):
        close(row(y, i), net(params, row(x, i), condition=conditions[i], mask=row(mask, i)))


@pytest.mark.slow
def test_a_hypernetwork_may_generate_another():
    params, net = tried(dp.hyper(dp.hyper(dp.linear(3), dp.linear(2)), lambda z: z))
    assert "target/target/kernel/kernel/kernel" in dp.tree.paths(params)
    y = net(params, X, condition=CONDITION)
    for i in range(2):
        close(row(y, i), net(params, row(X, i), condition=CONDITION[i]))


@pytest.mark.slow
def test_a_stream_generates_the_parameters_once():
    seen = []
    net = dp.hyper(dp.conv(3, 2, dims=1, padding="CAUSAL"), spy(seen))
    x = jax.random.normal(KEY, (5, 4, 3))
    for condition in (CONDITION, CONDITION[0]):
        params, whole = tried(net, x, condition)
        wanted = whole(params, x, condition=condition)
        state = net.start(params, {}, x[:, :1], length=4, condition=condition)
        seen.clear()
        step = jax.jit(net.apply)
        for t in range(4):
            y, state = step(params, state, x[:, t : t + 1])
            close(y, wanted[:, t : t + 1])
        assert not seen


@pytest.mark.slow
def test_under_mixed_parameters_are_generated_in_the_narrow_dtype():
    net = dp.mixed(NET, jnp.bfloat16)
    params, run = tried(net)
    same(params, tried(NET)[0])
    y = run(params, X, condition=CONDITION)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, NET(params, X, condition=CONDITION), atol=0.05)
    text = str(jax.make_jaxpr(lambda p, x, c: net(p, x, condition=c))(params, X, CONDITION))
    assert "= dot_general" in text and not re.search(r"f32\[[\d,]+\] = dot_general", text)


@pytest.mark.slow
def test_copies_in_repeat_have_their_own_generators():
    one = dp.hyper(dp.linear(2) >> jnp.sin, lambda z: z)
    params, net = tried(dp.repeat(3, dp.remat(one)))
    assert params["target"]["linear_0"]["kernel"]["kernel"].shape == (3, 4, 2, 2)
    y = X
    for i in range(3):
        y = one(jax.tree.map(lambda a, i=i: a[i], params), y, condition=CONDITION)
    close(net(params, X, condition=CONDITION), y)


@pytest.mark.slow
def test_it_learns_a_map_that_depends_on_the_condition():
    """Rotations of the plane by an angle per example."""
    angle, x = jnp.linspace(-3, 3, 64), jax.random.normal(KEY, (64, 2))
    turns = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    batch = {"x": x, "y": jnp.einsum("ijb,bj->bi", turns, x), "condition": angle[:, None]}
    net = dp.hyper(dp.linear(2), dp.linear(16) >> jnp.tanh)
    step = dp.make_step(net, dp.regression(), optax.adam(0.03))
    fit = dp.fit(step, [batch], key=KEY, steps=300, log_every=100, progress=False)
    assert fit.history[-1]["loss"] < 0.01 * float(jnp.var(batch["y"]))


def test_the_summary_counts_flops_and_parameters():
    params, _ = tried(NET)
    for condition in (CONDITION, CONDITION[0]):
        table = dp.summary(NET, X, condition=condition)
        run = lambda p, x, c: NET(p, x, condition=c)  # noqa: E731
        assert table.flops == flops(run, params, X, condition)
        assert table.parameters == dp.tree.count(params)


def test_unrolling_leaves_it_unchanged():
    net = dp.hyper(dp.repeat(2, dp.linear(2)), dp.linear(3))
    assert unrolled(net)[0] is net


@pytest.mark.slow
def test_replace_and_tap_reach_both_layers():
    net = dp.replace(dp.serial(NET, NET), "*/target/linear_0", dp.linear(7))
    other = dp.hyper(dp.serial(dp.linear(7), jnp.tanh, out=dp.linear(3)), dp.linear(8) >> jnp.tanh)
    assert repr(net) == repr(dp.serial(other, other))
    net = dp.tap(NET, "generator/linear_0")
    params, _ = tried(NET)
    y, seen = net(params, X, condition=CONDITION)
    close(y, NET(params, X, condition=CONDITION))
    close(jnp.tanh(seen["generator/linear_0"]), NET.children["generator"](
        params["generator"], CONDITION))
