"""What attention layers refuse, and what they say then: every message is read here."""

import jax.numpy as jnp
import pytest
from comparing import KEY
from refusing import expect

import diffprog as dp

X, MEMORY = jnp.ones((2, 5, 12)), jnp.ones((2, 7, 3))
FULL, OVER = "(2, 3, 5, 5)", "or 1 for axes that are alike"
AXES = "its axes are batch, heads, query and key"
STREAM = "mask, segments and window say what a chunk may see"
OWN, CROSS = dp.self_attention(3), dp.cross_attention(3)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: dp.self_attention(0), "self_attention(0): wants heads, an int of at least 1, got 0; "
                                   "pass a Python int"),
    (lambda: dp.self_attention(4, kv_heads=3),
     "self_attention(4, kv_heads=3): wants kv_heads that divide heads=4, got 3; each is shared by "
     "equally many heads of queries"),
    (lambda: dp.cross_attention(2, kv_heads=0),
     "cross_attention(2, kv_heads=0): wants kv_heads, an int of at least 1, got 0; pass a Python "
     "int"),
    (lambda: dp.attention_head(4, 0), "attention_head(4, value_features=0): wants value_features, "
                                      "an int of at least 1, got 0; pass a Python int"),
    (lambda: dp.attention_head(2.0), "attention_head(2.0): wants features, an int of at least 1, "
                                     "got 2.0; pass a Python int"),
    (lambda: dp.self_attention(2, head_dim=0), "self_attention(2, head_dim=0): wants head_dim, an "
                                               "int of at least 1, got 0; pass a Python int"),
    (lambda: dp.self_attention(2, window=3),
     "self_attention(2, window=3): wants causal=True with a window, got causal=False; a window "
     "looks back; give attention_mask for another pattern"),
    (lambda: dp.self_attention(2, causal=True, window=0),
     "self_attention(2, causal=True, window=0): wants window, an int of at least 1, got 0; pass a "
     "Python int"),
    (lambda: dp.self_attention(2, rotary=True),
     "self_attention(2, rotary=True): wants rotary as dp.rotary makes it, got True; for example "
     "dp.rotary(base=10000.0)"),
    (lambda: dp.self_attention(2, dropout=50),
     "self_attention(2, dropout=50): wants dropout in [0, 1), got 50; pass a share, not a "
     "percentage"),
    (lambda: dp.cross_attention(2, implementation="flash"),
     "cross_attention(2, implementation='flash'): wants an implementation (blocks, cudnn, xla) or "
     "None, got 'flash'; None chooses by platform, dtype and shape"),
])
def test_settings_are_refused_at_composition(make, message):
    expect("", message, make)


@pytest.mark.parametrize(("layer", "x", "side", "message"), [
    (dp.self_attention(5), X, {}, "wants a width that is a multiple of heads=5, got "
     "float32[2,5,12]; choose another number of heads, or give head_dim"),
    (OWN, X[0, 0], {}, "wants at least 2 axes (..., time, features), got float32[12]; add the "
     "missing axes"),
    (OWN, jnp.ones((2, 5, 12), int), {}, "wants floating-point input, got int32[2,5,12]; convert "
     "it: x.astype(jnp.float32)"),
    (dp.self_attention(4, rotary=dp.rotary()), X, {}, "wants an even number of features that turn, "
     "got 3 in float32[2,4,5,3]; features turn in pairs; choose an even number"),
    (dp.self_attention(3, rotary=dp.rotary(features=6)), X, {}, "wants at least the 6 features "
     "that turn, got float32[2,3,5,4]; give more features, or turn fewer"),
    (OWN, X, {"mask": jnp.ones((2, 5))}, "wants a mask of booleans, got float32[2,5]; True marks "
     "what is real"),
    (OWN, X, {"mask": jnp.ones((2, 4), bool)}, "wants a mask of the leading axes of (2, 5, 12), "
     "got bool[2,4]; where the time axis changes length, name mask in a program and pass on the "
     "new one"),
    (OWN, X, {"attention_mask": jnp.ones((2, 3, 5, 5))}, f"wants attention_mask as booleans of "
     f"shape {FULL}, {OVER}, got float32[2,3,5,5]; {AXES}"),
    (OWN, X, {"attention_mask": jnp.ones((5, 5), bool)}, f"wants attention_mask as booleans of "
     f"shape {FULL}, {OVER}, got bool[5,5]; {AXES}"),
    (OWN, X, {"attention_mask": jnp.ones((2, 2, 5, 5), bool)}, f"wants attention_mask as booleans "
     f"of shape {FULL}, {OVER}, got bool[2,2,5,5]; {AXES}"),
    (OWN, X, {"attention_bias": jnp.ones((2, 3, 5, 5), bool)}, f"wants attention_bias as floats of "
     f"shape {FULL}, {OVER}, got bool[2,3,5,5]; {AXES}"),
    (CROSS, X, {"memory": MEMORY, "attention_bias": jnp.ones((2, 3, 5, 5))},
     f"wants attention_bias as floats of shape (2, 3, 5, 7), {OVER}, got float32[2,3,5,5]; {AXES}"),
    (OWN, X, {"segments": jnp.zeros((2, 5))}, "wants segments as ints of shape (2, 5), got "
     "float32[2,5]; number the sequences that share a row"),
    (OWN, X, {"segments": jnp.zeros(5, int)}, "wants segments as ints of shape (2, 5), got "
     "int32[5]; number the sequences that share a row"),
    (dp.self_attention(3, rotary=dp.rotary()), X, {"positions": jnp.arange(5)}, "wants positions "
     "as ints of shape (2, 5), got int32[5]; give one to each step: "
     "jnp.broadcast_to(positions, x.shape[:-1])"),
    (CROSS, X, {}, "wants the side input memory, got none; pass memory=, what is to be asked, in "
     "every call but a stream's"),
    (CROSS, X, {"memory": MEMORY[:1]}, "wants memory (..., time, features) for each example of "
     "float32[2,5,12], got float32[1,7,3]; give it the leading axes of x"),
    (CROSS, X, {"memory": MEMORY[0]}, "wants memory (..., time, features) for each example of "
     "float32[2,5,12], got float32[7,3]; give it the leading axes of x"),
    (CROSS, X, {"memory": (MEMORY, MEMORY[:, :4])}, "wants as many keys as values in memory, got "
     "(float32[2,7,3], float32[2,4,3]); each key belongs to one value"),
    (CROSS, X, {"memory": (MEMORY,) * 3}, "wants memory as an array or a pair (keys, values), got "
     "(float32[2,7,3], float32[2,7,3], float32[2,7,3]); pass what makes keys, and what makes "
     "values"),
    (CROSS, X, {"memory": MEMORY, "memory_mask": jnp.ones((2, 5), bool)}, "wants a mask of the "
     "leading axes of (2, 7, 3), got bool[2,5]; where the time axis changes length, name mask in a "
     "program and pass on the new one"),
    (dp.attention_head(4, causal=True), X, {"memory": MEMORY}, "wants no memory for a head that is "
     "causal or has rotary, got float32[2,7,3]; the order of a memory is not that of x"),
    (dp.attention_head(4, rotary=dp.rotary()), X, {"memory": MEMORY}, "wants no memory for a head "
     "that is causal or has rotary, got float32[2,7,3]; the order of a memory is not that of x"),
    (dp.attention_head(4), X, {"memory": MEMORY, "segments": jnp.zeros((2, 5), int)}, "wants no "
     "segments beside memory, got int32[2,5]; give attention_mask"),
    (dp.attention_head(4), X, {"memory_mask": jnp.ones((2, 7), bool)}, "wants memory with its "
     "memory_mask, got memory_mask alone; pass memory= too, or mask= for x itself"),
    (dp.self_attention(3, implementation="cudnn"), X, {}, "wants bfloat16 or float16, for cuDNN's "
     "attention, got (float32[2,3,5,4], float32[2,3,5,4]); leave the choice of the implementation "
     "to the layer"),
])
def test_inputs_are_refused_at_init_with_the_path(layer, x, side, message):
    net = dp.serial(block=dp.serial(attend=layer))
    expect("block/attend", f"block/attend ({layer!r}): {message}", net.init, KEY, x, **side)


def test_what_has_no_meaning_is_not_taken():
    more = "leave it out, or add a layer that takes it"
    expect("", "self_attention(3): wants only side inputs that it takes (attention_bias, "
           f"attention_mask, mask, segments), got positions; {more}",
           OWN.init, KEY, X, positions=jnp.arange(5))
    expect("", "cross_attention(3): wants only side inputs that it takes (attention_bias, "
           f"attention_mask, memory, memory_mask), got mask; {more}",
           CROSS.init, KEY, X, memory=MEMORY, mask=jnp.ones((2, 5), bool))


def test_what_init_saw_is_asked_of_apply():
    params, _ = CROSS.init(KEY, X, memory=MEMORY)
    expect("", "cross_attention(3): wants the side input memory, got none; pass memory=, what is "
           "to be asked, in every call but a stream's", CROSS, params, X)
    expect("", f"cross_attention(3): wants attention_mask as booleans of shape (2, 3, 5, 7), "
           f"{OVER}, got int32[2,1,5,7]; {AXES}", CROSS, params, X, memory=MEMORY,
           attention_mask=jnp.ones((2, 1, 5, 7), int))


def stream(layer, **side):
    """Parameters and a streaming state of 4 steps."""
    params, state = layer.init(KEY, X, **side)
    return params, layer.start(params, state, X[:, :1], length=4, **side)


def test_what_cannot_stream_says_so():
    for layer in (OWN, dp.attention_head(4)):
        params, _ = layer.init(KEY, X)
        expect("", f"{layer!r}: wants causal=True for a stream, got causal=False; without it every "
               "position sees later ones", layer.start, params, {}, X, length=4)
    params, _ = CROSS.init(KEY, X, memory=MEMORY)
    expect("", "cross_attention(3): wants the side input memory, got none; pass memory=, what is "
           "to be asked, in every call but a stream's", CROSS.start, params, {}, X, length=4)


@pytest.mark.parametrize("name", ["attention_mask", "attention_bias"])
def test_explicit_patterns_are_refused_while_streaming(name):
    given = {name: jnp.ones((1, 1, 1, 1), bool if name == "attention_mask" else jnp.float32)}
    shown = dp.notation.show(given[name])
    for layer, side in ((dp.self_attention(3, causal=True), {}), (CROSS, {"memory": MEMORY})):
        params, state = stream(layer, **side)
        message = f"{layer!r}: wants no {name} in a stream, got {shown}; {STREAM}"
        expect("", message, layer.start, params, {}, X[:, :1], length=4, **side, **given)
        expect("", message, layer.apply, params, state, X[:, :1], **given)


def test_a_stream_is_of_one_length_and_one_batch():
    layer = dp.self_attention(3, causal=True)
    params, state = stream(layer)
    expect("", "self_attention(3, causal=True): wants a chunk of at most length=4 steps, got 5; "
           "start with a larger length, or pass on fewer steps at a time",
           layer.apply, params, state, X)
    for net, side in ((layer, {}), (dp.self_attention(3, causal=True, window=2), {}),
                      (CROSS, {"memory": MEMORY})):
        params, state = stream(net, **side)
        expect("", f"{net!r}: wants a chunk with batch axes (2,) in float32, as start saw, got "
               "float32[1,2,12]; start anew for another batch or dtype",
               net.apply, params, state, X[:1, :2])
        expect("", f"{net!r}: wants a chunk with batch axes (2,) in float32, as start saw, got "
               "bfloat16[2,2,12]; start anew for another batch or dtype",
               net.apply, params, state, jnp.bfloat16(X[:, :2]))


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
def test_a_bias_of_one_feature_is_not_broadcast(name):
    params, _ = OWN.init(KEY, X)
    params[name]["bias"] = jnp.zeros(1)
    expect("", "self_attention(3): wants params of 12 features, got {kernel: float32[12,12], bias: "
           "float32[1]}; pass what init gave", OWN.apply, params, {}, X)


def test_parameters_of_other_heads_are_refused():
    params, _ = dp.self_attention(3, head_dim=8).init(KEY, X)
    expect("", "self_attention(3): wants params of 12 features, got {kernel: float32[12,24], bias: "
           "float32[24]}; pass what init gave", OWN.apply, params, {}, X)


def test_the_state_of_another_stream_is_refused():
    _, state = stream(CROSS, memory=MEMORY)
    own = dp.self_attention(3, causal=True)
    for layer in (OWN, own):
        expect("", f"{layer!r}: wants state none, got key, real, value; pass state=, as init gave "
               "it", layer.apply, layer.init(KEY, X)[0], state, X)
    _, state = stream(own)
    expect("", "cross_attention(3): wants the state of a stream, with key, real, value, got index, "
           "key, segment, segments, value; pass what start gave",
           dp.cross_attention(3).apply, CROSS.init(KEY, X, memory=MEMORY)[0], state, X)


def test_a_new_memory_in_a_stream_is_as_long_as_the_old_one():
    params, state = stream(CROSS, memory=MEMORY)
    expect("", "cross_attention(3): wants a memory of the length with which the stream began, got "
           "float32[2,6,3]; start anew, or pad it",
           CROSS.apply, params, state, X[:, :1], memory=MEMORY[:, :6])
    for layer in (CROSS, dp.attention_head(4)):
        params, state = stream(layer, memory=MEMORY)
        expect("", f"{layer!r}: wants memory with its memory_mask, got memory_mask alone; the "
               "stream keeps the mask that start was given",
               layer.apply, params, state, X[:, :1], memory_mask=jnp.ones((2, 7), bool))


def test_a_stream_of_an_equal_head_needs_no_memory_either():
    first, second = (dp.attention_head(4) for _ in range(2))
    params, state = stream(first, memory=MEMORY)
    y, _ = second.apply(params, state, X[:, :1])
    assert y.shape == (2, 1, 4)
