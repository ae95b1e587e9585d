"""What init refuses, with the path of the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusing import (
    IMAGE,
    KEY,
    WIDER,
    X,
    early,
    expect,
    first_row,
    forgets,
    give_layer,
    halve,
    nope,
    nope_in_brackets,
    once,
    program,
    refused,
    twice,
)

import diffprog as dp

# What is refused by init, with the path of the layer.

INIT = {
    "residual, shape": (
        dp.residual(dp.linear(9)), X, "residual(linear(9)): wants a body that keeps the shape of "
        f"x, float32[2,4], got float32[2,9]; {WIDER}"),
    "residual, dtype": (
        dp.residual(halve), X, "residual(halve): wants a body that keeps the shape of x, "
        f"float32[2,4], got bfloat16[2,4]; {WIDER}"),
    "residual, broadcast": (
        dp.residual(first_row), X, "residual(first_row): wants a body that keeps the shape of x, "
        f"float32[2,4], got float32[1,4]; {WIDER}"),
    "residual, shortcut": (
        dp.residual(dp.linear(9), dp.linear(3)), X, "residual(linear(9), shortcut=linear(3)): "
        "wants a body that keeps the shape of the shortcut, float32[2,3], got float32[2,9]; "
        f"{WIDER}"),
    "conv on a vector": (
        dp.conv(4, 3), jnp.ones(4), "conv(4, 3): wants at least 3 axes (..., height, width, "
        "channels), got float32[4]; add the missing axes"),
    "conv over one dim on a vector": (
        dp.conv(4, 3, dims=1), jnp.ones(4), "conv(4, 3, dims=1): wants at least 2 axes (..., "
        "length, channels), got float32[4]; add the missing axes"),
    "linear on a scalar": (
        dp.linear(3), jnp.ones(()), "linear(3): wants at least 1 axes (..., features), "
        "got float32[]; add the missing axes"),
    "linear on a pair": (
        dp.linear(3), (X, X), "linear(3): wants one array, got (float32[2,4], float32[2,4]); "
        "pick one part of it with a lambda"),
    "max_pool, rank": (
        dp.max_pool(2), X, "max_pool(2): wants at least 3 axes (..., height, width, channels), "
        "got float32[2,4]; add the missing axes"),
    "avg_pool, rank": (
        dp.avg_pool((2, 2, 2)), IMAGE[0], "avg_pool((2, 2, 2)): wants at least 4 axes (..., "
        "depth, height, width, channels), got float32[8,8,3]; add the missing axes"),
    "global_max_pool, rank": (
        dp.global_max_pool(), X, "global_max_pool(): wants at least 3 axes (..., height, width, "
        "channels), got float32[2,4]; add the missing axes"),
    "global_avg_pool, rank": (
        dp.global_avg_pool(), X, "global_avg_pool(): wants at least 3 axes (..., height, width, "
        "channels), got float32[2,4]; add the missing axes"),
    "flatten, rank": (
        dp.flatten(keep=3), X, "flatten(keep=3): wants at least 3 axes, got float32[2,4]; "
        "add the missing axes"),
    "kernel larger than input": (
        dp.conv(4, 9, padding="VALID"), IMAGE, "conv(4, 9, padding='VALID'): wants input at least "
        "as large as the kernel, got (2, 8, 8, 3); pad, or take a smaller window"),
    "dilated kernel larger than input": (
        dp.conv(4, 3, padding="VALID", dilation=4), IMAGE, "conv(4, 3, padding='VALID', "
        "dilation=4): wants input at least as large as the kernel, got (2, 8, 8, 3); pad, or take "
        "a smaller window"),
    "window larger than input": (
        dp.max_pool(9), IMAGE, "max_pool(9): wants input at least as large as the window, "
        "got (2, 8, 8, 3); pad, or take a smaller window"),
    "groups and channels": (
        dp.conv(4, 3, groups=2), IMAGE,
        "conv(4, 3, groups=2): wants channels in 2 equal groups, got 3 in float32[2,8,8,3]"),
    "repeat changes shape": (
        dp.repeat(3, dp.linear(5)), X, "repeat(3, linear(5)): wants a layer that keeps "
        "float32[2,4] as it is, got float32[2,5]"),
    "repeat changes dtype": (
        dp.repeat(3, halve), X, "repeat(3, halve): wants a layer that keeps float32[2,4] as it "
        "is, got bfloat16[2,4]"),
    "heads of a pair": (
        dp.heads(2, dp.branch(dp.linear(3), dp.linear(3))), X,
        "heads(2, branch(linear(3), linear(3))): wants one array, "
        "got (float32[2,3], float32[2,3]); pick one part of it with a lambda"),
    "parallel, too few": (
        dp.parallel(abs, abs, abs), (X, X), "parallel(abs, abs, abs): wants a tuple of 3 inputs, "
        "one for each layer, got (float32[2,4], float32[2,4])"),
    "parallel, too many": (
        dp.parallel(dp.linear(3), dp.linear(3)), (X, X, X), "parallel(linear(3), linear(3)): "
        "wants a tuple of 2 inputs, one for each layer, "
        "got (float32[2,4], float32[2,4], float32[2,4])"),
    "parallel, one array": (
        dp.parallel(dp.linear(3), dp.linear(3)), X, "parallel(linear(3), linear(3)): wants a "
        "tuple of 2 inputs, one for each layer, got float32[2,4]"),
    "concatenate of unequal shapes": (
        dp.branch(dp.linear(2), first_row, merge=dp.concatenate), X, "branch(linear(2), first_row,"
        " merge=concatenate): wants arrays of equal shape except on the last axis, "
        "got (float32[2,2], float32[1,4])"),
    "add of unequal shapes": (
        dp.branch(dp.linear(2), dp.linear(3), merge=dp.add), X, "branch(linear(2), linear(3), "
        "merge=add): wants arrays of equal shape throughout, got (float32[2,2], float32[2,3])"),
    "add that would broadcast": (
        dp.branch(jnp.abs, first_row, merge=dp.add), X, "branch(jnp.abs, first_row, merge=add): "
        "wants arrays of equal shape throughout, got (float32[2,4], float32[1,4])"),
    "add of one array": (
        dp.add, X, "add: wants a tuple of arrays, got float32[2,4]; "
        "put branch or parallel before it"),
    "a child that is not there": (
        program(nope, lin=dp.linear(3)), X, "nope(lin=linear(3)): wants one of its children "
        "(lin), got layers.nope"),
    "a child that is not there, in brackets": (
        program(nope_in_brackets, lin=dp.linear(3)), X, "nope_in_brackets(lin=linear(3)): wants "
        "one of its children (lin), got layers.nope"),
    "a program without return": (
        program(forgets, lin=dp.linear(3)), X, "forgets(lin=linear(3)): wants a result, got None; "
        "end the program with return"),
    "a child never called": (
        program(once, lin=dp.linear(3), other=dp.linear(2)), X, "once(lin=linear(3), "
        "other=linear(2)): wants a call of every child, other too, got no call on this input; "
        "give init every side input (none), or remove the child"),
    "params read before the call": (
        program(early, lin=dp.linear(3)), X, "early(lin=linear(3)): wants a call of layers.lin "
        "before its params are read"),
    "a function that returns a layer": (
        give_layer, X, "give_layer: wants arrays as a result, got the layer linear(3); "
        "use that layer itself"),
    "init that returns one tree": (
        dp.Layer(lambda key, x: {}, lambda params, state, x, **_: (x, state)), X,
        "layer: wants init to return (params, state), two dicts, got {}"),
    "apply that returns one value": (
        dp.Layer(lambda key, x: ({}, {}), lambda params, state, x, **_: x), X,
        "layer: wants apply to return (y, state), got float32[2,4]"),
    "an initializer that is none": (
        dp.linear(3, kernel_init=0.1), X, "linear(3, kernel_init=0.1): wants kernel_init as a "
        "function (key, shape, dtype) or a name (delta_orthogonal, glorot_normal, glorot_uniform, "
        "he_normal, he_uniform, lecun_normal, lecun_uniform, normal, ones, orthogonal, "
        "truncated_normal, zeros), got 0.1"),
    "an unknown name of an initializer": (
        dp.linear(3, kernel_init="xavier"), X, "linear(3, kernel_init='xavier'): wants "
        "kernel_init as a function (key, shape, dtype) or a name (delta_orthogonal, "
        "glorot_normal, glorot_uniform, he_normal, he_uniform, lecun_normal, lecun_uniform, "
        "normal, ones, orthogonal, truncated_normal, zeros), got 'xavier'"),
}


@pytest.mark.parametrize("name", INIT)
def test_init_refuses(name):
    layer, x, message = INIT[name]
    net = dp.serial(body=dp.serial(at=layer))
    shown, complaint = message.split(": wants", 1)
    expect("body/at", f"body/at ({shown}): wants{complaint}", net.init, KEY, x)


@pytest.mark.parametrize("name", ["residual, shape", "conv on a vector", "a child never called"])
def test_a_layer_alone_has_no_path(name):
    layer, x, message = INIT[name]
    expect("", message, layer.init, KEY, x)


INTEGERS = {
    "linear": (dp.linear(3), (2, 4)), "conv": (dp.conv(3, 3), (2, 8, 8, 3)),
    "layer_norm": (dp.layer_norm(), (2, 4)), "batch_norm": (dp.batch_norm(), (2, 4)),
    "avg_pool": (dp.avg_pool(2), (2, 8, 8, 3)), "dropout": (dp.dropout(0.5), (2, 4)),
    "global_avg_pool": (dp.global_avg_pool(), (2, 8, 8, 3)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_refused(name):
    layer, shape = INTEGERS[name]
    x = jax.ShapeDtypeStruct(shape, jnp.int32)
    expect("body/at", f"body/at ({layer!r}): wants floating-point input, "
           f"got int32[{','.join(map(str, shape))}]; convert it: x.astype(jnp.float32)",
           dp.serial(body=dp.serial(at=layer)).init, KEY, x)


def test_errors_inside_transformations_carry_the_path():
    inner = dp.serial(at=dp.conv(4, 3))
    message = ("at (conv(4, 3)): wants at least 3 axes (..., height, width, channels), "
               "got float32[2,4]; add the missing axes")
    for wrap in (dp.remat, lambda f: dp.repeat(2, f), lambda f: dp.heads(2, f)):
        expect("a/at", f"a/{message}", dp.serial(a=wrap(inner)).init, KEY, X)
    net = dp.serial(a=dp.residual(dp.branch(inner)))
    expect("a/body/serial_0/at", f"a/body/serial_0/{message}", net.init, KEY, X)


def test_a_shared_child_has_one_width():
    expect("a/lin", "a/lin (linear(3)): wants the same parameters in all its calls, "
           "got float32[2,4] first and float32[2,3] later; share it between inputs of one width",
           dp.serial(a=program(twice, lin=dp.linear(3))).init, KEY, X)


def test_a_layer_from_outside_called_in_a_program():
    lin = dp.linear(3)

    @dp.program(lin=lin)
    def f(layers, x):
        return lin(x)

    expect("a", "a (linear(3)): wants net(params, x), got one argument; inside a program call "
           "its child, layers.<name>(x)", dp.serial(a=f).init, KEY, X)


# What init itself is given.

@pytest.mark.parametrize("shape", [(2, 4), [2, 4]], ids=["tuple", "list"])
def test_a_shape_is_no_input(shape):
    for net, shown in ((dp.linear(3), "linear(3)"), (dp.serial(a=abs), "serial(a=abs)")):
        error = refused(net.init, KEY, shape)
        assert error.path == ""
        assert str(error).startswith(f"{shown}: wants an array or a jax.ShapeDtypeStruct, got ")
        assert str(error).endswith("write jax.ShapeDtypeStruct((2, 4), jnp.float32)")


@pytest.mark.parametrize(("x", "shown"), [
    (1.0, "1.0"), ([1.0, 2.0], "1.0"), ({"a": 3.5}, "3.5"), (3, "3"), (True, "True"),
], ids=["float", "floats", "dict", "int", "bool"])
def test_python_numbers_are_no_input(x, shown):
    expect("", f"serial(a=linear(3)): wants arrays or jax.ShapeDtypeStructs, got {shown}; "
           "use jnp.asarray", dp.serial(a=dp.linear(3)).init, KEY, x)


@pytest.mark.parametrize(("key", "shown"), [
    (0, "0"), (None, "None"), (X, "float32[2,4]"), (np.int32(3), "int32[]"),
], ids=["int", "None", "array", "numpy"])
def test_what_is_no_key(key, shown):
    message = f"wants a key, got {shown}; pass jax.random.key(seed); map over several by " \
              "vmap"
    expect("", f"linear(3): {message}", dp.linear(3).init, key, X)
    expect("", f"serial(a=abs): {message}", dp.serial(a=abs).init, key, X)


def test_both_kinds_of_jax_keys_are_taken():
    new, old = jax.random.key(0), jax.random.PRNGKey(0)
    kernels = [dp.linear(3).init(key, X)[0]["kernel"] for key in (new, old)]
    np.testing.assert_array_equal(*kernels)
