"""What is refused when it is composed, with its whole message."""

import pytest
from refusing import LIST, NAMES, expect, program, refused

import diffprog as dp

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
