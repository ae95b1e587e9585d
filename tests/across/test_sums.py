"""In 16 bits a gradient is summed in float32: what is used many times is cast where it is used.

Inputs, weights and cotangents are small integers, so that almost all that is computed is exact, and
each parameter is used 4096 times: in bfloat16 a sum of ones stops at 256, in float16 at 2048. The
reference is a float32 run of the same net.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from support.comparing import KEY, spy

import diffprog as dp
from diffprog.layers.embedding import leading_token

BF16, F16 = jnp.bfloat16, jnp.float16


def small(tree, least=1):
    """The tree with small integers, drawn for each size of a leaf, in the place of ones."""
    def one(leaf):
        whole = np.random.default_rng(leaf.size).integers(least, 4, leaf.shape)
        return jnp.asarray(whole, leaf.dtype) * jnp.sign(leaf) if jnp.issubdtype(
            leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


def drawn(params):
    """Parameters that are small integers, some of them negative."""
    return small(jax.tree.map(jnp.ones_like, params), -1)


def ones(*shape):
    return jnp.ones(shape, jnp.float32)


def gradient(net, params, state, x, batched=False):
    """That of the parameters, of a sum in which every third output has weight 1/32, others 1/64."""
    def loss(params):
        run = lambda x: net(params, x, state=state)  # noqa: E731
        y = (jax.vmap(run) if batched else run)(x).astype(jnp.float32)
        return (y * (1 + (jnp.arange(y.size).reshape(y.shape) % 3 == 0)) / 64).sum()

    return jax.jit(jax.grad(loss))(params)


def agrees(found, wanted):
    """Assert that all leaves are equal to 1 % of the largest norm."""
    largest = max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(wanted))
    assert largest > 2100 / 64
    for path, leaf in dp.tree.paths(found).items():
        apart = float(jnp.linalg.norm(leaf - dp.tree.paths(wanted)[path]))
        assert leaf.dtype == jnp.float32 and apart <= 0.01 * largest, (path, leaf, wanted)


@dp.program(embed=dp.embedding(2, 3), body=dp.linear(3))
def tied(layers, x):
    y = layers.body(layers.embed(x))
    return dp.unembed(layers.embed.params, y)


@functools.partial(dp.stateless, lambda key, x: {"scale": jnp.ones(x.shape[-1])}, casts=True)
def careful(params, x):
    """A layer of one's own, as the docstring of `mixed` says it."""
    return jnp.broadcast_to(params["scale"], x.shape).astype(x.dtype) * x


IMAGES, IDS = ones(16, 16, 16, 2), jnp.arange(4096).reshape(16, 16, 16) % 2
LAYERS = {
    "linear": (dp.linear(3), IMAGES),
    "bilinear": (dp.bilinear(3), (IMAGES, IMAGES)),
    "conv": (dp.conv(3, 3), IMAGES),
    "conv_transpose": (dp.conv_transpose(3, 2, stride=2), IMAGES),
    "depthwise_conv": (dp.depthwise_conv(1, multiplier=2), IMAGES),
    "embedding": (dp.embedding(2, 3), IDS),
    "tied": (tied, IDS),
    "learned_positions": (dp.learned_positions(1), ones(16, 256, 1, 2)),
    "prelu": (dp.prelu(), -IMAGES),
    "prelu of one slope": (dp.prelu(shared=True), -IMAGES),
    "layer_norm": (dp.layer_norm(), IMAGES),
    "rms_norm": (dp.rms_norm(), IMAGES),
    "group_norm": (dp.group_norm(1, dims=0), IMAGES),
    "batch_norm": (dp.batch_norm(), IMAGES),
    "ffn": (dp.ffn(2), IMAGES),
    "self_attention": (dp.self_attention(1), ones(16, 256, 2, 2)),
    "a layer of one's own": (careful, IMAGES),
    "glu": (dp.glu(2, kernel_init="zeros"), IMAGES),
    "a token before all": (leading_token(), ones(4096, 1, 2)),
    "lora": (dp.lora(dp.linear(3), 2), IMAGES),
    "reparam": (dp.reparam(dp.linear(3), lambda key, w: {"half": w / 2},
                           lambda tree: 2 * tree["half"]), IMAGES),
    "heads": (dp.heads(2, dp.linear(3)), IMAGES),
    "repeat of convolutions": (dp.repeat(2, dp.residual(dp.conv(2, 1))), IMAGES),
}


@functools.cache
def in_float32(name):
    """Parameters, state and input of a layer, and the gradient in float32."""
    net, x = LAYERS[name]
    x = small(x)
    params, state = net.init(KEY, x)
    params = drawn(params)
    return params, state, x, gradient(net, params, state, x)


@pytest.mark.parametrize(("dtype", "batched"), [(BF16, False), (BF16, True), (F16, False)],
                         ids=["bfloat16", "bfloat16, vmap", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_parameters_that_are_used_many_times(name, dtype, batched):
    params, state, x, wanted = in_float32(name)
    agrees(gradient(dp.mixed(LAYERS[name][0], dtype), params, state, x, batched), wanted)


@pytest.mark.parametrize("name", ["linear", "conv", "prelu", "ffn"])
def test_an_input_in_16_bits_alone(name):
    """Parameters are stored in float32 without `mixed` as well."""
    params, state, x, wanted = in_float32(name)
    agrees(gradient(LAYERS[name][0], params, state, x.astype(BF16), True), wanted)


TIME = ones(1, 4096, 2)
# A cell that carries something, and hands x on as it is.
PASSING = dp.Layer(lambda key, x: ({}, {}), lambda params, state, x, **_: (x, state),
                   lambda params, state, x, *, length: {"none": jnp.zeros(x.shape[:1])}, bare=True)
CELLS = {"simple_rnn": dp.simple_rnn(2, activation=lambda x: x), "gru": dp.gru(2),
         "lstm": dp.lstm(2), "a chain": dp.serial(dp.linear(2), dp.prelu(), PASSING),
         "computed": dp.weight_norm(dp.linear(2)) >> PASSING,
         "a layer of one's own": dp.stateless(
             lambda key, x: {"scale": jnp.ones(2)},
             lambda params, x: params["scale"] * x) >> PASSING}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [
    pytest.param(BF16, id="bfloat16"),
    pytest.param(F16, id="float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("gru", "lstm"))) for name in CELLS])
def test_recurrences(name, dtype):
    """With weights of zero a gate is 1/2 and what is carried stays 0, in any dtype."""
    net = dp.recurrent(CELLS[name])
    params, _ = net.init(KEY, TIME)
    held = {"gru", "lstm", "simple_rnn"}
    params = jax.tree.map(jnp.zeros_like, params) if name in held else jax.tree.map(
        jnp.ones_like, params)
    agrees(gradient(dp.mixed(net, dtype), params, {}, TIME), gradient(net, params, {}, TIME))


@pytest.mark.slow
def test_parameters_that_a_hypernetwork_writes():
    """One task: what is written is used by all examples, as a stored parameter is."""
    net = dp.hyper(dp.linear(2), jnp.tanh)
    x, told = IMAGES, jnp.full(1, 20.0)  # whose tanh is 1
    params = drawn(net.init(KEY, x, condition=told)[0])
    total = lambda net: jax.jit(jax.grad(  # noqa: E731
        lambda p: net(p, x, condition=told).sum() / 64))(params)
    agrees(total(dp.mixed(net, BF16)), total(net))


@pytest.mark.slow
def test_a_recurrence_both_ways():
    net = dp.mixed(dp.recurrent(dp.gru(2), bidirectional=True), BF16)
    params = jax.tree.map(jnp.zeros_like, net.init(KEY, TIME)[0])
    plain = dp.recurrent(dp.gru(2), bidirectional=True)
    agrees(gradient(net, params, {}, TIME), gradient(plain, params, {}, TIME))


def reading(params, x, *, memory):
    return x + memory


@pytest.mark.parametrize(("around", "x", "times"), [
    (lambda f: dp.recurrent(f >> PASSING), TIME, 4096),
    (functools.partial(dp.repeat, 1024), ones(1, 2), 1024),
], ids=["recurrent", "repeat"])
def test_the_gradient_of_a_loop_constant_is_summed_in_float32(around, x, times):
    net, memory = dp.mixed(around(dp.stateless(None, reading)), BF16), jnp.zeros((1, 2))
    found = jax.jit(jax.grad(lambda memory: net({}, x, memory=memory).sum()))(memory)
    assert found.tolist() == [[times, times]]


def test_a_memory_in_16_bits_without_mixed():
    net, memory = dp.recurrent(dp.stateless(None, reading) >> PASSING), jnp.zeros((1, 2), BF16)
    x = TIME.astype(BF16)
    run = lambda memory: net({}, x, memory=memory).astype(jnp.float32).sum()  # noqa: E731
    assert jax.grad(run)(memory).tolist() == [[4096, 4096]]


@pytest.mark.slow
def test_a_child_called_many_times():
    """The calls of a program are as many uses as the entries of an array."""
    @dp.program(scale=dp.prelu())
    def net(layers, x):
        return sum(layers.scale(x) for _ in range(320))

    x = -ones(1, 2)
    params = {"scale": {"scale": jnp.ones(2)}}
    grads = jax.jit(jax.grad(lambda p: dp.mixed(net, BF16)(p, x).sum()))(params)
    assert grads["scale"]["scale"].tolist() == [-320, -320]


@pytest.mark.slow
def test_a_small_gpt():
    """Ids that come often, tied scores, attention: as in float32, but for the rounding."""
    net = dp.models.gpt(4, length=64, width=16, depth=1, heads=2)
    ids = jax.random.randint(KEY, (64, 64), 0, 4)
    params, _ = net.init(KEY, ids)
    params = jax.tree.map(lambda a: a.astype(BF16).astype(jnp.float32), params)

    def gradients(net):
        loss = lambda p: dp.losses.cross_entropy(net(p, ids[:, :-1]), ids[:, 1:])  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    found, wanted = gradients(dp.mixed(net, BF16)), gradients(net)
    norm = lambda tree: float(jnp.sqrt(sum((a**2).sum() for a in jax.tree.leaves(tree))))  # noqa: E731
    assert norm(jax.tree.map(jnp.subtract, found, wanted)) < 0.03 * norm(wanted)


@pytest.mark.slow
def test_a_small_convolutional_net():
    """Bias gradients of cross entropy: sums over all places of a batch."""
    net = dp.serial(dp.conv(4, 3), jax.nn.relu, dp.conv(4, 3), dp.global_avg_pool(), dp.linear(3))
    x, labels = jax.random.normal(KEY, (8, 32, 32, 1)), jnp.arange(8) % 3
    params, _ = net.init(KEY, x)
    params, x = jax.tree.map(lambda a: a.astype(BF16).astype(jnp.float32), (params, x))

    def biases(net):
        grads = jax.jit(jax.grad(lambda p: dp.losses.cross_entropy(net(p, x), labels)))(params)
        return [leaf for path, leaf in dp.tree.paths(grads).items() if "bias" in path]

    for found, wanted in zip(biases(dp.mixed(net, BF16)), biases(net), strict=True):
        assert jnp.linalg.norm(found - wanted) < 0.05 * jnp.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [jax.jit, jax.checkpoint, lambda f: f],
                         ids=["jit", "checkpoint", "eager"])
def test_every_mode_of_differentiation(wrapped):
    """The bias of mapped rows, 4096 in all: its gradient, tangent and second derivative."""
    net, x = dp.linear(1, kernel_init="zeros"), ones(16, 256, 1).astype(BF16)
    params = net.init(KEY, x[0])[0]
    total = wrapped(lambda bias: jax.vmap(
        lambda row: net(params | {"bias": bias}, row))(x).astype(jnp.float32).sum())
    bias = jnp.ones(1)
    assert jax.grad(total)(bias) == jax.jacfwd(total)(bias) == 4096
    assert jax.jvp(total, (bias,), (bias,))[1] == 4096
    assert jax.hessian(lambda bias: total(bias) ** 2)(bias) == 2 * 4096**2
    each = jax.vmap(jax.grad(lambda bias, row: net(
        params | {"bias": bias}, row).astype(jnp.float32).sum()), (None, 0))(bias, x)
    assert each.shape == (16, 1) and (each == 256).all()


# A forward pass stays narrow.

# What computes a product in float32 all the same: the weights of resampling are no parameters.
WIDE = {"upsample, linear", "upsample, cubic"}
NARROW = ("dot_general", "conv_general_dilated", "tanh", "logistic", "erf")
QUICK = [case for case in CASES if not case.slow]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values())):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield from equations(getattr(part, "jaxpr", part))


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK, ids=[case.name for case in QUICK])
def test_nothing_is_promoted_to_float32(case):
    """Products and activations are in 16 bits; norms, softmax and sums of windows are wide."""
    net = dp.mixed(case.layer, BF16)
    plan = net.plan(case.x, **case.side)
    run = lambda *given: net.apply(*given[:3], **given[3])[0]  # noqa: E731
    traced = jax.make_jaxpr(run)(plan.params, plan.state, case.x, case.side)
    for equation in equations(traced.jaxpr):
        if equation.primitive.name in NARROW:
            dtypes = {v.aval.dtype for v in equation.invars}
            assert jnp.float32 not in dtypes or case.name in WIDE, equation


@pytest.mark.slow
@pytest.mark.parametrize(("first", "x"), [
    (dp.embedding(5, 4), IDS), (dp.one_hot(5), IDS),
], ids=["embedding", "one_hot"])
def test_outputs_of_layers_on_integers_are_narrow(first, x):
    seen = []
    net = dp.mixed(dp.serial(first, spy(seen)), BF16)
    params, _ = net.init(KEY, x)
    seen.clear()
    assert net(params, x).dtype == jnp.float32
    assert {a.dtype for a in seen} == {jnp.dtype(BF16)}
