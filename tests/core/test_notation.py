"""The repr of a net is the code that made it."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from names import by_name, makers
from support.comparing import KEY, X, identity, names, same

import diffprog as dp

# repr is code.

BLOCK = dp.residual(dp.serial(dp.layer_norm(), dp.linear(6), jax.nn.relu, dp.linear(4)))
IMAGE = jnp.ones((2, 8, 8, 4))


def kept(key, leaf):
    return leaf


SHOWN = {
    "wires": (dp.serial(dp.linear(4, bias=False), BLOCK, dp.residual(dp.linear(3), dp.linear(3)),
                        head=dp.branch(dp.linear(3), jnp.tanh, merge=dp.concatenate)), X),
    "functions": (dp.linear(3) >> jax.nn.relu >> dp.gelu >> jnp.tanh
                  >> functools.partial(jax.nn.gelu, approximate=False)
                  >> functools.partial(jnp.clip, min=-1.0, max=(1.0)), X),
    "image": (dp.serial(dp.conv(4, 3, stride=2, padding=((1, 0), (0, 1))), dp.batch_norm(
        momentum=0.5), dp.max_pool((2, 2), padding="SAME"), dp.dropout(0.5)), IMAGE),
    "pools": (dp.serial(dp.conv(4, (3, 3), groups=2), dp.avg_pool(2, stride=1), dp.branch(
        dp.global_avg_pool(), dp.global_max_pool(), merge=dp.add)), IMAGE),
    "sequence": (dp.serial(dp.conv(4, (3,)), dp.conv(4, 3, dims=1, dilation=2), dp.flatten(keep=2)),
                 jnp.ones((2, 5, 4))),
    "copies": (dp.serial(dp.repeat(3, BLOCK, unroll=2), dp.heads(2, dp.remat(dp.linear(2)))), X),
    "pairs": (dp.serial(dp.branch(dp.linear(2), other=abs), dp.parallel(
        dp.linear(2), dp.linear(3)), dp.concatenate), X),
    "convolutions": (dp.serial(
        dp.depthwise_conv(3, multiplier=2, padding_mode="reflect"),
        dp.conv_transpose(4, 3, stride=2), dp.pixel_shuffle(2),
        dp.upsample(size=(32, 33), method="linear"), dp.group_norm(1),
        dp.instance_norm(bias=False), dp.spatial_dropout(0.5), dp.stochastic_depth(0.1),
        dp.max_pool(3, dilation=2), dp.avg_pool(2, padding=1, count_padding=True),
        dp.adaptive_max_pool((4, 5)), dp.adaptive_avg_pool(4)), IMAGE),
    "tokens": (dp.serial(
        dp.hide(), dp.patches(2), dp.reshape((2, -1), keep=2), dp.rms_norm(eps=1e-6),
        dp.prelu(shared=True), dp.glu(6), dp.swiglu(4, bias=True), dp.binary_step,
        dp.linear(3, kernel_init="he_normal")), IMAGE),
    "draws": (dp.serial(dp.branch(dp.linear(2), dp.linear(2)), dp.estimators.gaussian_sample(),
                        dp.estimators.gumbel_softmax(temperature=0.5, hard=True)), X),
    "bilinear": (dp.branch(dp.linear(2), dp.linear(3)) >> dp.bilinear(4), X),
    "recurrence": (dp.serial(
        dp.recurrent(dp.serial(dp.lstm(4, bias=False), dp.gru(3)), unroll=2),
        dp.recurrent(dp.simple_rnn(2, activation=jax.nn.relu), bidirectional=True),
        dp.recurrent(dp.gru(2), reverse=True), dp.collapse("max")), jnp.ones((2, 3, 4))),
    "attention": (dp.serial(
        dp.add_norm(dp.self_attention(2, kv_heads=1, causal=True, window=3, rotary=dp.rotary(
            500000.0, scaling=dp.rope.linear_scaling(2.0)), dropout=0.5), dp.rms_norm(),
                dropout=0.5),
        dp.pre_norm(dp.ffn(8, dp.gelu)), dp.cross_attention(2, bias=False),
        dp.heads(2, dp.attention_head(2, 3, scale=1.0, implementation="xla"))),
        jnp.ones((2, 3, 4)), {"memory": jnp.ones((2, 5, 3))}),
    "one_hot": (dp.one_hot(5), jnp.arange(3)),
    "ids": (dp.embedding(11, 4) >> dp.sinusoidal_positions(first=1) >> dp.learned_positions(
        8, embedding_init="zeros"), jnp.ones((2, 3), jnp.int32)),
    "transforms": (dp.serial(
        dp.repeat(2, BLOCK, remat="dots_saveable"), dp.remat(BLOCK, policy="dots_saveable"),
        dp.mixed(BLOCK, jnp.bfloat16), dp.linearize(BLOCK),
        dp.fixed_point(dp.add >> BLOCK, tolerance=1e-3),
        dp.pin(dp.pin(dp.dropout(0.5), train=True), train=False),
        dp.tap(dp.ensemble(2, BLOCK), "body")), X),
    "computed parameters": (dp.serial(
        dp.lora(dp.freeze(BLOCK, "**/bias"), 2), dp.weight_norm(dp.spectral_norm(dp.linear(3))),
        dp.freeze(dp.linear(4), exclude=("bias",)),
        dp.quantize(BLOCK, bits=4, pattern="body/linear_0/kernel"),
        dp.ema(dp.reparam(
            dp.linear(2), kept, jnp.tanh, constant="**"), decay=0.5)), X),
    "hyper": (dp.hyper(dp.linear(3), dp.models.mlp((5,), 4), kernel_init="zeros"), X,
              {"condition": jnp.ones((3, 2))}),
    "power": (dp.linear(4) ** 3 >> dp.layer_norm(scale=False, eps=1e-3), X),
    "long": (dp.serial(*[dp.serial(*[dp.linear(11), jax.nn.relu] * 6) for _ in range(2)]), X),
    "long, in wrappers": (dp.repeat(2, dp.remat(dp.serial(*[dp.linear(4), jax.nn.relu] * 6))), X),
    "long, in brackets": (dp.residual(dp.serial(*[dp.linear(4), dp.layer_norm()] * 6)), X),
}


def namespace():
    return {**by_name(), "jax": jax, "jnp": jnp, "functools": functools, "kept": kept}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_repr_evaluates_to_an_equal_net(name):
    net, x, *rest = SHOWN[name]
    side = dict(*rest)
    again = eval(repr(net), namespace())
    assert repr(again) == repr(net)
    assert names(again) == names(net)
    trees = net.init(KEY, x, **side)
    same(again.init(KEY, x, **side), trees)
    for train in (False, True):  # one text of the whole program, so one output for all inputs
        first, second = (
            jax.jit(layer.apply, static_argnames="train").lower(
                *trees, x, key=KEY, train=train, **side)
            for layer in (net, again))
        assert first.as_text() == second.as_text()


def test_every_layer_and_combinator_is_shown_above():
    text = " ".join(repr(net) for net, *_ in SHOWN.values())
    assert len(makers()) > 35
    for name in makers():
        assert re.search(rf"\b{name}\(", text), name
    for name in ("gelu", "binary_step", "concatenate", "add", "jax.nn.relu",
                 "functools.partial(jnp.clip"):
        assert name in text, name


def test_how_functions_are_shown():
    def local(x):
        return x

    assert repr(dp.serial(jax.nn.relu, dp.gelu, jnp.sin)) == "serial(jax.nn.relu, gelu, jnp.sin)"
    assert repr(dp.serial(abs)) == "serial(abs)"
    assert re.fullmatch(r"serial\(<lambda test_notation\.py:\d+>\)",
                        repr(dp.serial(lambda x: x)))
    assert re.fullmatch(r"serial\(<local test_notation\.py:\d+>\)", repr(dp.serial(local)))
    assert repr(dp.serial(identity)) == "serial(identity)"
    partial = functools.partial(jnp.clip, max=1.0)
    assert repr(dp.serial(partial)) == "serial(functools.partial(jnp.clip, max=1.0))"


def test_defaults_are_not_shown():
    assert repr(dp.conv(4, 3, stride=1, padding="SAME", bias=True)) == "conv(4, 3)"
    assert repr(dp.residual(dp.linear(3), None)) == "residual(linear(3))"
    assert repr(dp.max_pool(2, stride=None)) == "max_pool(2)"
    assert repr(dp.layer_norm(eps=float("1e-5"))) == "layer_norm()"  # equal is enough


def test_a_program_shows_its_children():
    @dp.program(norm=dp.layer_norm(), feed=dp.linear(4))
    def block(layers, x):
        return layers.feed(layers.norm(x))

    assert repr(block) == "block(norm=layer_norm(), feed=linear(4))"
    assert repr(dp.repeat(2, block)) == "repeat(2, block(norm=layer_norm(), feed=linear(4)))"


def test_an_unexpected_argument_is_named_with_those_that_exist():
    with pytest.raises(TypeError, match=r"^linear, which takes features, \*, bias, kernel_init, "
                       r"bias_init: got an unexpected keyword argument 'use_bias'; write bias=$"):
        dp.linear(3, use_bias=False)


def test_an_argument_of_another_kind_than_its_default_is_shown():
    assert repr(dp.self_attention(2, scale=1)) == "self_attention(2, scale=1)"
    with pytest.raises(dp.LayerError, match=r"^conv\(4, 3, dilation=1\.0\): "):
        dp.conv(4, 3, dilation=1.0)
