"""Errors of attention: settings, masks, memory, streams, implementations."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AxisType

import diffprog as dp
from diffprog.layers.attention.dot_product import Pattern, choose, dot_product
from errors.given import at, bools, floats, ints, params, zeros

X, MEMORY = jnp.ones((2, 5, 12)), jnp.ones((2, 7, 3))
STEP, WIDE = X[:, :1], floats(2, 3, 5, 5)
OWN, CROSS, HEAD = dp.self_attention(3), dp.cross_attention(3), dp.attention_head(4)
CAUSAL, WINDOW = dp.self_attention(3, causal=True), dp.self_attention(3, causal=True, window=2)
TURNING = dp.self_attention(3, rotary=dp.rotary())


@functools.cache
def begun(layer):
    """Parameters and a streaming state of 4 steps, with memory for layers that are not causal."""
    side = {} if layer in (CAUSAL, WINDOW) else {"memory": MEMORY}
    own = params(layer, X, **side)
    return own, zeros(lambda: layer.start(own, {}, STEP, length=4, **side))


def go_on(layer, x=STEP, **side):
    """One call of a stream."""
    return lambda: layer.apply(*begun(layer), x, **side)


def start(layer, **side):
    return lambda: layer.start(params(layer, X, **without_patterns(side)), {}, STEP, length=4,
                               **side)


def without_patterns(side):
    return {name: value for name, value in side.items() if not name.startswith("attention")}


def own_with(name):
    """Parameters with a bias of 1 feature, which would broadcast."""
    own = params(OWN, X)
    own[name]["bias"] = jnp.zeros(1)
    return own


def heads(dtype=jnp.bfloat16, features=64):
    return (jnp.ones((2, 4, 8, features), dtype),) * 3


def by_cudnn(given, pattern):
    return lambda: choose(*given, pattern, implementation="cudnn")


def of_any_batch():
    (size,) = jax.export.symbolic_shape("b")
    return [jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in heads()]


def on_an_explicit_mesh():
    given, mesh = heads(), jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        choose(*given, Pattern(causal=True), implementation="cudnn")


def without_cudnn():
    missing = mock.Mock(side_effect=RuntimeError("cuDNN is not detected."))
    with mock.patch.object(cudnn, "check_cudnn_version", missing):
        dot_product(*heads(features=8), implementation="cudnn")


EXAMPLES = {
    "at (cross_attention(2)): wants at least 2 axes (..., time, features), got float32[4]; write "
    "y[None] for one vector y: it is a sequence of one step":
        at(dp.cross_attention(2), floats(4), memory=floats(5, 4)),
    "at (cross_attention(2)): wants memory (..., time, features) with the leading axes of "
    "float32[3,4], got float32[3,5,4]; write y[..., None, :] for one vector y in each example: it "
    "is a sequence of one step":
        at(dp.cross_attention(2), floats(3, 4), memory=floats(3, 5, 4)),
    # Settings.
    "self_attention(0): wants heads as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.self_attention(0),
    "self_attention(4, kv_heads=3): wants kv_heads that divide heads=4, got 3; choose a divisor: "
    "each is shared by equally many heads":
        lambda: dp.self_attention(4, kv_heads=3),
    "cross_attention(2, kv_heads=0): wants kv_heads as an int of at least 1, got 0; pass 1 or "
    "more":
        lambda: dp.cross_attention(2, kv_heads=0),
    "attention_head(4, value_features=0): wants value_features as an int of at least 1, got 0; "
    "pass 1 or more":
        lambda: dp.attention_head(4, 0),
    "attention_head(2.0): wants features as an int of at least 1, got 2.0; pass a Python int":
        lambda: dp.attention_head(2.0),
    "wants key (..., S, 12) and value (..., S, E) for query float32[2,5,12], got float32[2,7,3] "
    "and float32[2,7,3]; give a key the features of a query, and each key one value":
        lambda: dp.attention(X, MEMORY, MEMORY),
    "wants keys with the leading axes (2,) of query, got float32[3,5,12]; broadcast them: only the "
    "last may be a divisor, of shared heads":
        lambda: dp.attention(X, jnp.ones((3, 5, 12)), jnp.ones((3, 5, 12))),
    "wants as many keys as queries, 1, with causal=True, got float32[2,5,12]; pass mask= for "
    "queries and keys of different steps":
        lambda: dp.attention(STEP, X, X, causal=True),
    "wants mask as booleans that broadcast to (2, 5, 5), got float32[2,5,12]; give it the axes "
    "(..., query, key)":
        lambda: dp.attention(X, X, X, mask=X),
    "self_attention(2, head_dim=0): wants head_dim as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.self_attention(2, head_dim=0),
    "self_attention(2, window=3): wants causal=True with a window, got causal=False; set it, or "
    "pass attention_mask for another pattern":
        lambda: dp.self_attention(2, window=3),
    "self_attention(2, causal=True, window=0): wants window as an int of at least 1, got 0; pass "
    "1 or more":
        lambda: dp.self_attention(2, causal=True, window=0),
    "self_attention(2, rotary=True): wants rotary as returned by dp.rotary, got True; pass "
    "dp.rotary(base=10000.0), for example":
        lambda: dp.self_attention(2, rotary=True),
    "self_attention(2, dropout=50): wants dropout in [0, 1), got 50; pass a fraction, not a "
    "percentage":
        lambda: dp.self_attention(2, dropout=50),
    "cross_attention(2, implementation='flash'): wants implementation out of blocks, cudnn, xla, "
    "or None, got 'flash'; leave implementation=None to choose by platform, dtype and shape":
        lambda: dp.cross_attention(2, implementation="flash"),
    # Inputs.
    "at (self_attention(5)): wants a width that is a multiple of heads=5, got float32[2,5,12]; "
    "choose another number of heads, or pass head_dim":
        at(dp.self_attention(5), X),
    "at (self_attention(3)): wants at least 2 axes (..., time, features), got float32[12]; add "
    "the missing axes":
        at(OWN, floats(12)),
    "at (self_attention(3)): wants floating-point input, got int32[2,5,12]; convert it: "
    "x.astype(jnp.float32)":
        at(OWN, ints(2, 5, 12)),
    "at (self_attention(4, rotary=rotary())): wants an even number of rotated features, got 3 in "
    "float32[2,4,5,3]; choose an even number: features are rotated in pairs":
        at(dp.self_attention(4, rotary=dp.rotary()), X),
    "at (self_attention(3, rotary=rotary(features=6))): wants at least the 6 rotated features, got "
    "float32[2,3,5,4]; give x more features, or rotate fewer":
        at(dp.self_attention(3, rotary=dp.rotary(features=6)), X),
    "at (self_attention(3)): wants a mask of booleans, got float32[2,5]":
        at(OWN, X, mask=floats(2, 5)),
    "at (self_attention(3)): wants a mask of the leading axes of (2, 5, 12), got bool[2,4]":
        at(OWN, X, mask=bools(2, 4)),
    "at (self_attention(3)): wants attention_mask as booleans of shape (2, 3, 5, 5), or with axes "
    "of size 1, got float32[2,3,5,5]; give it the axes batch, heads, query and key":
        at(OWN, X, attention_mask=WIDE),
    "at (self_attention(3)): wants attention_mask as booleans of shape (2, 3, 5, 5), or with axes "
    "of size 1, got bool[5,5]; give it the axes batch, heads, query and key":
        at(OWN, X, attention_mask=bools(5, 5)),
    "at (self_attention(3)): wants attention_mask as booleans of shape (2, 3, 5, 5), or with axes "
    "of size 1, got bool[2,2,5,5]; give it the axes batch, heads, query and key":
        at(OWN, X, attention_mask=bools(2, 2, 5, 5)),
    "at (self_attention(3)): wants attention_bias as floats of shape (2, 3, 5, 5), or with axes of "
    "size 1, got bool[2,3,5,5]; give it the axes batch, heads, query and key":
        at(OWN, X, attention_bias=bools(2, 3, 5, 5)),
    "at (cross_attention(3)): wants attention_bias as floats of shape (2, 3, 5, 7), or with axes "
    "of size 1, got float32[2,3,5,5]; give it the axes batch, heads, query and key":
        at(CROSS, X, memory=MEMORY, attention_bias=WIDE),
    "at (self_attention(3)): wants segments as ints of shape (2, 5), got float32[2,5]; number the "
    "sequences that share a row":
        at(OWN, X, segments=floats(2, 5)),
    "at (self_attention(3)): wants segments as ints of shape (2, 5), got int32[5]; number the "
    "sequences that share a row":
        at(OWN, X, segments=ints(5)),
    "at (self_attention(3, rotary=rotary())): wants positions as ints of shape (2, 5), got "
    "int32[5]; pass one for each step: jnp.broadcast_to(positions, x.shape[:-1])":
        at(TURNING, X, positions=ints(5)),
    "serial(at=self_attention(3)): wants only side inputs that it takes (attention_bias, "
    "attention_mask, mask, segments), got positions; leave it out, or add a layer that takes it":
        at(OWN, X, positions=ints(5)),
    "serial(at=cross_attention(3)): wants only side inputs that it takes (attention_bias, "
    "attention_mask, memory, memory_mask), got mask; leave it out, or add a layer that takes it":
        at(CROSS, X, memory=MEMORY, mask=bools(2, 5)),
    # Memory.
    "at (cross_attention(3)): wants the side input memory, got none; pass memory=, the encoder "
    "output, in each call: only a stream keeps it":
        at(CROSS, X),
    "at (cross_attention(3)): wants memory (..., time, features) with the leading axes of "
    "float32[2,5,12], got float32[1,7,3]; give it the leading axes of x":
        at(CROSS, X, memory=MEMORY[:1]),
    "at (cross_attention(3)): wants memory (..., time, features) with the leading axes of "
    "float32[2,5,12], got float32[7,3]; give it the leading axes of x":
        at(CROSS, X, memory=MEMORY[0]),
    "at (cross_attention(3)): wants as many keys as values in memory, got (float32[2,7,3], "
    "float32[2,4,3]); give each key one value":
        at(CROSS, X, memory=(MEMORY, MEMORY[:, :4])),
    "at (cross_attention(3)): wants memory as an array or a pair (keys, values), got "
    "(float32[2,7,3], float32[2,7,3], float32[2,7,3]); pass the input of the keys and that of the "
    "values":
        at(CROSS, X, memory=(MEMORY,) * 3),
    "at (cross_attention(3)): wants a mask of the leading axes of (2, 7, 3), got bool[2,5]":
        at(CROSS, X, memory=MEMORY, memory_mask=bools(2, 5)),
    "at (attention_head(4, causal=True)): wants no memory for a head that is causal or has rotary, "
    "got float32[2,7,3]; leave one of them out: memory and x do not share positions":
        at(dp.attention_head(4, causal=True), X, memory=MEMORY),
    "at (attention_head(4, rotary=rotary())): wants no memory for a head that is causal or has "
    "rotary, got float32[2,7,3]; leave one of them out: memory and x do not share positions":
        at(dp.attention_head(4, rotary=dp.rotary()), X, memory=MEMORY),
    "at (attention_head(4)): wants no segments together with memory, got int32[2,5]; pass "
    "attention_mask instead":
        at(HEAD, X, memory=MEMORY, segments=ints(2, 5)),
    "at (attention_head(4)): wants memory with its memory_mask, got memory_mask alone; pass "
    "memory= too, or mask= for x itself":
        at(HEAD, X, memory_mask=bools(2, 7)),
    # Inputs of apply.
    "cross_attention(3): wants the side input memory, got none; pass memory=, the encoder output, "
    "in each call: only a stream keeps it":
        lambda: CROSS(begun(CROSS)[0], X),
    "at (cross_attention(3)): wants attention_mask as booleans of shape (2, 3, 5, 7), or with axes "
    "of size 1, got int32[2,1,5,7]; give it the axes batch, heads, query and key":
        at(CROSS, X, memory=MEMORY, attention_mask=ints(2, 1, 5, 7)),
    "self_attention(3): wants params of 12 features, got {bias: float32[1], kernel: "
    "float32[12,12]}; pass what init returned":
        lambda: OWN(own_with("query"), X),
    "self_attention(3): wants params of 12 features, got {bias: float32[24], kernel: "
    "float32[12,24]}; pass what init returned":
        lambda: OWN(params(dp.self_attention(3, head_dim=8), X), X),
    "self_attention(3): wants state none, got key, real, value; pass state=, as init returned "
    "it":
        lambda: OWN.apply(params(OWN, X), begun(CROSS)[1], X),
    "self_attention(3, causal=True): wants state none, got key, real, value; pass state=, as "
    "init returned it":
        lambda: CAUSAL.apply(params(CAUSAL, X), begun(CROSS)[1], X),
    "cross_attention(3): wants the state of a stream, with key, real, value, got index, key, "
    "segment, segments, value; pass the state that start returned":
        lambda: dp.cross_attention(3).apply(begun(CROSS)[0], begun(CAUSAL)[1], X),
    # Streams.
    "self_attention(3): wants causal=True for a stream, got causal=False; set it: otherwise each "
    "step attends to later ones":
        start(OWN),
    "attention_head(4): wants causal=True for a stream, got causal=False; set it: otherwise each "
    "step attends to later ones":
        start(HEAD),
    "self_attention(3, causal=True): wants no attention_mask in a stream, got bool[1,1,1,1]; pass "
    "mask or segments, or set window":
        start(CAUSAL, attention_mask=jnp.ones((1, 1, 1, 1), bool)),
    "cross_attention(3): wants no attention_bias in a stream, got float32[1,1,1,1]; pass mask or "
    "segments, or set window":
        start(CROSS, memory=MEMORY, attention_bias=jnp.ones((1, 1, 1, 1))),
    "cross_attention(3): wants no attention_mask in a stream, got bool[1,1,1,1]; pass mask or "
    "segments, or set window":
        go_on(CROSS, attention_mask=jnp.ones((1, 1, 1, 1), bool)),
    "self_attention(3, causal=True): wants no attention_bias in a stream, got float32[1,1,1,1]; "
    "pass mask or segments, or set window":
        go_on(CAUSAL, attention_bias=jnp.ones((1, 1, 1, 1))),
    "self_attention(3, causal=True): wants a chunk of at most length=4 steps, got 5; start with a "
    "larger length, or pass fewer steps at a time":
        go_on(CAUSAL, X),
    "self_attention(3, causal=True): wants a chunk with batch axes (2,) in float32, as start saw, "
    "got float32[1,2,12]; start a new stream for another batch or dtype":
        go_on(CAUSAL, X[:1, :2]),
    "self_attention(3, causal=True): wants a chunk with batch axes (2,) in float32, as start saw, "
    "got bfloat16[2,2,12]; start a new stream for another batch or dtype":
        go_on(CAUSAL, X[:, :2].astype(jnp.bfloat16)),
    "self_attention(3, causal=True, window=2): wants a chunk with batch axes (2,) in float32, as "
    "start saw, got float32[1,2,12]; start a new stream for another batch or dtype":
        go_on(WINDOW, X[:1, :2]),
    "cross_attention(3): wants a chunk with batch axes (2,) in float32, as start saw, got "
    "float32[1,2,12]; start a new stream for another batch or dtype":
        go_on(CROSS, X[:1, :2]),
    "self_attention(3, causal=True, window=2): wants a chunk with batch axes (2,) in float32, as "
    "start saw, got bfloat16[2,2,12]; start a new stream for another batch or dtype":
        go_on(WINDOW, X[:, :2].astype(jnp.bfloat16)),
    "cross_attention(3): wants a chunk with batch axes (2,) in float32, as start saw, got "
    "bfloat16[2,2,12]; start a new stream for another batch or dtype":
        go_on(CROSS, X[:, :2].astype(jnp.bfloat16)),
    "cross_attention(3): wants a memory of the length with which the stream began, got "
    "float32[2,6,3]; start a new stream, or pad the memory":
        go_on(CROSS, memory=MEMORY[:, :6]),
    "cross_attention(3): wants memory with its memory_mask, got memory_mask alone; leave it out: "
    "the stream keeps the mask passed to start":
        go_on(CROSS, memory_mask=jnp.ones((2, 7), bool)),
    "attention_head(4): wants memory with its memory_mask, got memory_mask alone; leave it out: "
    "the stream keeps the mask passed to start":
        go_on(HEAD, memory_mask=jnp.ones((2, 7), bool)),
    # cuDNN.
    "at (self_attention(3, implementation='cudnn')): wants bfloat16 or float16, for cuDNN's "
    "attention, got (float32[2,3,5,4], float32[2,3,5,4]); leave implementation=None to choose by "
    "platform, dtype and shape":
        at(dp.self_attention(3, implementation="cudnn"), X),
    "wants bfloat16 or float16, for cuDNN's attention, got (float32[2,4,8,64], float32[2,4,8,64]); "
    "leave implementation=None to choose by platform, dtype and shape":
        by_cudnn(heads(jnp.float32), Pattern(causal=True)),
    "wants the larger size of keys and values as a multiple of 8 up to 128, for cuDNN's attention, "
    "got (bfloat16[2,4,8,60], bfloat16[2,4,8,60]); leave implementation=None to choose by "
    "platform, dtype and shape":
        by_cudnn(heads(features=60), Pattern(causal=True)),
    "wants only causal attention, a causal window, or a mask of keys, for cuDNN's attention, got "
    "(bfloat16[2,4,8,64], bfloat16[2,4,8,64]); leave implementation=None to choose by platform, "
    "dtype and shape":
        by_cudnn(heads(), Pattern(mask=jnp.ones((2, 1, 8, 8), bool))),
    "wants static sizes, for cuDNN's attention, got (bfloat16[b,4,8,64], bfloat16[b,4,8,64]); "
    "leave implementation=None to choose by platform, dtype and shape":
        by_cudnn(of_any_batch(), Pattern(causal=True)),
    "wants a mesh whose axis_types are not Explicit, for cuDNN's attention, got "
    "(bfloat16[2,4,8,64], bfloat16[2,4,8,64]); leave implementation=None to choose by platform, "
    "dtype and shape":
        on_an_explicit_mesh,
    "wants cuDNN, which comes with JAX for NVIDIA GPUs, got cuDNN is not detected; leave "
    "implementation=None to choose by platform, dtype and shape":
        without_cudnn,
}
