"""What is traced and compiled: no equation more than plain JAX has, and depth costs nothing."""

import collections
import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, equations

import diffprog as dp

pytestmark = pytest.mark.usefixtures("optimized")

# No equation more than plain JAX would have.

IMAGE = jax.random.normal(KEY, (2, 8, 8, 3))


def residual_block():
    return dp.residual(dp.serial(dp.batch_norm(), jax.nn.relu, dp.conv(4, 3)))


NET = dp.serial(
    dp.conv(4, 3), jax.nn.relu, dp.max_pool(2), residual_block(), dp.avg_pool(2),
    dp.dropout(0.5), dp.flatten(), dp.linear(5), dp.rms_norm(), dp.linear(3),
)


def tamed(x):
    """x times a power of two by which no square overflows, and the power, as norms have it."""
    largest = jnp.abs(jax.lax.stop_gradient(x)).max(-1, keepdims=True, initial=0)
    factor = 2.0**15 / jnp.maximum(jax.lax.reduce_precision(largest / 2, 8, 0), 2.0**15)
    return x * factor, factor


def scaled(eps, factor):
    return jnp.maximum(eps * factor * factor, jnp.finfo(jnp.float32).tiny)


def plain(params, state, x):
    """The same net, written by hand."""

    def conv(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", rhs_dilation=(1, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + p["bias"]

    def batch_norm(p, s, x):
        return (x - s["mean"]) * (jax.lax.rsqrt(s["var"] + 1e-5) * p["scale"]) + p["bias"]

    def rms_norm(p, x):
        x, factor = tamed(x)
        square = jnp.square(x).mean(-1, keepdims=True)
        return x * (jax.lax.rsqrt(square + scaled(1e-5, factor)) * p["scale"])

    def pool(x, start, combine):
        return jax.lax.reduce_window(
            x, np.float32(start), combine, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def linear(p, x):
        return x @ p["kernel"] + p["bias"]

    block, kept = params["residual_0"]["body"], state["residual_0"]["body"]
    x = pool(jax.nn.relu(conv(params["conv_0"], x)), -np.inf, jax.lax.max)
    y = jax.nn.relu(batch_norm(block["batch_norm_0"], kept["batch_norm_0"], x))
    x = x + conv(block["conv_0"], y)
    x = pool(x, 0, jax.lax.add) / 4
    x = x.reshape(x.shape[0], -1)
    x = rms_norm(params["rms_norm_0"], linear(params["linear_0"], x))
    return linear(params["linear_1"], x)


@pytest.mark.slow
def test_a_net_has_exactly_the_equations_of_plain_jax():
    trees = NET.init(KEY, IMAGE)
    ours = lambda params, state, x: NET(params, x, state=state)  # noqa: E731
    np.testing.assert_allclose(*(jax.jit(f)(*trees, IMAGE) for f in (ours, plain)), atol=1e-5)
    mine, theirs = (jax.make_jaxpr(f)(*trees, IMAGE) for f in (ours, plain))
    assert equations(mine.jaxpr) == equations(theirs.jaxpr)
    assert equations(mine.jaxpr)["conv_general_dilated"] == 2
    assert equations(mine.jaxpr)["max"] == 5  # two inside the jitted relu, three of the norm
    mine, theirs = (
        jax.make_jaxpr(jax.grad(lambda *args, f=f: jnp.sum(f(*args)), (0, 2)))(*trees, IMAGE)
        for f in (ours, plain))
    assert equations(mine.jaxpr) == equations(theirs.jaxpr)
    assert equations(mine.jaxpr)["conv_general_dilated"] == 6


# Where a derivative is written by hand, the compiled program is smaller than plain JAX's.

def instructions(f, *given):
    """How many instructions the optimized program of f has on CPU, those inside fusions too."""
    with on_cpu():
        text = jax.jit(f).lower(*given).compile().as_text()
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))


@pytest.mark.slow
def test_the_gradient_of_a_layer_norm_compiles_to_less_than_that_of_its_formula():
    def formula(p, x):
        x, factor = tamed(x)
        mean = x.mean(-1, keepdims=True)
        var = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + scaled(1e-5, factor)) * p["scale"] + p["bias"]

    def net(norm):
        """Six pre-norm blocks: in a deep net the mean's gradient is computed anew in each use."""

        def loss(params, x):
            for p in params:
                x = x + jnp.tanh(norm(p["norm"], x)) @ p["kernel"]
            return jnp.sum(x * x)

        return loss

    x = jax.ShapeDtypeStruct((4, 64, 32), jnp.float32)
    norm = dp.layer_norm()
    p = norm.plan(x).params
    block = {"norm": p, "kernel": jax.ShapeDtypeStruct((32, 32), jnp.float32)}

    alone = [instructions(f, p, x) for f in (lambda p, x: norm(p, x), formula)]
    assert alone[0] <= alone[1]
    slope = [instructions(jax.grad(lambda p, x, f=f: jnp.sum(f(p, x) * x), (0, 1)), p, x)
             for f in (norm, formula)]
    assert slope[0] <= 0.85 * slope[1], slope
    deep = [instructions(jax.grad(net(f), (0, 1)), [block] * 6, x) for f in (norm, formula)]
    assert deep[0] <= 0.85 * deep[1], deep


@pytest.mark.slow
def test_a_key_costs_nothing_where_nothing_is_random():
    net = dp.serial(dp.linear(4), dp.residual(dp.batch_norm()), dp.repeat(2, dp.linear(4)),
                    dp.heads(2, dp.linear(2)))
    x = jnp.ones((2, 4))
    trees = net.init(KEY, x)
    for train in (False, True):
        without, given = (
            jax.make_jaxpr(functools.partial(net.apply, key=key, train=train))(*trees, x)
            for key in (None, KEY))
        assert equations(given.jaxpr) == equations(without.jaxpr)
        assert equations(given.jaxpr)["scan"] == 1


# Depth costs nothing.

def lowered_gradient(net, x):
    params, state = jax.eval_shape(net.init, KEY, x)
    loss = lambda params, state, x: jnp.sum(net(params, x, state=state))  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(params, state, x)


def operations(lowered):
    return collections.Counter(re.findall(r"\b(?:stablehlo|func|chlo)\.\w+", lowered.as_text()))


@pytest.mark.slow
def test_the_program_of_repeat_does_not_grow():
    block = dp.residual(dp.serial(dp.layer_norm(), dp.linear(16), dp.gelu, dp.linear(16)))
    x = jax.ShapeDtypeStruct((2, 16), jnp.float32)
    few, many, unrolled = (
        operations(lowered_gradient(net, x))
        for net in (dp.repeat(6, block), dp.repeat(48, block), block**6))
    assert many == few
    assert few["stablehlo.while"] == 2  # forward and backward
    assert unrolled.total() > 2 * few.total()


@contextlib.contextmanager
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.slow
def test_a_repeated_convolution_has_no_loop_on_cpu():
    def loops(layer, x):
        with on_cpu():
            return len(re.findall(r"\bwhile\(", lowered_gradient(
                dp.repeat(3, layer), x).compile().as_text()))

    conv = dp.residual(dp.serial(dp.conv(2, 3), jnp.tanh))
    image = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
    assert loops(conv, image) == 0
    assert loops(dp.repeat(2, conv), image) == 0
    assert loops(dp.serial(dp.linear(2), jnp.tanh), image) == 2
