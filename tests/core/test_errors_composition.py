"""What is refused when it is composed, with its whole message."""

import pytest
from support.refusing import LIST, NAMES, expect, refused

import diffprog as dp

# What is refused when it is composed.


@pytest.mark.parametrize("name", ["a/b", "a*", "a@1", "a~0", "a#", "_x", ""])
def test_forbidden_names_of_children(name):
    expect("", f"serial({name}=linear(3)): {NAMES}, got {name!r}",
           dp.serial, **{name: dp.linear(3)})
    expect("", f"{NAMES}, got {name!r}", dp.program, **{name: dp.linear(3)})


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
def test_other_values_than_a_layer_are_refused(bad, way):
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
