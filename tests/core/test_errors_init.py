"""What init refuses, with the path of the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import KEY, X, expect, once, program, refused

import diffprog as dp

# What is refused by init, with the path of the layer.


@pytest.mark.parametrize("layer", [
    dp.residual(dp.linear(9)), dp.conv(4, 3), program(once, lin=dp.linear(3), other=dp.linear(2)),
], ids=repr)
def test_the_path_is_that_of_the_net(layer):
    alone, within = (refused(net.init, KEY, X) for net in (
        layer, dp.serial(body=dp.serial(at=layer))))
    assert (alone.path, within.path) == ("", "body/at")
    assert str(within) == str(alone).replace(f"{layer!r}:", f"body/at ({layer!r}):")


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


def test_a_layer_from_outside_called_in_a_program():
    lin = dp.linear(3)

    @dp.program(lin=lin)
    def f(layers, x):
        return lin(x)

    expect("a", "a (linear(3)): wants net(params, x), got one argument; call layers.<name>(x), "
           "the child, inside a program, and net(params, x) outside of one",
           dp.serial(a=f).init, KEY, X)


# What init itself is given.

@pytest.mark.parametrize("shape", [(2, 4), [2, 4]], ids=["tuple", "list"])
@pytest.mark.parametrize(("net", "shown"), [
    (dp.linear(3), "linear(3)"), (dp.serial(a=abs), "serial(a=abs)"),
], ids=["leaf", "serial"])
def test_a_shape_is_no_input(shape, net, shown):
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
def test_other_values_than_a_key_are_refused(key, shown):
    message = f"wants a key, got {shown}; pass jax.random.key(seed), and map over several " \
              "by vmap"
    expect("", f"linear(3): {message}", dp.linear(3).init, key, X)
    expect("", f"serial(a=abs): {message}", dp.serial(a=abs).init, key, X)


def test_both_kinds_of_jax_keys_are_taken():
    new, old = jax.random.key(0), jax.random.PRNGKey(0)
    kernels = [dp.linear(3).init(key, X)[0]["kernel"] for key in (new, old)]
    np.testing.assert_array_equal(*kernels)
