"""What is refused when it is composed: counts, names, signatures, what is no layer, patterns."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
from support.refusing import KEY, X, program, twice

import diffprog as dp

LINEAR = dp.linear(3)
NET = dp.serial(body=dp.serial(LINEAR, jnp.tanh), head=LINEAR)


def without_x(layers):
    pass


def starred(layers, *args):
    pass


def positional(layers, x, mask):
    pass


def with_default(layers, x, mask=None):
    pass


def double_starred(layers, x, **side):
    pass


def takes_params(layers, x, *, params=None):
    return layers.lin(x)


def takes_state(layers, x, *, state=None):
    return layers.lin(x)


def takes_key(layers, x, *, key=None):
    return layers.lin(x)


def takes_length(layers, x, *, length=None):
    return layers.lin(x)


def takes_x(layers, inputs, *, x=None):
    return layers.lin(inputs)


@dp.program(f=LINEAR, noise=LINEAR)
def noisy(layers, x, *, train):
    return layers.f(x) + (layers.noise(x) if train else 0)


def tapped_in_inference():
    net = dp.tap(noisy, "*")
    params, state = net.init(KEY, X)
    net(params, X, state=state)


def doubled(params, state, x, **given):
    y, state = dp.serial(LINEAR).apply(params, state, x, **given)
    return 2 * y, state


CHANGED = dataclasses.replace(dp.serial(LINEAR), apply=doubled)


def grows(params, state, x, **_):
    return x, {**state, "more": state["some"]}


GROWS = dp.Layer(lambda key, x: ({}, {"some": jnp.zeros(())}), grows, name="grows")


def growing():
    net = dp.repeat(2, GROWS)
    net.apply({}, {"some": jnp.zeros(2)}, X)


def nested():
    net = LINEAR
    for _ in range(400):
        net = dp.residual(net)
    return net


def local():
    def halved(x):
        return x / 2

    halved.__qualname__ = "halved"  # which is shown without a line
    return halved


EXAMPLES = {
    # What is too deep.
    "residual: wants a net nested less deeply, got more levels than Python's stack holds; "
    "write repeat(n, layer) for copies, or layer ** n for a chain: neither adds depth":
        lambda: repr(nested()),
    # What is pickled.
    "serial(halved): wants functions that a module has by name, to be pickled, got halved; use "
    "cloudpickle, which pickles functions by value, or define it by def in a module":
        lambda: pickle.dumps(dp.serial(local())),
    # Arguments.
    "linear(0): wants features as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.linear(0),
    "linear(True): wants features as an int of at least 1, got True; pass a Python int":
        lambda: dp.linear(True),
    "linear(2.5): wants features as an int of at least 1, got 2.5; pass a Python int":
        lambda: dp.linear(2.5),
    "flatten(keep=-1): wants keep as an int of at least 0, got -1; pass 0 or more":
        lambda: dp.flatten(keep=-1),
    "repeat(0, linear(3)): wants n as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.repeat(0, LINEAR),
    "repeat(True, linear(3)): wants n as an int of at least 1, got True; pass a Python int":
        lambda: dp.repeat(True, LINEAR),
    "repeat(linear(3), 2): wants n as an int of at least 1, got linear(3); give the number first, "
    "as in repeat(3, layer)":
        lambda: dp.repeat(LINEAR, 2),
    "repeat(2, linear(3), unroll=0): wants unroll as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.repeat(2, LINEAR, unroll=0),
    "heads(0, linear(3)): wants n as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.heads(0, LINEAR),
    "wants the exponent of a layer as an int of at least 1, got 0; pass 1 or more":
        lambda: LINEAR**0,
    "wants the exponent of a layer as an int of at least 1, got 1.5; pass a Python int":
        lambda: LINEAR**1.5,
    "dropout(-0.1): wants rate in [0, 1), got -0.1; pass a fraction, not a percentage":
        lambda: dp.dropout(-0.1),
    "dropout(1): wants rate in [0, 1), got 1; pass a fraction, not a percentage":
        lambda: dp.dropout(1),
    "dropout(1.5): wants rate in [0, 1), got 1.5; pass a fraction, not a percentage":
        lambda: dp.dropout(1.5),
    "dropout(True): wants rate in [0, 1), got True; pass a number, a Python float":
        lambda: dp.dropout(True),
    "dropout(False): wants rate in [0, 1), got False; pass a number, a Python float":
        lambda: dp.dropout(False),
    "dropout('0.5'): wants rate in [0, 1), got '0.5'; pass a number, a Python float":
        lambda: dp.dropout("0.5"),
    "dropout(float32[]): wants rate in [0, 1), got float32[]; pass a number, a Python float":
        lambda: dp.dropout(jnp.float32(0.1)),
    "dropout(nan): wants rate in [0, 1), got nan; pass a fraction, not a percentage":
        lambda: dp.dropout(float("nan")),
    "batch_norm(momentum=1.0): wants momentum in [0, 1), got 1.0; pass a fraction, not a "
    "percentage":
        lambda: dp.batch_norm(momentum=1.0),
    "linear(3, kernel_init=-0.1): wants kernel_init as a function (key, shape, dtype), a "
    "standard deviation or a name (delta_orthogonal, glorot_normal, glorot_uniform, he_normal, "
    "he_normal_fan_out, he_uniform, lecun_normal, lecun_uniform, normal, ones, orthogonal, "
    "truncated_normal, zeros), got -0.1":
        lambda: dp.linear(3, kernel_init=-0.1).init(KEY, X),
    "linear(3, kernel_init='xavier'): wants kernel_init as a function (key, shape, dtype), a "
    "standard deviation or a name (delta_orthogonal, glorot_normal, glorot_uniform, he_normal, "
    "he_normal_fan_out, he_uniform, lecun_normal, lecun_uniform, normal, ones, orthogonal, "
    "truncated_normal, zeros), got 'xavier'":
        lambda: dp.linear(3, kernel_init="xavier").init(KEY, X),
    "gru(3, hidden_init='he'): wants hidden_init as a function (key, shape, dtype), a standard "
    "deviation or a name (delta_orthogonal, glorot_normal, glorot_uniform, he_normal, "
    "he_normal_fan_out, he_uniform, lecun_normal, lecun_uniform, normal, ones, orthogonal, "
    "truncated_normal, zeros), got 'he'":
        lambda: dp.gru(3, hidden_init="he").init(KEY, X),
    "remat(linear(3), policy='all'): wants policy out of dots_saveable, "
    "dots_with_no_batch_dims_saveable, everything_saveable, nothing_saveable, got 'all'; choose "
    "one of them, or pass one of jax.checkpoint_policies itself":
        lambda: dp.remat(LINEAR, policy="all"),
    "mixed(linear(3), jnp.int32): wants a floating-point dtype, got jnp.int32; pass jnp.bfloat16, "
    "for example":
        lambda: dp.mixed(LINEAR, jnp.int32),
    "mixed(linear(3), 'bf16'): wants a floating-point dtype, got 'bf16'; pass jnp.bfloat16, for "
    "example":
        lambda: dp.mixed(LINEAR, "bf16"),
    "mixed(linear(3), None): wants a floating-point dtype, got None; pass jnp.bfloat16, for "
    "example":
        lambda: dp.mixed(LINEAR, None),
    "mixed(linear(3), 16): wants a floating-point dtype, got 16; pass jnp.bfloat16, for example":
        lambda: dp.mixed(LINEAR, 16),
    "pin(linear(3), train=0): wants train as a Python bool, got 0; pass True for training, or "
    "False for inference":
        lambda: dp.pin(LINEAR, train=0),
    "hyper(jax.nn.tanh, linear(3)): wants a target with parameters, got jax.nn.tanh; pass "
    "dp.linear(8), for example: this one has nothing to generate":
        lambda: dp.hyper(jnp.tanh, LINEAR),
    "fixed_point(linear(3), steps=0): wants steps as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.fixed_point(LINEAR, steps=0),
    "fixed_point(linear(3), tolerance=0): wants tolerance as a positive number, got 0; pass "
    "1e-4, for example, or None for the default of the dtype":
        lambda: dp.fixed_point(LINEAR, tolerance=0),
    "fixed_point(serial(add, batch_norm())): wants a layer without state, got batch_norm_0/mean, "
    "batch_norm_0/var; use layer_norm in place of batch_norm: the solver applies the layer many "
    "times per call":
        lambda: dp.fixed_point(dp.add >> dp.batch_norm()).init(KEY, X),
    "fixed_point(serial(add, linear(3))): wants a layer that keeps the shape and dtype of z, "
    "float32[2,4], got float32[2,3]; let its output have the shape and dtype of x":
        lambda: dp.fixed_point(dp.add >> LINEAR).init(KEY, X),
    "fixed_point(add): wants floating-point input, got int32[2,4]; convert it: "
    "x.astype(jnp.float32)":
        lambda: dp.fixed_point(dp.add).init(KEY, X.astype(int)),
    # What is no layer, and no program of layers.
    "serial(functools.partial(linear, 3)): wants a layer, got the function linear; call it: "
    "linear(...)":
        lambda: dp.serial(functools.partial(dp.linear, 3)),
    "residual(linear): wants a layer, got the function linear; call it: linear(...)":
        lambda: dp.residual(dp.linear),
    "serial([linear(3)]): wants a layer, got [linear(3)]; write serial(a, b) for a sequence of "
    "layers, and Layer(init, apply) for a pair of functions":
        lambda: dp.serial([LINEAR]),
    "serial('relu'): wants a layer or a function of one input, got 'relu'":
        lambda: dp.serial("relu"),
    "pre_norm(ffn(4), norm=0.1): wants a layer or a function of one input, got 0.1":
        lambda: dp.pre_norm(dp.ffn(4), 0.1),
    "add_norm(ffn): wants a layer, got the function ffn; call it: ffn(...)":
        lambda: dp.add_norm(dp.ffn),
    "recurrent(lstm): wants a layer, got the function lstm; call it: lstm(...)":
        lambda: dp.recurrent(dp.lstm),
    "serial(linear(3), linear_0=linear(2)): wants children of different names, got 'linear_0' "
    "twice":
        lambda: dp.serial(LINEAR, linear_0=dp.linear(2)),
    "serial(a/b=linear(3)): wants a name without leading _ and / * @ ~ #, got 'a/b'; rename "
    "it: these characters have a meaning in paths":
        lambda: dp.serial(**{"a/b": LINEAR}),
    "wants a name without leading _ and / * @ ~ #, got '_x'; rename it: these characters have "
    "a meaning in paths":
        lambda: dp.program(_x=LINEAR),
    "wants a program f(layers, x, *, side inputs), got without_x(layers); put side inputs after "
    "the star":
        lambda: program(without_x, lin=LINEAR),
    "wants a program f(layers, x, *, side inputs), got starred(layers, *args); put side inputs "
    "after the star":
        lambda: program(starred, lin=LINEAR),
    "wants a program f(layers, x, *, side inputs), got positional(layers, x, mask); put side "
    "inputs after the star":
        lambda: program(positional, lin=LINEAR),
    "wants a program f(layers, x, *, side inputs), got with_default(layers, x, mask=None); put "
    "side inputs after the star":
        lambda: program(with_default, lin=LINEAR),
    "wants a program f(layers, x, *, side inputs), got double_starred(layers, x, **side); put "
    "side inputs after the star":
        lambda: program(double_starred, lin=LINEAR),
    "wants side inputs of other names than key, length, params, state, x, got params; rename them":
        lambda: program(takes_params, lin=LINEAR),
    "wants side inputs of other names than key, length, params, state, x, got state; rename them":
        lambda: program(takes_state, lin=LINEAR),
    "wants side inputs of other names than key, length, params, state, x, got key; move the "
    "random part into a layer, Layer(..., random=True)":
        lambda: program(takes_key, lin=LINEAR),
    "wants side inputs of other names than key, length, params, state, x, got length; rename them":
        lambda: program(takes_length, lin=LINEAR),
    "wants side inputs of other names than key, length, params, state, x, got x; rename them":
        lambda: program(takes_x, lin=LINEAR),
    # Patterns.
    "wants a pattern that matches a path (body/kernel), got '*/bias'":
        lambda: dp.tree.select({"body": {"kernel": X}}, "*/bias"),
    "wants a pattern that matches a layer (body, body/linear_0, body/tanh~0, head), got 'tail'; "
    "correct it: * is one level, ** any number":
        lambda: dp.replace(NET, "tail", LINEAR),
    "body/tanh~0 (jax.nn.tanh): wants a function from a layer to a layer, got jax.nn.gelu, which "
    "takes no layer; write lambda old: jax.nn.gelu for an activation":
        lambda: dp.replace(NET, "body/tanh~0", jax.nn.gelu),
    "head (linear(3)): wants a layer or a function of one input, got 3":
        lambda: dp.replace(NET, "head", lambda old: 3),
    "at (serial(linear(3))): wants rebuild, to make it with another linear_0, got none; pass "
    "rebuild=lambda children: ...: dataclasses.replace resets it with other functions, unless "
    "it is passed too":
        lambda: dp.replace(dp.serial(at=CHANGED), "at/linear_0", dp.remat),
    "tap(linear(3), 'kernel'): wants a pattern that matches a layer (none), got 'kernel'; correct "
    "it: * is one level, ** any number":
        lambda: dp.tap(LINEAR, "kernel"),
    "tap(serial(body=linear(3), a=self_attention(1)), 'body', attention_weights=True): wants a "
    "pattern that matches an attention layer (a), got 'body'; correct it: * is one level, ** any "
    "number":
        lambda: dp.tap(dp.serial(body=LINEAR, a=dp.self_attention(1)), "body",
                       attention_weights=True),
    "tap(twice(lin=linear(4)), 'lin'): wants one call of lin, got 2 calls; tap a layer around "
    "it, or use a separate layer for each call":
        lambda: dp.tap(program(twice, lin=dp.linear(4)), "lin").init(KEY, X),
    "tap(noisy(f=linear(3), noise=linear(3)), '*'): wants a call of noise, got none with "
    "train=False; tap a layer that is called in both modes":
        tapped_in_inference,
    "grows: wants a state of unchanged structure, {some: float32[]}, got {some: float32[], "
    "more: float32[]}; let apply return the given state, with new values":
        growing,
}
