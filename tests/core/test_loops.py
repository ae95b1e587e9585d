"""No loop around a convolution: XLA's gradient of one is tens of times slower in a loop on CPU.

The program is read as it is lowered: XLA removes a loop of one round, and a branch that is no
choice, but only after it has chosen how to convolve, so that its own program shows neither.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import CASES, Case, floats
from support.comparing import KEY, close

import diffprog as dp
from diffprog.core.loops import convolves, scan

# What stands where in a lowered program.


def operations(block, functions):
    """All operations in a region, in regions inside it, and in the functions called from there."""
    for inner in block:
        for operation in inner.operations:
            yield operation
            for region in operation.regions:
                yield from operations(region, functions)
            for name in {"callee", "decomposition"}.intersection(operation.attributes):
                called = functions[str(operation.attributes[name]).strip('@"')]
                yield from operations(called.regions[0], functions)


def loops_around_convolutions(lowered):
    """How many loops of a program hold a convolution, directly or in what they call."""
    functions = {str(f.attributes["sym_name"]).strip('"'): f
                 for f in lowered.compiler_ir("stablehlo").body.operations}
    main = functions.pop("main")

    def found(operation):
        if operation.name != "stablehlo.while":
            return False
        return any(inner.name == "stablehlo.convolution" for region in operation.regions
                   for inner in operations(region, functions))

    return sum(map(found, operations(main.regions[0], functions)))


def lowered(net, x, side=None, wrap=lambda loss: loss):
    """The gradient of a training call by parameters and input, lowered for CPU."""
    net = dp.serial(net)
    side = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in (side or {}).items()}
    plan = net.plan(x, **side)

    def loss(params, state, x, key, side):
        y, state = net.apply(params, state, x, key=key, train=True, **side)
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(y)).astype(float), state

    key = jax.eval_shape(lambda: KEY)
    step = jax.jit(jax.grad(wrap(loss), argnums=(0, 2), has_aux=True, allow_int=True))
    return step.trace(plan.params, plan.state, x, key, side).lower(lowering_platforms=("cpu",))


NORMED = dp.residual(dp.conv(2, 3) >> dp.batch_norm())
BLOCK = dp.residual(dp.conv(2, 3) >> dp.batch_norm() >> jnp.tanh >> dp.dropout(0.5))
PLAIN = dp.residual(dp.conv(2, 3) >> jnp.tanh)
TWICE = dp.repeat(2, PLAIN)
IMAGES = floats(2, 4, 4, 2)


def test_the_reader_sees_loops_in_every_place():
    kernel = jnp.ones((3, 3, 3, 2, 2))
    one = lambda x, w: (jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), None)
    loop = lambda x: jax.lax.scan(one, x, kernel)[0]  # noqa: E731
    called = lambda x: jax.lax.scan(jax.jit(one), x, kernel)[0]  # noqa: E731
    outside = lambda x: one(jax.lax.scan(lambda x, _: (x * 2, None), x, length=3)[0],  # noqa: E731
                            kernel[0])[0]
    read = lambda f: loops_around_convolutions(jax.jit(f).lower(IMAGES))  # noqa: E731
    assert [*map(read, (loop, called, jax.jit(called), jax.checkpoint(loop), outside))] == [
        1, 1, 1, 1, 0]
    assert read(jax.grad(lambda x: loop(x).sum())) == 1  # this one is linear
    assert read(lambda x: jax.lax.cond(x.sum() > 0, loop, outside, x)) == 1


TRANSFORMED = {
    "repeat": dp.repeat(3, BLOCK), "repeat once": dp.repeat(1, BLOCK),
    "repeat, a part at a time": dp.repeat(3, BLOCK, unroll=2),
    "repeat, all at a time": dp.repeat(2, BLOCK, unroll=4),
    "repeat with remat": dp.repeat(1, BLOCK, remat=True) >> dp.repeat(2, dp.remat(BLOCK)),
    "repeat in repeat": dp.repeat(1, dp.repeat(2, PLAIN)) >> dp.repeat(2, dp.repeat(1, PLAIN)),
    "remat": dp.remat(dp.repeat(1, BLOCK) >> dp.repeat(2, BLOCK), policy="dots_saveable"),
    "heads": dp.heads(2, dp.repeat(1, BLOCK) >> dp.repeat(2, BLOCK)),
    "ensemble": dp.ensemble(2, dp.repeat(1, BLOCK) >> dp.repeat(2, BLOCK)),
    "mixed": dp.mixed(TWICE, jnp.bfloat16), "reparam": dp.reparam(
        TWICE, lambda key, w: {"half": w / 2}, lambda tree: 2 * tree["half"]),
    "ema": dp.ema(TWICE), "freeze": dp.freeze(TWICE, "**/bias"), "lora": dp.lora(TWICE, 1),
    "quantize": dp.quantize(TWICE, 4), "weight_norm": dp.weight_norm(TWICE),
    "spectral_norm": dp.spectral_norm(TWICE), "linearize": dp.linearize(TWICE),
    "hyper": dp.hyper(TWICE, dp.linear(2)), "replace": dp.replace(TWICE, "**/conv_0", dp.remat),
    "pin": dp.pin(TWICE, train=True),
    "tap": dp.tap(TWICE, "**/conv_0") >> (lambda pair: pair[0]),
    "repeat of others": dp.repeat(2, dp.conv_transpose(2, 3) >> dp.depthwise_conv(3)),
}


def test_every_transformation_is_tried():
    kinds = {name for name, home in dp._HOMES.items() if home.startswith("transforms.")}
    assert {name.split()[0].rstrip(",") for name in TRANSFORMED} == kinds - {"fixed_point"}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_no_transformation_leaves_a_loop_around_a_convolution(name):
    side = {"condition": jnp.ones((2, 3))} if name == "hyper" else None
    assert loops_around_convolutions(lowered(TRANSFORMED[name], IMAGES, side)) == 0


def walk_of_a_sampler():
    net = dp.program(conv=dp.conv(2, 3))(lambda layers, x, *, time: layers.conv(x))
    plan = net.plan(IMAGES, time=jnp.array([1, 1]))
    walk = lambda params, x: dp.diffusion.ddim(net, params, x, dp.diffusion.cosine_noise(4))  # noqa: E731
    return jax.jit(walk).lower(plan.params, IMAGES)


# What loops by its nature: the length is data or time.
LOOPS = {
    "fixed_point": lambda: lowered(
        dp.fixed_point(dp.add >> dp.conv(2, 3) >> jnp.tanh), IMAGES),
    "recurrent": lambda: lowered(dp.recurrent(dp.serial(
        jax.vmap(lambda x: jnp.convolve(x, x)), dp.simple_rnn(2))), floats(2, 3, 4)),
    "a sampler": walk_of_a_sampler,
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_that_cannot_be_unrolled_are_found(name):
    assert loops_around_convolutions(LOOPS[name]()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    Case("resnet", dp.models.resnet(18, 3, width=2), floats(2, 32, 32, 3)),
    Case("unet", dp.models.unet(2, widths=(2, 4), depth=1, attention=(2,), groups=2),
        floats(1, 4, 4, 2),
         {"time": jnp.array([3])}),
], ids=lambda case: case.name)
def test_no_model_has_a_loop_around_a_convolution(case):
    assert loops_around_convolutions(lowered(case.layer, case.x, case.side)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    *CASES, Case("resnet of bottlenecks", dp.models.resnet(50, 3, width=2), floats(2, 32, 32, 3)),
    Case("alexnet", dp.models.alexnet(3), floats(1, 224, 224, 3)),
], ids=lambda case: case.name)
def test_no_case_has_a_loop_around_a_convolution(case):
    assert loops_around_convolutions(lowered(case.layer, case.x, case.side)) == 0


def test_a_game_has_no_loop_around_a_convolution():
    """The turns of a player with one step are a loop too, where another player has several."""
    def even(net, params, state, x, *, key, train):
        y, state = net.apply(params, state, x, key=key, train=train)
        return jnp.square(y).mean(), (state, {})

    players = {"one": dp.training.Player(even, optax.sgd(1.0)),
        "two": dp.training.Player(even, optax.sgd(1.0), 2)}
    step = dp.training.make_game(dp.serial(one=PLAIN, two=PLAIN), players)
    state = jax.eval_shape(lambda: step.init(KEY, jnp.ones((2, 4, 4, 2))))
    assert loops_around_convolutions(step.apply.lower(state, floats(4, 4, 4, 2))) == 0


def layouts(*given, **how):
    """How the convolutions of the optimized program of a gradient lie in memory."""
    text = lowered(*given, **how).compile().as_text()
    return collections.Counter(re.findall(r"convolution\(.*dim_labels=([\w>-]+)", text))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("ours, theirs, wrap", [
    (dp.repeat(1, dp.repeat(2, NORMED)), NORMED**2, None),
    (dp.repeat(2, NORMED), NORMED**2, jax.jit),  # a function of the program calls another
    (dp.repeat(2, NORMED), NORMED**2, lambda loss: jax.checkpoint(jax.jit(loss))),
    (dp.ensemble(2, dp.repeat(2, PLAIN)), dp.ensemble(2, PLAIN**2), None),
    (dp.heads(2, dp.repeat(1, PLAIN)), dp.heads(2, PLAIN), None),
], ids=["nested", "jit", "checkpoint", "ensemble", "heads"])
def test_convolutions_are_compiled_as_those_of_blocks_written_out(ours, theirs, wrap):
    wrap = wrap or (lambda loss: loss)
    found = layouts(ours, IMAGES, wrap=wrap)
    assert found == layouts(theirs, IMAGES, wrap=wrap) and found.total() >= 3


@pytest.mark.slow
@pytest.mark.parametrize("length, unroll", [
    (1, 1), (3, 2), *(pytest.param(*given, marks=pytest.mark.slow)
                      for given in [(3, 1), (3, 3), (2, 5)])])
@pytest.mark.parametrize("convolving", [False, True])
@pytest.mark.parametrize("wrap", [
    lambda f: f, jax.jit, lambda f: jax.vmap(f, in_axes=(0, None)), jax.jacrev, jax.jacfwd,
], ids=["eager", "jit", "vmap", "jacrev", "jacfwd"])
def test_scan_is_that_of_jax(length, unroll, convolving, wrap):
    xs = {"x": jnp.arange(length) + 2.0, "none": None}
    step = lambda carry, at: (carry * at["x"], (carry, None))  # noqa: E731

    def ours(carry, xs):
        return scan(step, carry, xs, length=length, unroll=unroll, convolving=lambda: convolving)

    theirs = functools.partial(jax.lax.scan, step)
    carry = jnp.array([1.5, 2.0])
    close(wrap(ours)(carry, xs), wrap(theirs)(carry, xs))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint],
                         ids=["alone", "jit", "checkpoint"])
def test_convolutions_are_found_wherever_they_are(wrap):
    f = wrap(lambda x: jnp.convolve(x, x))
    assert convolves(f, jnp.ones(3)) and convolves(jax.vmap(f), jnp.ones((2, 3)))
    assert not convolves(wrap(jnp.sin), jnp.ones(3))


@pytest.mark.slow
def test_convolutions_in_training_alone_are_found():
    net = dp.repeat(2, dp.program(conv=dp.conv(2, 3))(
        lambda layers, x, *, train: layers.conv(x) if train else x))
    assert loops_around_convolutions(lowered(net, IMAGES)) == 0
