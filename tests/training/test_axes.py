"""Axis 0 is the batch axis: layers that mix it are named before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from support.comparing import KEY
from support.refusing import refused

import diffprog as dp
from diffprog.core.layer import as_layer
from diffprog.training.axes import check_examples

GREY = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32)
LABELS = np.arange(6) % 3
FIRST = np.moveaxis(np.random.default_rng(0).normal(size=(6, 8, 8, 3)), -1, 1).astype(np.float32)


def head(*layers):
    return dp.serial(*layers, dp.flatten(), dp.linear(3))


def minus_mean(x):
    return x - x.mean(0)


@dp.program(filter=dp.conv(8, 3))
def filtered(layers, x):
    return jnp.tanh(layers.filter(x))


# A net, and the layer that the error names.
MIXING = {
    "conv": (head(dp.conv(4, 3)), "conv_0", "conv(4, 3)"),
    "pool": (head(jnp.abs, dp.max_pool(2)), "max_pool~0", "max_pool(2)"),
    "in a repeat": (head(dp.linear(8), dp.repeat(2, dp.conv(8, 3) >> jax.nn.relu)),
                    "repeat_0/conv_0", "conv(8, 3)"),
    "in a residual": (head(dp.residual(dp.conv(8, 3))), "residual_0/body", "conv(8, 3)"),
    "mixed": (head(dp.mixed(dp.conv(4, 3), jnp.bfloat16)), "conv_0", "mixed"),
    "in a program": (dp.serial(stem=filtered, head=head(dp.linear(2))), "stem/filter", "conv"),
    "ensemble": (dp.ensemble(2, head(dp.conv(4, 3))) >> (lambda y: y.mean(0)), "conv_0", "conv"),
    "remat": (head(dp.remat(dp.conv(4, 3))), "conv_0", "remat"),
    "reflected": (head(dp.conv(4, 3, padding_mode="reflect")), "conv_0", "conv"),
    "depthwise": (head(dp.depthwise_conv(3)), "depthwise_conv_0", "depthwise_conv"),
    "computed": (head(dp.weight_norm(dp.conv(4, 3))), "conv_0", "conv"),
    "resnet": (dp.serial(dp.conv(4, 3), dp.batch_norm(), jax.nn.relu, dp.residual(dp.serial(
        dp.batch_norm(), dp.conv(4, 3))), dp.flatten(), dp.linear(3)), "conv_0", "conv(4, 3)"),
    "a function": (head(minus_mean), "minus_mean~0", "minus_mean"),
}


def step_of(net, **options):
    return dp.make_step(net, dp.classification(), optax.sgd(0.1), **options)


@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_examples_are_named(name):
    net, path, layer = MIXING[name]
    step = step_of(net)
    data = dp.batches((GREY, LABELS), 6)
    error = refused(dp.fit, step, data, steps=1, key=KEY, progress=False)
    assert path in error.path and layer in error.layer
    assert error.wants == "examples along axis 0, unmixed in inference"
    assert "x[..., None]" in error.remedy and "check_axes=False" in error.remedy


@pytest.mark.parametrize("count", [1, 2, 6])
def test_mixing_is_refused_wherever_a_net_is_run(count):
    net, path, _ = MIXING["conv"]
    step = step_of(net, donate=False)
    batch = GREY[:count], LABELS[:count]
    state = step.init(KEY, batch[0])
    for run in (lambda: step.apply(state, batch), lambda: step.evaluate(state, batch),
                lambda: dp.evaluate(step, state, [batch]),
                lambda: dp.predict(net, state.params, batch[0]),
                lambda: dp.predict(net, state.params, batch[0], batch_size=2)):
        assert refused(run).path == path
    game = dp.training.make_game(dp.serial(one=net),
        {"one": dp.training.Player(judged, optax.sgd(0.1))},
                        inputs=lambda batch: batch[0])
    error = refused(game.apply, game.init(KEY, batch[0]), batch)
    assert error.path == f"one/{path}"


def judged(net, params, state, batch, *, key, train):
    loss = dp.losses.cross_entropy(net.children["one"](params["one"], batch[0]),
        jnp.asarray(batch[1]))
    return loss, (state, {"loss": loss})


@pytest.mark.slow
def test_check_axes_false_allows_mixing():
    net, _, _ = MIXING["conv"]
    step = step_of(net, check_axes=False)
    fit = dp.fit(step, [(GREY, LABELS)], steps=2, key=KEY, progress=False,
                 validation=[(GREY, LABELS)])
    params = fit.state.params
    assert dp.evaluate(step, fit.state, [(GREY, LABELS)]).keys() == {"loss", "accuracy"}
    np.testing.assert_allclose(
        dp.predict(net, params, GREY, batch_size=2, check_axes=False), net(params, GREY), rtol=1e-5)
    game = dp.training.make_game(dp.serial(one=net),
        {"one": dp.training.Player(judged, optax.sgd(0.1))},
                        inputs=lambda batch: batch[0], check_axes=False)
    game.apply(game.init(KEY, GREY), (GREY, LABELS))


@pytest.mark.parametrize("name", [name for name in MIXING if name != "a function"])
def test_the_same_nets_keep_images_with_channels_apart(name):
    net = MIXING[name][0]
    x = jnp.ones((6, 8, 8, 8))
    step = step_of(net)
    jax.eval_shape(step.apply, jax.eval_shape(step.init, KEY, x), (x, jnp.asarray(LABELS)))


@pytest.mark.parametrize("case", [case for case in CASES if not case.slow], ids=lambda c: c.name)
def test_no_layer_of_the_library_is_refused_on_examples(case):
    """All layers keep examples apart in inference, as the laws verify by running them."""
    check_examples(as_layer(case.layer), case.x, case.side, cut=True)


@dp.program(experts=dp.linear(3))
def balanced(layers, x):
    y = layers.experts(x)
    return y, jax.nn.softmax(y).mean(0)


@pytest.mark.slow
def test_a_scalar_output_may_depend_on_the_batch():
    """A step computes it on the batch; `predict` would compute it on one part."""
    def objective(net, params, state, batch, *, key, train):
        y, shares = net(params, batch[0])
        loss = dp.losses.cross_entropy(y, batch[1]) + jnp.square(shares).sum()
        return loss, (state, {"loss": loss})

    x = GREY[:, 0]
    step = dp.make_step(balanced, objective, optax.sgd(0.1), donate=False)
    state = step.init(KEY, x)
    step.apply(state, (x, LABELS))
    assert dp.predict(balanced, state.params, x)[1].shape == (3,)
    assert refused(dp.predict, balanced, state.params, x, batch_size=4).got == "float32[4,8]"


@pytest.mark.slow
@pytest.mark.parametrize("net", [
    dp.linear(3), dp.batch_norm() >> dp.linear(3), dp.layer_norm() >> dp.linear(3),
    dp.fixed_point(dp.program(f=dp.linear(8))(lambda layers, zx: jnp.tanh(
        0.1 * layers.f(zx[0]) + zx[1]))) >> dp.linear(3)], ids=repr)
def test_features_may_be_as_many_as_examples(net):
    x = np.concatenate([GREY[:, 0], GREY[:2, 1]])
    dp.fit(step_of(net), [(x, np.arange(8) % 3)], steps=1, key=KEY, progress=False)


def test_common_side_inputs_are_no_examples():
    net = dp.program(head=dp.linear(3))(lambda layers, x, *, shift: layers.head(x + shift))
    batch = {"x": np.ones((8, 8), np.float32), "y": np.arange(8) % 3, "shift": np.arange(8.0)}
    dp.fit(step_of(net), [batch], steps=1, key=KEY, progress=False)


# Channels first.


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("net", [
    head(dp.conv(4, 3)), head(lambda x: x / 255, dp.conv(4, 3)), head(dp.avg_pool((1, 2))),
    head(dp.batch_norm() >> dp.repeat(1, dp.residual(dp.depthwise_conv(3)))),
    head(dp.remat(dp.conv(4, 3))), head(dp.lora(dp.conv(4, 3), 1)), head(dp.conv_transpose(4, 3)),
    head(dp.pin(dp.mixed(dp.conv(4, 3), jnp.bfloat16), train=True))], ids=repr)
def test_channels_first_are_refused(net, channels):
    x = FIRST[:, :channels]
    step = step_of(net, donate=False)
    state = step.init(KEY, x)
    for run in (lambda: step.apply(state, (x, LABELS)),
                lambda: step.evaluate(state, (x, LABELS)),
                lambda: dp.predict(net, state.params, x, state=state.state)):
        error = refused(run)
        assert "channels last" in error.wants and "jnp.moveaxis(x, 1, -1)" in error.remedy
        assert error.path and error.got == f"float32[6,{channels},8,8]"
    step_of(net, check_axes=False, donate=False).apply(state, (x, LABELS))
    last = np.moveaxis(x, 1, -1)
    step.apply(step.init(KEY, last), (last, LABELS))


@pytest.mark.parametrize("shape", [
    (6, 8, 8, 3), (6, 8, 8, 1), (6, 4, 4, 4), (6, 3, 8, 5), (6, 3, 3, 9)])
def test_images_with_channels_last_are_accepted(shape):
    x = jnp.ones(shape)
    step = step_of(head(dp.conv(4, 3)))
    jax.eval_shape(step.apply, jax.eval_shape(step.init, KEY, x), (x, jnp.asarray(LABELS)))


@pytest.mark.parametrize("shape", [(6, 3, 8, 12), (6, 1, 28, 20)])
def test_channels_first_are_refused_for_images_that_are_not_square(shape):
    step = step_of(head(dp.conv(4, 3)), donate=False)
    x = np.ones(shape, np.float32)
    error = refused(lambda: step.apply(step.init(KEY, x), (x, LABELS)))
    assert "channels last" in error.wants and "jnp.moveaxis(x, 1, -1)" in error.remedy


def test_hidden_feature_maps_may_have_any_shape():
    """Three rows, and as many channels as columns, but no input of the net."""
    net = dp.serial(dp.reshape((3, 8, 8)), dp.conv(4, 3), dp.flatten(), dp.linear(3))
    step, x = step_of(net), jnp.ones((6, 192))
    jax.eval_shape(step.apply, jax.eval_shape(step.init, KEY, x), (x, jnp.asarray(LABELS)))
