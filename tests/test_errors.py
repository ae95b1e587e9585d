"""Every mistake is refused early, by one error that names the place and the remedy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffprog as dp

KEY = jax.random.key(0)
X = jnp.ones((2, 4))
IMAGE = jnp.ones((2, 8, 8, 3))
GRAMMAR = re.compile(r"^(.+: )?wants .+(, got .+)?(; .+)?$", re.DOTALL)
WIDER = "give it as many features, or a shortcut of the same shape"
NO_KEY = "wants a key when train=True, got none; pass key=jax.random.key(seed) to apply"
INIT_GAVE = "pass what init gave"
NAMES = "wants a name without leading _ and / * @ ~ #"
STATIC = "under jax.jit make it static: jax.jit(net.apply, static_argnames='train')"
ANOTHER = "these params are of another net, or init saw another input"
NOBODY = "leave it out, or add a layer that takes it"
LIST = ("write serial(a, b) for a sequence of layers, and Layer(init, apply) for a pair of "
        "functions")


def refused(f, *args, **kwargs):
    """The error that the call raises: of the one class, and of the one grammar."""
    with pytest.raises(dp.LayerError) as caught:
        f(*args, **kwargs)
    error = caught.value
    assert type(error) is dp.LayerError
    assert isinstance(error, ValueError)
    assert GRAMMAR.fullmatch(str(error)), str(error)
    assert error.wants in str(error) and error.got in str(error)
    assert str(error).endswith(error.remedy)
    assert str(error).startswith(error.path)
    return error


def expect(path, message, f, *args, **kwargs):
    """The call raises this error, with this path; the whole message is compared.

    A message without a remedy leaves its wording open, but not that there is one.
    """
    error = refused(f, *args, **kwargs)
    assert error.remedy
    assert str(error) == (message if "; " in message else f"{message}; {error.remedy}")
    assert error.path == path
    return error


# Functions with a name, so that messages are the same wherever they stand in this file.
def halve(x):
    return x.astype(jnp.bfloat16)


def first_row(x):
    return x[:1]


def give_layer(x):
    return dp.linear(3)


def divide(x):
    return x * (1 / 0)


def once(layers, x):
    return layers.lin(x)


def twice(layers, x):
    return layers.lin(layers.lin(x))


def nope(layers, x):
    return layers.nope(x)


def nope_in_brackets(layers, x):
    return layers["nope"](x)


def forgets(layers, x):
    layers.lin(x)


def early(layers, x):
    return x @ layers.lin.params["kernel"] + layers.lin(x)


def mask_taker(*, name="taker"):
    def forward(params, x, *, mask, positions=None):
        return x

    return dp.stateless(None, forward, name=name)


def program(function, **children):
    return dp.program(**children)(function)


# What is refused when it is composed.

COMPOSITION = {
    "dropout -0.1": (lambda: dp.dropout(-0.1), "dropout(-0.1): wants rate in [0, 1), got -0.1"),
    "dropout 1": (lambda: dp.dropout(1), "dropout(1): wants rate in [0, 1), got 1"),
    "dropout 1.5": (lambda: dp.dropout(1.5), "dropout(1.5): wants rate in [0, 1), got 1.5"),
    "dropout True": (lambda: dp.dropout(True), "dropout(True): wants rate in [0, 1), got True"),
    "dropout False": (
        lambda: dp.dropout(False), "dropout(False): wants rate in [0, 1), got False"),
    "dropout string": (
        lambda: dp.dropout("0.5"), "dropout('0.5'): wants rate in [0, 1), got '0.5'"),
    "dropout nan": (
        lambda: dp.dropout(float("nan")), "dropout(nan): wants rate in [0, 1), got nan"),
    "momentum 1": (
        lambda: dp.batch_norm(momentum=1.0),
        "batch_norm(momentum=1.0): wants momentum in [0, 1), got 1.0"),
    "eps 0": (
        lambda: dp.layer_norm(eps=0.0),
        "layer_norm(eps=0.0): wants eps, a positive float, got 0.0"),
    "groups and features": (
        lambda: dp.conv(4, 3, groups=3),
        "conv(4, 3, groups=3): wants features in 3 equal groups, got 4"),
    "conv size 0": (
        lambda: dp.conv(4, 0),
        "conv(4, 0): wants size as a positive int or a tuple of 2, got 0"),
    "conv of four dims": (
        lambda: dp.conv(4, (3, 3, 3, 3)),
        "conv(4, (3, 3, 3, 3)): wants a window over 1, 2 or 3 axes, got 4"),
    "conv padding": (
        lambda: dp.conv(4, 3, padding="same"),
        "conv(4, 3, padding='same'): wants padding 'SAME', 'VALID', an int, or 2 pairs of ints, "
        "got 'same'"),
    "pool stride": (
        lambda: dp.max_pool(2, stride=(1, 1, 1)),
        "max_pool(2, stride=(1, 1, 1)): wants stride as a positive int or a tuple of 2, "
        "got (1, 1, 1)"),
    "flatten": (
        lambda: dp.flatten(keep=-1),
        "flatten(keep=-1): wants keep, an int of at least 0, got -1"),
    "linear 0": (
        lambda: dp.linear(0), "linear(0): wants features, an int of at least 1, got 0"),
    "linear True": (
        lambda: dp.linear(True), "linear(True): wants features, an int of at least 1, got True"),
    "linear 2.5": (
        lambda: dp.linear(2.5), "linear(2.5): wants features, an int of at least 1, got 2.5"),
    "repeat 0": (
        lambda: dp.repeat(0, dp.linear(3)),
        "repeat(0, linear(3)): wants n, an int of at least 1, got 0"),
    "repeat True": (
        lambda: dp.repeat(True, dp.linear(3)),
        "repeat(True, linear(3)): wants n, an int of at least 1, got True"),
    "repeat unroll": (
        lambda: dp.repeat(2, dp.linear(3), unroll=0),
        "repeat(2, linear(3), unroll=0): wants unroll, an int of at least 1, got 0"),
    "heads 0": (
        lambda: dp.heads(0, dp.linear(3)),
        "heads(0, linear(3)): wants n, an int of at least 1, got 0"),
    "power 0": (
        lambda: dp.linear(3) ** 0, "wants the exponent of a layer, an int of at least 1, got 0"),
    "power 1.5": (
        lambda: dp.linear(3) ** 1.5,
        "wants the exponent of a layer, an int of at least 1, got 1.5"),
    "two children of one name": (
        lambda: dp.serial(dp.linear(3), linear_0=dp.linear(2)),
        "serial(linear(3), linear_0=linear(2)): wants children of different names, "
        "got 'linear_0' twice"),
    "inside a serial": (
        lambda: dp.serial(head=dp.linear(0)),
        "linear(0): wants features, an int of at least 1, got 0"),
}


@pytest.mark.parametrize("name", COMPOSITION)
def test_composition_refuses(name):
    make, message = COMPOSITION[name]
    expect("", message, make)


@pytest.mark.parametrize("name", ["a/b", "a*", "a@1", "a~0", "a#", "_x", ""])
def test_forbidden_names_of_children(name):
    expect("", f"serial({name}=linear(3)): {NAMES}, got {name!r}",
           dp.serial, **{name: dp.linear(3)})
    expect("", f"{NAMES}, got {name!r}", dp.program, **{name: dp.linear(3)})


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


@pytest.mark.parametrize(("function", "shown"), [
    (without_x, "without_x(layers)"),
    (starred, "starred(layers, *args)"),
    (positional, "positional(layers, x, mask)"),
    (with_default, "with_default(layers, x, mask=None)"),
    (double_starred, "double_starred(layers, x, **side)"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_signatures_of_programs(function, shown):
    expect("", f"wants a program f(layers, x, *, side inputs), got {shown}; "
           "put side inputs after the star", program, function, lin=dp.linear(3))


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


@pytest.mark.parametrize("function", [
    takes_params, takes_state, takes_key, takes_length, takes_x,
], ids=lambda f: f.__name__)
def test_reserved_names_of_side_inputs(function):
    name = function.__name__.removeprefix("takes_")
    expect("", "wants side inputs of other names than key, length, params, state, x, "
           f"got {name}", program, function, lin=dp.linear(3))


WAYS = {
    "serial": (lambda bad: dp.serial(bad), "serial({})"),
    "named": (lambda bad: dp.serial(a=bad), "serial(a={})"),
    "program": (lambda bad: dp.program(a=bad), ""),
    "residual": (lambda bad: dp.residual(bad), "residual({})"),
    "branch": (lambda bad: dp.branch(bad), "branch({})"),
    "parallel": (lambda bad: dp.parallel(bad), "parallel({})"),
    "repeat": (lambda bad: dp.repeat(2, bad), "repeat(2, {})"),
    "heads": (lambda bad: dp.heads(2, bad), "heads(2, {})"),
    "remat": (lambda bad: dp.remat(bad), "remat({})"),
    "before >>": (lambda bad: bad >> dp.linear(3), ""),
    "after >>": (lambda bad: dp.linear(3) >> bad, ""),
}
NOT_LAYERS = {
    "linear": (dp.linear, "linear", "a layer, got the function linear; call it: linear(...)"),
    "serial": (dp.serial, "serial", "a layer, got the function serial; call it: serial(...)"),
    "repeat": (dp.repeat, "repeat", "a layer, got the function repeat; call it: repeat(...)"),
    "max_pool": (
        dp.max_pool, "max_pool", "a layer, got the function max_pool; call it: max_pool(...)"),
    "None": (None, "None", "a layer or a function of one input, got None"),
    "string": ("relu", "'relu'", "a layer or a function of one input, got 'relu'"),
    "number": (3, "3", "a layer or a function of one input, got 3"),
    "type": (dict, "dict", "a layer or a function of one input, got <class 'dict'>"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", NOT_LAYERS)
def test_what_is_no_layer(bad, way):
    value, shown, message = NOT_LAYERS[bad]
    compose, by = WAYS[way]
    expect("", f"{by.format(shown)}{': ' if by else ''}wants {message}", compose, value)


@pytest.mark.parametrize("way", WAYS)
def test_a_list_is_no_layer(way):
    compose, by = WAYS[way]
    where = f"{by.format('[linear(3)]')}: " if by else ""
    expect("", f"{where}wants a layer, got [linear(3)]; {LIST}", compose, [dp.linear(3)])


@pytest.mark.parametrize("way", WAYS)
def test_a_pair_of_functions_is_no_layer(way):
    init, apply = dp.linear(3)
    error = refused(WAYS[way][0], (init, apply))
    assert error.wants == "a layer" and error.remedy == LIST


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
        "function (key, shape, dtype), got 0.1"),
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


# Side inputs.

def test_a_side_input_that_nobody_takes():
    net = dp.serial(body=dp.linear(4))
    params, state = net.init(KEY, X)
    message = f"serial(body=linear(4)): wants only side inputs that it takes (none), got mask; " \
              f"{NOBODY}"
    expect("", message, net.init, KEY, X, mask=X)
    expect("", message, net.apply, params, state, X, mask=X)
    expect("", message, net, params, X, mask=X)
    expect("", message, net.plan, X, mask=X)


def test_a_side_input_that_nobody_takes_lists_those_taken():
    net = dp.serial(body=mask_taker())
    message = "serial(body=taker): wants only side inputs that it takes (mask, positions), " \
              f"got maks; {NOBODY}"
    expect("", message, net.init, KEY, X, mask=X, maks=X)
    expect("", message, net.apply, {}, {}, X, mask=X, maks=X)


def test_a_side_input_given_to_a_child_that_does_not_take_it():
    @dp.program(lin=dp.linear(3))
    def f(layers, x, *, mask=None):
        return layers.lin(x, mask=mask)

    expect("a/lin", "a/lin (linear(3)): wants only side inputs that it takes (none), got mask; "
           f"{NOBODY}", dp.serial(a=f).init, KEY, X, mask=X)
    dp.serial(a=f).init(KEY, X)  # None is absent


# What apply is given.

NET = dp.serial(lin=dp.linear(4), body=dp.serial(norm=dp.batch_norm()))
SHOWN = "serial(lin=linear(4), body=serial(norm=batch_norm()))"


@pytest.fixture(scope="module")
def trees():
    return NET.init(KEY, X)


def test_training_a_dropout_without_key():
    drop = dp.serial(a=dp.serial(dp.dropout(0.5)))
    expect("a/dropout~0", f"a/dropout~0 (dropout(0.5)): {NO_KEY}",
           drop.apply, {}, {}, X, train=True)
    expect("", f"dropout(0.5): {NO_KEY}", dp.dropout(0.5).apply, {}, {}, X, train=True)


@pytest.mark.parametrize("wrap", [
    lambda f: dp.repeat(2, f), lambda f: dp.heads(2, f), dp.remat, lambda f: f,
], ids=["repeat", "heads", "remat", "program"])
def test_training_a_dropout_without_key_inside(wrap):
    @dp.program(lin=dp.linear(4), drop=dp.dropout(0.5))
    def block(layers, x):
        return layers.drop(layers.lin(x))

    net = dp.serial(blocks=wrap(block))
    params, state = net.init(KEY, X)
    expect("blocks/drop", f"blocks/drop (dropout(0.5)): {NO_KEY}",
           net.apply, params, state, X, train=True)
    expect("blocks/drop", f"blocks/drop (dropout(0.5)): {NO_KEY}",
           jax.jit(net.apply, static_argnames="train"), params, state, X, train=True)


def test_training_a_wrapped_dropout_without_key():
    net = dp.serial(a=dp.repeat(2, dp.dropout(0.5)))
    expect("a", f"a (repeat(2, dropout(0.5))): {NO_KEY}", net.apply, {}, {}, X, train=True)


def test_a_stateful_net_without_state(trees):
    params, _ = trees
    message = "body/norm (batch_norm()): wants state mean, var, got none; pass state=, as init " \
              "gave it"
    expect("body/norm", message, NET, params, X)
    expect("body/norm", message, NET.apply, params, {}, X, train=True)
    expect("body/norm", message, jax.jit(NET), params, X)
    expect("", message.removeprefix("body/norm (").replace(")):", "):"),
           dp.batch_norm(), params["body"]["norm"], X)


def test_parameters_of_another_net(trees):
    params, state = trees
    wants = "wants params bias, kernel"
    expect("lin", f"lin (linear(4)): {wants}, got none; {INIT_GAVE}", NET.apply, {}, state, X)
    expect("body/norm", "body/norm (batch_norm()): wants params bias, scale, got none; "
           f"{INIT_GAVE}", NET.apply, {"lin": params["lin"]}, state, X)
    expect("lin", f"lin (linear(4)): {wants}, got bias, kernel, w; {INIT_GAVE}",
           NET.apply, params | {"lin": params["lin"] | {"w": X}}, state, X)
    expect("lin", f"lin (linear(4)): {wants}, got kernel; {INIT_GAVE}",
           NET.apply, params | {"lin": {"kernel": X}}, state, X)
    for trace in (NET.apply, jax.jit(NET.apply)):
        expect("", f"{SHOWN}: wants params of its children (body, lin), got other; these params "
               "are of another net; pass what init gave",
               trace, params | {"other": params["lin"]}, state, X)


def test_foreign_names_below_carry_the_path(trees):
    params, state = trees
    error = refused(NET.apply, params | {"body": {"norm": params["body"]["norm"], "z": {}}},
                    state, X)
    assert error.path == "body"
    assert str(error).startswith(
        "body (serial(norm=batch_norm())): wants params of its children (norm), got z; ")


def test_state_of_another_net(trees):
    params, state = trees
    error = refused(NET.apply, params, state | {"other": {}}, X)
    assert error.path == ""
    assert str(error).startswith(f"{SHOWN}: wants state of its children (body, lin), got other; ")
    assert error.remedy.endswith("pass what init gave")
    expect("body/norm", "body/norm (batch_norm()): wants state mean, var, got mean; pass state=, "
           "as init gave it", NET.apply, params, {"body": {"norm": {"mean": jnp.zeros(4)}}}, X)


def test_params_and_state_swapped(trees):
    params, state = trees
    expect("lin", f"lin (linear(4)): wants params bias, kernel, got none; {INIT_GAVE}",
           NET.apply, state, params, X)
    norm = dp.batch_norm()
    params, state = norm.init(KEY, X)
    expect("", f"batch_norm(): wants params bias, scale, got mean, var; {INIT_GAVE}",
           norm.apply, state, params, X)


def test_the_pair_passed_whole(trees):
    pair = "wants params alone, got the pair (params, state); unpack it: params, state = " \
           "net.init(key, x)"
    expect("", f"{SHOWN}: {pair}", NET.apply, trees, trees[1], X)
    expect("", f"{SHOWN}: {pair}", NET, trees, X, state=trees[1])
    lin = dp.linear(3)
    expect("", f"linear(3): {pair}", lin, lin.init(KEY, X), X)


def test_trees_that_are_no_dicts(trees):
    params, state = trees
    expect("", f"{SHOWN}: wants params as a dict, got None; {INIT_GAVE}",
           NET.apply, None, state, X)
    expect("", f"{SHOWN}: wants state as a dict, got None; {INIT_GAVE}",
           NET.apply, params, None, X)
    expect("", f"{SHOWN}: wants params as a dict, got float32[2,4]; {INIT_GAVE}",
           NET.apply, X, state, params)


def test_parameters_of_another_shape(trees):
    params, state = trees
    expect("lin", "lin (linear(4)): wants params kernel as float32[5,4], got float32[4,4]; "
           f"{ANOTHER}", NET.apply, params, state, jnp.ones((2, 5)))
    wrong = params | {"lin": params["lin"] | {"bias": jnp.zeros(5)}}
    expect("lin", f"lin (linear(4)): wants params of 4 features, got {{kernel: float32[4,4], "
           f"bias: float32[5]}}; {INIT_GAVE}",
           NET.apply, wrong, state, X)
    five = "wants 5 features on the last axis, as init saw, got float32[2,4]; init anew on " \
           "input of this shape, or mend the layer before"
    wrong = {"body": {"norm": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}}
    expect("body/norm", f"body/norm (batch_norm()): {five}", NET.apply, params, wrong, X)
    norm = dp.layer_norm()
    params, _ = norm.init(KEY, jnp.ones((2, 5)))
    expect("", f"layer_norm(): {five}", norm, params, X)


def test_a_single_feature_does_not_broadcast():
    params, _ = dp.layer_norm().init(KEY, jnp.ones((2, 1)))
    error = refused(dp.layer_norm(), params, X)
    assert error.wants.startswith("1 features") and error.got == "float32[2,4]"


def test_fit_compares_shapes():
    step = dp.make_step(dp.serial(lin=dp.linear(3)), dp.classification(), optax.sgd(0.1))
    data = dp.batches((X, jnp.zeros(2, jnp.int32)), 2)
    expect("", f"wants params lin/kernel as float32[4,3], got float32[5,3]; {ANOTHER}",
           dp.fit, step, data, key=KEY, steps=1, progress=False,
           state=step.init(KEY, jnp.ones((2, 5))))
    state = step.init(KEY, X)
    error = refused(dp.fit, step, data, key=KEY, steps=1, progress=False,
                    state=state._replace(params={"other": state.params["lin"]}))
    assert error.wants == "params with lin/bias"
    assert error.got == "other/bias, other/kernel"


@pytest.mark.parametrize(("train", "shown"), [
    (1, "1"), (0, "0"), (None, "None"), ("no", "'no'"), (np.bool_(True), "bool[]"),
], ids=["1", "0", "None", "string", "numpy"])
def test_train_is_a_python_bool(trees, train, shown):
    expect("", f"{SHOWN}: wants train as a Python bool, got {shown}; {STATIC}",
           NET.apply, *trees, X, train=train)


def test_train_is_not_traced(trees):
    expect("", f"{SHOWN}: wants train as a Python bool, got bool[]; {STATIC}",
           jax.jit(NET.apply), *trees, X, train=True)
    y, _ = jax.jit(NET.apply, static_argnames="train")(*trees, X, train=True)
    assert y.shape == (2, 4)


def test_the_short_form_does_not_train(trees):
    expect("", f"{SHOWN}: wants net.apply for training, got train=True in the short form; "
           "the short form would lose the new state",
           NET, trees[0], X, state=trees[1], train=True)


def test_batch_statistics_of_one_value(trees):
    expect("body/norm", "body/norm (batch_norm()): wants several values per channel in training, "
           "got float32[1,4]; a variance needs two: take a larger batch",
           NET.apply, *trees, X[:1], train=True)


# Plain functions raise as well, and other exceptions keep their type.

def test_functions_raise_without_a_path():
    expect("", "wants arrays of equal shape except on the last axis, "
           "got (float32[2,4], float32[1,4])", dp.concatenate, (X, X[:1]))
    expect("", "wants arrays of equal shape throughout, got (float32[2,4], float32[1,4])",
           dp.add, (X, X[:1]))
    expect("", "wants a tuple of arrays, got (); put branch or parallel before it", dp.add, ())


def place(error):
    """The notes that say where an exception was raised."""
    return [note for note in error.__notes__ if note.startswith("at ")]


@pytest.mark.parametrize("wrap", [
    lambda f: f, dp.remat, lambda f: dp.repeat(2, f), lambda f: dp.heads(2, f),
], ids=["serial", "remat", "repeat", "heads"])
def test_other_exceptions_keep_their_type_and_carry_the_path(wrap):
    net = dp.serial(a=wrap(dp.serial(b=divide)))
    with pytest.raises(ZeroDivisionError) as caught:
        net.init(KEY, X)
    assert place(caught.value) == ["at a/b: divide given float32[2,4]"]


def test_other_exceptions_carry_the_path_in_apply_too():
    ready = [True]

    def sometimes(x):
        return x if ready else [][0]

    @dp.program(c=sometimes)
    def f(layers, x):
        return layers.c(x)

    net = dp.serial(a=dp.serial(b=f))
    params, state = net.init(KEY, X)
    ready.clear()
    for apply in (net.apply, jax.jit(net.apply)):
        with pytest.raises(IndexError) as caught:
            apply(params, state, X)
        (note,) = place(caught.value)
        assert note.startswith("at a/b/c: <sometimes") and note.endswith(" given float32[2,4]")


def test_a_lambda_is_found_by_file_and_line():
    net = dp.serial(a=dp.serial(b=lambda x: x / (1 // 0)))
    with pytest.raises(ZeroDivisionError) as caught:
        net.init(KEY, X)
    (note,) = place(caught.value)
    assert re.fullmatch(r"at a/b: <lambda test_errors\.py:\d+> given float32\[2,4\]", note)


def test_an_error_of_a_users_layer_is_signed():
    def forward(params, x):
        raise dp.LayerError("something else", "this", "do that")

    mine = dp.stateless(None, forward, name="mine")
    expect("a/b", "a/b (mine): wants something else, got this; do that",
           dp.serial(a=dp.serial(b=mine)).init, KEY, X)


def test_the_grammar_can_fail():
    assert not GRAMMAR.fullmatch("a/b (linear(3)): expected a key; pass one")
    assert not GRAMMAR.fullmatch("linear(3) wants a key, got none")


@pytest.mark.parametrize("layer", [dp.linear(3), dp.conv(3, 1, dims=1)], ids=repr)
def test_a_single_bias_does_not_broadcast_over_all_features(layer):
    params, _ = layer.init(KEY, X)
    with pytest.raises(dp.LayerError, match="params of 3 features"):
        layer({**params, "bias": jnp.ones(1)}, X)


def test_one_running_variance_does_not_broadcast_over_all_channels():
    params, state = dp.batch_norm().init(KEY, X)
    with pytest.raises(dp.LayerError, match="1 features"):
        dp.batch_norm()(params, X, state={**state, "var": jnp.ones(1)})
