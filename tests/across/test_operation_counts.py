"""Operations that `summary` counts are those counted by hand, of every kind of layer and wrapper.

By hand are counted products, twice as many operations as numbers are multiplied; sizes are such
that all else is less than a twentieth.
"""

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def twice(layers, x):
    return layers.f(layers.f(x))


ROWS = floats(400, 60)  # on which a linear(60) multiplies 400 x 60 x 60 pairs
ONE = 2 * 400 * 60 * 60
IMAGES, SERIES, TEXTS = floats(8, 9, 9, 40), floats(8, 5, 100), floats(2, 16, 96)
QUERIES = 2 * 2 * 16 * 96 * 96  # one projection of all tokens; scores or their use are less
SEEN = 2 * 2 * 16 * 16 * 96
F = dp.linear(60)

# layer -> x, and the operations of its products
HAND = {
    "linear": (F, ROWS, ONE),
    "bilinear": (dp.bilinear(60), (floats(40, 60), floats(40, 50)), 2 * 40 * 60 * 50 * 60),
    "conv": (dp.conv(30, 3, padding="VALID"), IMAGES, 2 * 8 * 7 * 7 * 30 * 3 * 3 * 40),
    "conv in groups": (dp.conv(30, 3, padding="VALID", groups=2), IMAGES,
                       2 * 8 * 7 * 7 * 30 * 3 * 3 * 20),
    "conv with a stride": (dp.conv(30, 3, padding="VALID", stride=2), IMAGES,
                           2 * 8 * 4 * 4 * 30 * 3 * 3 * 40),
    "depthwise_conv": (dp.depthwise_conv(5, padding="VALID", bias=False), IMAGES,
                       2 * 8 * 5 * 5 * 40 * 5 * 5),
    "conv_transpose": (dp.conv_transpose(30, 2, stride=2), IMAGES, 2 * 8 * 18 * 18 * 30 * 40),
    "ffn": (dp.ffn(100, jax.nn.relu), ROWS, 2 * 400 * 60 * 100 * 2),
    "glu": (dp.glu(60), floats(40, 100), 2 * 40 * 100 * 60 * 2),
    "swiglu": (dp.swiglu(60), ROWS, 2 * ONE),
    "self_attention": (dp.self_attention(4), TEXTS, 4 * QUERIES + 2 * SEEN),
    "cross_attention": (dp.cross_attention(4), TEXTS,
                        2 * QUERIES + 2 * QUERIES * 24 // 16 + 2 * SEEN * 24 // 16),
    "attention_head": (dp.attention_head(96), TEXTS, 3 * QUERIES + 2 * SEEN),
    "simple_rnn": (dp.recurrent(dp.simple_rnn(60)), SERIES, 2 * 8 * 5 * 160 * 60),
    "lstm": (dp.recurrent(dp.lstm(60)), SERIES, 2 * 8 * 5 * 160 * 60 * 4),
    "gru": (dp.recurrent(dp.gru(60)), SERIES, 2 * 8 * 5 * 160 * 60 * 3),
    "lstm both ways": (dp.recurrent(dp.lstm(60), bidirectional=True), SERIES,
                       2 * 2 * 8 * 5 * 160 * 60 * 4),
    "serial": (F >> F, ROWS, 2 * ONE),
    "residual": (dp.residual(F, F), ROWS, 2 * ONE),
    "branch": (dp.branch(F, F, merge=dp.add), ROWS, 2 * ONE),
    "parallel": (dp.parallel(F, F), (ROWS, ROWS), 2 * ONE),
    "program": (dp.program(f=F)(twice), ROWS, 2 * ONE),
    "power": (F**3, ROWS, 3 * ONE),
    "add_norm": (dp.add_norm(dp.linear(600) >> F), ROWS, 20 * ONE),
    "pre_norm": (dp.pre_norm(dp.linear(600) >> F), ROWS, 20 * ONE),
    "repeat": (dp.repeat(3, F), ROWS, 3 * ONE),
    "heads": (dp.heads(3, F), ROWS, 3 * ONE),
    "ensemble": (dp.ensemble(3, F), ROWS, 3 * ONE),
    "repeat of heads": (dp.repeat(2, dp.heads(3, dp.linear(20))), ROWS, 2 * ONE),
    "remat": (dp.remat(F), ROWS, ONE),
    "mixed": (dp.mixed(F, jnp.bfloat16), ROWS, ONE),
    "pin": (dp.pin(F, train=False), ROWS, ONE),
    "tap": (dp.tap(dp.serial(f=F), "f"), ROWS, ONE),
    "replace": (dp.replace(dp.serial(f=F), "f", dp.remat), ROWS, ONE),
    "reparam": (dp.reparam(F, lambda key, w: w, lambda w: 2 * w), ROWS, ONE),
    "freeze": (dp.freeze(F), ROWS, ONE),
    "ema": (dp.ema(F), ROWS, ONE),
    "lora": (dp.lora(F, 6), ROWS, ONE + 2 * 60 * 6 * 60),
    "quantize": (dp.quantize(F), ROWS, ONE),
    "weight_norm": (dp.weight_norm(F), ROWS, ONE),
    "spectral_norm": (dp.spectral_norm(F), ROWS, ONE + 2 * 60 * 60),
    "linearize": (dp.linearize(F), ROWS, 2 * ONE),
    "fixed_point": (dp.fixed_point(dp.parallel(F, F) >> dp.add >> jnp.tanh), ROWS, 2 * ONE),
    "hyper": (dp.hyper(F, dp.linear(20)), ROWS, ONE + 2 * 30 * 20 + 2 * 20 * (60 * 60 + 60)),
}
SIDE = {"cross_attention": {"memory": floats(2, 24, 96)}, "hyper": {"condition": floats(30)}}


@pytest.mark.parametrize("name", HAND)
def test_products_are_counted(name):
    layer, x, products = HAND[name]
    counted = dp.summary(layer, x, **SIDE.get(name, {})).flops
    assert products <= counted <= 1.05 * products


@pytest.mark.parametrize(("layer", "x", "operations"), [
    (dp.max_pool(2), floats(8, 4, 4, 3), 8 * 2 * 2 * 3 * 4),
    (dp.global_max_pool(), floats(8, 4, 4, 3), 8 * 3 * 16),
    (dp.linear(3), floats(2, 4), 2 * 2 * 4 * 3 + 2 * 3),
    (dp.repeat(3, dp.linear(4)), floats(2, 4), 3 * (2 * 2 * 4 * 4 + 2 * 4)),
    (dp.serial(jax.nn.relu), floats(2, 4), 2 * 4),
    (dp.flatten(), floats(2, 4, 3), 0), (dp.patches(2), floats(2, 4, 4, 3), 0),
], ids=repr)
def test_operations_other_than_products_are_counted(layer, x, operations):
    counted = dp.summary(layer, x).flops
    assert operations * 0.7 <= counted <= operations
