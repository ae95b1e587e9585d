"""What init, apply and start refuse of any layer: inputs, keys, trees, side inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.refusing import (
    KEY,
    X,
    early,
    first_row,
    forgets,
    give_layer,
    halve,
    mask_taker,
    nope,
    nope_in_brackets,
    once,
    program,
    twice,
)

import diffprog as dp
from errors.given import at, floats, ints, params, zeros

LINEAR, NORM = dp.linear(3), dp.batch_norm()
NET = dp.serial(lin=dp.linear(4), body=dp.serial(norm=NORM))
DROP = dp.serial(a=dp.serial(dp.dropout(0.5)))
SERIES = jnp.ones((2, 6, 4))


@functools.cache
def trees():
    return NET.init(KEY, X)


def on_an_explicit_mesh():
    """Copies of a convolution, in a stream: `jax.vmap` makes of them one in groups."""
    net = dp.heads(2, dp.conv(2, 2, dims=1, padding="CAUSAL"))
    params, _ = net.init(KEY, SERIES)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(SERIES, jax.NamedSharding(mesh, jax.P("data")))
    net.apply(params, net.start(params, {}, x, length=6), x)


def apply(*, own=None, state=None, x=X):
    """Apply the net to its trees, changed in part."""
    NET.apply(trees()[0] | (own or {}), trees()[1] | (state or {}), x)


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


def gives_nothing(x):
    pass


def inside():
    @dp.program(lin=LINEAR)
    def f(layers, x):
        return LINEAR(x)

    dp.serial(a=f).init(KEY, X)


def foreign_mask():
    @dp.program(lin=LINEAR)
    def f(layers, x, *, mask=None):
        return layers.lin(x, mask=mask)

    dp.serial(a=f).init(KEY, X, mask=X)


@dp.program(act=abs)
def asks(layers, x):
    return layers.act(x, x)


@dp.program(act=abs)
def shows(layers, x):
    return layers.act


@dp.program(run=dp.recurrent(dp.gru(4)))
def as_often_as_long(layers, x):
    for _ in range(x.shape[1]):
        x = layers.run(x)
    return x


def streamed(begun, called):
    """A stream of as many steps as it began with, and one of another number."""
    own = params(as_often_as_long, SERIES)
    state = zeros(lambda: as_often_as_long.start(own, {}, SERIES[:, :begun], length=6))
    jax.eval_shape(as_often_as_long.apply, own, state, SERIES[:, :called])


HYPER = dp.hyper(LINEAR, dp.linear(2))


def mapped(layers, x):
    return jax.vmap(layers.f)(x)


def scanned(layers, x):
    return jax.lax.scan(lambda carry, x: (carry, layers.f(x)), 0, x)[1]


def init_hyper(layer, condition=X):
    layer.init(KEY, X, condition=condition)


def noisy_always(params, state, x, *, key=None, train=False):
    return x + jax.random.normal(key, x.shape), state


def noise(**record):
    return dp.Layer(lambda key, x: ({}, {}), noisy_always, name="noise", **record)


def counting(params, state, x, **side):
    return x, {"count": state["count"] + 1}


def counter(start):
    return dp.Layer(lambda key, x, **side: ({}, {}), counting, start, name="counter")


EXAMPLES = {
    "at (counter): wants an apply that also runs without a carry, got one that reads it from "
    "{}; begin it with carry = state or start(params, state, x, length=1), and return the "
    "given state if it is empty":
        at(counter(lambda params, state, x, **side: {"count": jnp.zeros(2)}), X),
    "counter: wants a start that returns a dict, got float32[2]; name what is carried: "
    "{'carry': h}":
        lambda: counter(lambda params, state, x, **side: jnp.zeros(2)).start({}, {}, X, length=1),
    "noise: wants a layer that is declared random, got random=False; pass Layer(init, apply, "
    "random=True): no other layer gets a key":
        lambda: noise().apply({}, {}, X, key=KEY, train=True),
    "at (noise): wants a layer that needs no key at inference, got one that draws without a "
    "key; return the output without noise, or its mean, if key is None":
        at(noise(random=True), X),
    "at (scaled): wants an init that reads shapes and dtypes of x alone, got one that computes "
    "with x; set data-dependent parameters after init, as in params | {'scale': 1 / x.std(0)}: "
    "inside a net, tap shows the input of a layer":
        at(dp.stateless(lambda key, x: {"scale": 1 / x.std(0)}, lambda params, x: x, name="scaled"),
           floats(2, 4)),
    "linear(3): wants an array of numbers, got object[2]; convert it: encode text as ints, and "
    "stack the columns of a table":
        lambda: LINEAR.init(KEY, np.array([1, None])),
    # Inputs.
    "linear(3): wants an array or a jax.ShapeDtypeStruct, got the shape (2, 4); write "
    "jax.ShapeDtypeStruct((2, 4), jnp.float32)":
        lambda: LINEAR.init(KEY, (2, 4)),
    "serial(a=abs): wants an array or a jax.ShapeDtypeStruct, got the shape [2, 4]; write "
    "jax.ShapeDtypeStruct((2, 4), jnp.float32)":
        lambda: dp.serial(a=abs).init(KEY, [2, 4]),
    "serial(a=linear(3)): wants arrays or jax.ShapeDtypeStructs, got 1.0; use jnp.asarray":
        lambda: dp.serial(a=LINEAR).init(KEY, 1.0),
    "serial(a=linear(3)): wants arrays or jax.ShapeDtypeStructs, got 2.0; use jnp.asarray":
        lambda: dp.serial(a=LINEAR).init(KEY, [X, 2.0]),
    "serial(a=linear(3)): wants arrays or jax.ShapeDtypeStructs, got 3.5; use jnp.asarray":
        lambda: dp.serial(a=LINEAR).init(KEY, {"a": 3.5}),
    "serial(a=linear(3)): wants arrays or jax.ShapeDtypeStructs, got 3; use jnp.asarray":
        lambda: dp.serial(a=LINEAR).init(KEY, 3),
    "serial(a=linear(3)): wants arrays or jax.ShapeDtypeStructs, got True; use jnp.asarray":
        lambda: dp.serial(a=LINEAR).init(KEY, True),
    "linear(3): wants a key, got 0":
        lambda: LINEAR.init(0, X),
    "linear(3): wants a key, got float32[2,4]":
        lambda: LINEAR.init(X, X),
    "serial(a=abs): wants a key, got None":
        lambda: dp.serial(a=abs).init(None, X),
    "at (linear(3)): wants at least 1 axis (..., features), got float32[]; add the missing axes":
        at(LINEAR, floats()),
    "at (linear(3)): wants one array, got (float32[2,4], float32[2,4]); pick one part of it with "
    "a lambda":
        at(LINEAR, (X, X)),
    "at (linear(3)): wants floating-point input, got int32[2,4]; convert it: x.astype(jnp.float32)":
        at(LINEAR, ints(2, 4)),
    "at (heads(2, branch(linear(3), linear(3)))): wants one array, got (float32[2,3], "
    "float32[2,3]); pick one part of it with a lambda":
        at(dp.heads(2, dp.branch(LINEAR, LINEAR)), X),
    # What layers and programs give.
    "at (residual(linear(9))): wants a body that keeps the shape of x, float32[2,4], got "
    "float32[2,9]; give it as many features, or a shortcut of the same shape":
        at(dp.residual(dp.linear(9)), X),
    "at (residual(halve)): wants a body that keeps the shape of x, float32[2,4], got "
    "bfloat16[2,4]; give it as many features, or a shortcut of the same shape":
        at(dp.residual(halve), X),
    "at (residual(first_row)): wants a body that keeps the shape of x, float32[2,4], got "
    "float32[1,4]; give it as many features, or a shortcut of the same shape":
        at(dp.residual(first_row), X),
    "at (residual(linear(9), shortcut=linear(3))): wants a body that keeps the shape of the "
    "shortcut, float32[2,3], got float32[2,9]; give it as many features, or a shortcut of the "
    "same shape":
        at(dp.residual(dp.linear(9), LINEAR), X),
    "at (repeat(3, linear(5))): wants a layer that keeps the shape and dtype of x, float32[2,4], "
    "got float32[2,5]; let its output have the shape and dtype of its input":
        at(dp.repeat(3, dp.linear(5)), X),
    "at (repeat(3, halve)): wants a layer that keeps the shape and dtype of x, float32[2,4], got "
    "bfloat16[2,4]; let its output have the shape and dtype of its input":
        at(dp.repeat(3, halve), X),
    "at (parallel(abs, abs, abs)): wants a tuple of 3 inputs, one for each layer, got "
    "(float32[2,4], float32[2,4]); give each layer its part, or use branch for one input":
        at(dp.parallel(abs, abs, abs), (X, X)),
    "at (parallel(linear(3), linear(3))): wants a tuple of 2 inputs, one for each layer, got "
    "(float32[2,4], float32[2,4], float32[2,4]); give each layer its part, or use branch for one "
    "input":
        at(dp.parallel(LINEAR, LINEAR), (X, X, X)),
    "at (parallel(linear(3), linear(3))): wants a tuple of 2 inputs, one for each layer, got "
    "float32[2,4]; give each layer its part, or use branch for one input":
        at(dp.parallel(LINEAR, LINEAR), X),
    "at (branch(linear(2), first_row, merge=concatenate)): wants arrays of equal shape except on "
    "the last axis, got (float32[2,2], float32[1,4]); bring them to one shape":
        at(dp.branch(dp.linear(2), first_row, merge=dp.concatenate), X),
    "at (branch(linear(2), linear(3), merge=add)): wants arrays of equal shape throughout, got "
    "(float32[2,2], float32[2,3]); bring them to one shape":
        at(dp.branch(dp.linear(2), LINEAR, merge=dp.add), X),
    "at (branch(jnp.abs, first_row, merge=add)): wants arrays of equal shape throughout, got "
    "(float32[2,4], float32[1,4]); bring them to one shape":
        at(dp.branch(jnp.abs, first_row, merge=dp.add), X),
    "at (add): wants a tuple of arrays, got float32[2,4]; put branch or parallel before it":
        at(dp.add, X),
    "wants arrays of equal shape except on the last axis, got (float32[2,4], float32[1,4]); bring "
    "them to one shape":
        lambda: dp.concatenate((X, X[:1])),
    "wants arrays of equal shape throughout, got (float32[2,4], float32[1,4]); bring them to one "
    "shape":
        lambda: dp.add((X, X[:1])),
    "wants a tuple of arrays, got (); put branch or parallel before it":
        lambda: dp.add(()),
    "at (nope(lin=linear(3))): wants one of its children (lin), got layers.nope; correct the "
    "name, or add the child":
        at(program(nope, lin=LINEAR), X),
    "at (nope_in_brackets(lin=linear(3))): wants one of its children (lin), got layers.nope; "
    "correct the name, or add the child":
        at(program(nope_in_brackets, lin=LINEAR), X),
    "at (forgets(lin=linear(3))): wants a result, got None; end the function with return":
        at(program(forgets, lin=LINEAR), X),
    "at (once(lin=linear(3), other=linear(2))): wants a call of every child, other too, got no "
    "call on this input; give init every side input (none), or remove the child":
        at(program(once, lin=LINEAR, other=dp.linear(2)), X),
    "at (early(lin=linear(3))): wants a call of layers.lin before its params are read; call "
    "layers.lin on a line before":
        at(program(early, lin=LINEAR), X),
    "at/lin (linear(3)): wants the same parameters in all its calls, got float32[2,4] first and "
    "float32[2,3] later; share it between inputs of one width":
        at(program(twice, lin=LINEAR), X),
    "at/f (batch_norm()): wants a call outside the program's own transformations, as it has "
    "state or is tapped, got one inside of vmap, scan, cond, checkpoint, jit or the like; use "
    "ensemble, heads, repeat or remat, or put a layer of your own around both: its new state "
    "would be lost":
        at(program(mapped, f=NORM), SERIES),
    "f (dropout(0.5)): wants a call outside the program's own transformations, as it draws, "
    "got one inside of vmap, scan, cond, checkpoint, jit or the like; use ensemble, heads, "
    "repeat or remat, or put a layer of your own around both: examples and steps would share "
    "one draw":
        lambda: program(scanned, f=dp.dropout(0.5)).apply({}, {}, X, key=KEY, train=True),
    "at (give_layer): wants arrays as a result, got the layer linear(3); use that layer itself":
        at(give_layer, X),
    "at (gives_nothing): wants a result, got None; end the function with return":
        at(gives_nothing, X),
    "at (layer): wants init to return (params, state), two dicts, got {}":
        at(dp.Layer(lambda key, x: {}, lambda params, state, x, **_: (x, state)), X),
    "at (layer): wants apply to return (y, state), got float32[2,4]; return the given state if "
    "it does not change":
        at(dp.Layer(lambda key, x: ({}, {}), lambda params, state, x, **_: x), X),
    "a (linear(3)): wants net(params, x), got one argument":
        inside,
    # Side inputs.
    "serial(body=linear(4)): wants only side inputs that it takes (none), got mask; leave it out, "
    "or add a layer that takes it":
        lambda: dp.serial(body=dp.linear(4)).init(KEY, X, mask=X),
    "serial(body=taker): wants only side inputs that it takes (mask, positions), got maks; leave "
    "it out, or add a layer that takes it":
        lambda: dp.serial(body=mask_taker()).init(KEY, X, mask=X, maks=X),
    "a/lin (linear(3)): wants only side inputs that it takes (none), got mask; leave it out, or "
    "add a layer that takes it":
        foreign_mask,
    # Keys, flags and trees.
    "a/dropout~0 (dropout(0.5)): wants a key when train=True, got none; pass "
    "key=jax.random.key(seed) to apply":
        lambda: DROP.apply({}, {}, X, train=True),
    "dropout(0.5): wants a key when train=True, got none; pass key=jax.random.key(seed) to apply":
        lambda: dp.dropout(0.5).apply({}, {}, X, train=True),
    "a (repeat(2, dropout(0.5))): wants a key when train=True, got none; pass "
    "key=jax.random.key(seed) to apply":
        lambda: dp.serial(a=dp.repeat(2, dp.dropout(0.5))).apply({}, {}, X, train=True),
    "serial(lin=linear(4), body=serial(norm=batch_norm())): wants train as a Python bool, got 1":
        lambda: NET.apply(*trees(), X, train=1),
    "linear(3): wants train as a Python bool, got bool[]":
        lambda: jax.jit(LINEAR.apply)(*LINEAR.init(KEY, X), X, train=True),
    "serial(lin=linear(4), body=serial(norm=batch_norm())): wants net.apply for training, got "
    "train=True in the short form":
        lambda: NET(trees()[0], X, state=trees()[1], train=True),
    "serial(lin=linear(4), body=serial(norm=batch_norm())): wants params alone, got the pair "
    "(params, state); unpack it: params, state = net.init(key, x)":
        lambda: NET.apply(trees(), trees()[1], X),
    "serial(lin=linear(4), body=serial(norm=batch_norm())): wants params as a dict, got None; "
    "pass what init returned":
        lambda: NET.apply(None, trees()[1], X),
    "serial(lin=linear(4), body=serial(norm=batch_norm())): wants state as a dict, got None; "
    "pass what init returned":
        lambda: NET.apply(trees()[0], None, X),
    "serial(lin=linear(4), body=serial(norm=batch_norm())): wants params as a dict, got "
    "float32[2,4]; pass what init returned":
        lambda: NET.apply(X, trees()[1], trees()[0]),
    "linear(3): wants params as a dict, got TrainState; pass its own params: state.params":
        lambda: LINEAR(dp.training.TrainState({}, {}, (), KEY, jnp.zeros((), int)), X),
    "body/norm (batch_norm()): wants state mean, var, got none; pass state=, as init returned "
    "it":
        lambda: NET(trees()[0], X),
    "batch_norm(): wants state mean, var, got none; pass state=, as init returned it":
        lambda: NORM(trees()[0]["body"]["norm"], X),
    "lin (linear(4)): wants params bias, kernel, got none; pass what init returned":
        lambda: NET.apply(without(trees()[0], "lin"), trees()[1], X),
    "body/norm (batch_norm()): wants params bias, scale, got none; pass what init returned":
        lambda: NET.apply(without(trees()[0], "body"), trees()[1], X),
    "lin (linear(4)): wants params bias, kernel, got bias, kernel, w; pass what init returned":
        lambda: apply(own={"lin": trees()[0]["lin"] | {"w": X}}),
    "lin (linear(4)): wants params bias, kernel, got kernel; pass what init returned":
        lambda: apply(own={"lin": {"kernel": X}}),
    "serial(lin=linear(4), body=serial(norm=batch_norm())): wants params of its children (body, "
    "lin), got other":
        lambda: apply(own={"other": {}}),
    "body (serial(norm=batch_norm())): wants params of its children (norm), got z":
        lambda: apply(own={"body": {"norm": {}, "z": {}}}),
    "serial(lin=linear(4), body=serial(norm=batch_norm())): wants state of its children (body, "
    "lin), got other":
        lambda: apply(state={"other": {}}),
    "body/norm (batch_norm()): wants state mean, var, got mean; pass state=, as init returned "
    "it":
        lambda: apply(state={"body": {"norm": {"mean": jnp.zeros(4)}}}),
    "batch_norm(): wants params bias, scale, got mean, var; pass what init returned":
        lambda: NORM.apply(*reversed(NORM.init(KEY, X)), X),
    "lin (linear(4)): wants params kernel as float32[5,4], got float32[4,4]":
        lambda: apply(x=jnp.ones((2, 5))),
    "lin (linear(4)): wants params of 4 features, got {kernel: float32[4,4], bias: "
    "float32[5]}; pass what init returned":
        lambda: apply(own={"lin": trees()[0]["lin"] | {"bias": jnp.zeros(5)}}),
    "layer_norm(): wants 5 features on the last axis, as init saw, got float32[2,4]; "
    "initialize again on input of this shape, or change the layer before":
        lambda: dp.layer_norm()(dp.layer_norm().init(KEY, floats(2, 5))[0], X),
    "body/norm (batch_norm()): wants 1 feature on the last axis, as init saw, got "
    "float32[2,4]; initialize again on input of this shape, or change the layer before":
        lambda: apply(state={"body": {"norm": {"mean": jnp.zeros(1), "var": jnp.ones(1)}}}),
    "wants params with kernel, got bias":
        lambda: dp.tree.verify(LINEAR, {"bias": X[0, :3]}, X),
    "wants params without more, got bias, kernel, more":
        lambda: dp.tree.verify(LINEAR, LINEAR.init(KEY, X)[0] | {"more": X}, X),
    "wants params kernel as float32[4,3], got float32[2,4]":
        lambda: dp.tree.verify(LINEAR, LINEAR.init(KEY, X)[0] | {"kernel": X}, X),
    "as_often_as_long(run=recurrent(gru(4))): wants length as an int of at least 1, got 0; pass 1"
    " or more":
        lambda: as_often_as_long.start({}, {}, SERIES, length=0),
    "as_often_as_long(run=recurrent(gru(4))): wants params of its children (run), got b":
        lambda: as_often_as_long.start({"b": {}}, {}, SERIES, length=6),
    # Streams.
    "run (recurrent(gru(4))): wants as many calls of run as start made, got 3; start a new "
    "stream with the same inputs":
        lambda: streamed(2, 3),
    "as_often_as_long(run=recurrent(gru(4))): wants as many calls of run as start made, got 2; "
    "start a new stream with the same inputs":
        lambda: streamed(3, 2),
    # Meshes.
    "conv(2, 2, dims=1, padding='CAUSAL'): wants arrays on a mesh of automatic axes, got "
    "explicit axes (data); pass axis_types=(jax.sharding.AxisType.Auto,) to jax.make_mesh: "
    "explicit axes need a sharding of each result, which JAX cannot infer here":
        on_an_explicit_mesh,
    # Hypernetworks.
    "hyper(linear(3), linear(2)): wants the side input condition, which the generator takes, got "
    "none; pass condition=, one per example or one for all":
        lambda: HYPER.init(KEY, X),
    "target (serial(linear(3), batch_norm())): wants a target without state, got "
    "batch_norm_0/mean, batch_norm_0/var; use a layer without running statistics in its place":
        lambda: init_hyper(dp.hyper(LINEAR >> dp.batch_norm(), dp.linear(2))),
    "target (ensemble(2, linear(3))): wants a target that keeps the batch axis, got "
    "float32[2,1,3]; return one output per example, with the batch on the first axis":
        lambda: init_hyper(dp.hyper(dp.ensemble(2, LINEAR), dp.linear(2))),
    "generator (linear(2)): wants features (H,) for all examples, or (batch, H) for each, got "
    "float32[2,5,2]; end the generator with dp.flatten() or a pool":
        lambda: init_hyper(HYPER, jnp.ones((2, 5, 4))),
    "hyper(linear(3), linear(2)): wants x with a batch axis of 7, one example per condition, got "
    "float32[2,4]; pass one condition per example, or one without a batch axis for all":
        lambda: init_hyper(HYPER, jnp.ones((7, 4))),
    "hyper(linear(3), linear(2)): wants target params {bias: {kernel: float32[2,3], "
    "bias: float32[3]}, kernel: {kernel: float32[2,4,3], bias: float32[4,3]}}, got {bias: "
    "float32[3], kernel: float32[4,3]}; pass what init gave on input of this shape":
        lambda: HYPER(params(HYPER, X, condition=X) | {"target": params(LINEAR, X)}, X,
                      condition=X),
    # What is given to apply, and to a child.
    "linear(3): wants net.apply(params, state, x), got fewer arguments; pass them all: state "
    "is what init returned, {} if the net has none":
        lambda: LINEAR.apply({}, X),
    "linear(3): wants net.init(key, x), got fewer arguments; pass them all: state is what init "
    "returned, {} if the net has none":
        lambda: LINEAR.init(KEY),
    "asks(act=abs): wants one input, layers.act(x), got (float32[2,4], float32[2,4]); join inputs "
    "in a tuple: side inputs go by name, params and state by themselves":
        lambda: asks.plan(X),
    "shows(act=abs): wants arrays as a result, got the layer layers.act; call it: layers.act(x)":
        lambda: shows.plan(X),
    "linear(3): wants only side inputs that it takes (none), got training; pass train=True to "
    "apply in training: it reaches every layer":
        lambda: LINEAR.apply({}, {}, X, training=True),
}
