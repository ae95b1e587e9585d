"""Long chains and deep nests: neither takes more than its share of time or of Python's stack."""

import functools
import pickle
import sys

import jax
import jax.numpy as jnp
import pytest
from support.comparing import KEY, X, same
from support.refusing import refused

import diffprog as dp

TREE = jax.ShapeDtypeStruct(X.shape, X.dtype)


def nested(times, wrap=dp.residual):
    return functools.reduce(lambda net, _: wrap(net), range(times), dp.linear(4))


DEEP = nested(100)
SHOWN = f"{'residual(' * 100}linear(4){')' * 100}"


@pytest.mark.parametrize("f", [
    lambda: DEEP.plan(X), lambda: jax.eval_shape(lambda key: DEEP.init(key, X), KEY),
    lambda: jax.eval_shape(DEEP, DEEP.plan(X).params, TREE), lambda: hash(DEEP),
    lambda: DEEP == nested(100), lambda: pickle.loads(pickle.dumps(DEEP)),
    lambda: dp.tap(DEEP, "/".join(["body"] * 100)).plan(X),
], ids=["plan", "init", "apply", "hash", "equal", "pickle", "tap"])
def test_a_hundred_layers_in_each_other(f):
    limit = sys.getrecursionlimit()
    assert f() is not False and sys.getrecursionlimit() == limit == 1000


def test_a_hundred_layers_in_each_other_are_shown_whole():
    assert repr(DEEP) == SHOWN


def test_a_hundred_layers_in_each_other_compute():
    params, _ = DEEP.init(KEY, X)
    inner = functools.reduce(lambda tree, _: tree["body"], range(100), params)
    same(jax.jit(DEEP)(params, X), jax.jit(loop)(inner, X))


def loop(params, x):
    y = dp.linear(4)(params, x)
    for _ in range(100):
        y = x + y
    return y


def test_a_plan_in_parts_is_the_plan():
    """Of what is deep inside, the parts around are begun anew: nothing is counted twice."""
    log = []

    def noted(params, x):
        log.append(x.shape)
        return x

    leaf = dp.stateless(lambda key, x: {"scale": jnp.ones(4)}, noted)
    net = functools.reduce(lambda net, _: dp.serial(net, leaf), range(30), leaf)
    plan = net.plan(X)
    assert log == [(3, 4)] and len(plan.calls) == 2
    assert dp.tree.count(plan.params) == 31 * 4


@pytest.mark.slow
def test_the_summary_of_a_deep_net_has_every_layer_once():
    rows = dp.summary(nested(40), X).rows
    assert [row.path for row in rows] == ["/".join(["body"] * n) for n in range(41)]
    assert rows[-1].flops == dp.summary(dp.linear(4), X).flops
    assert rows[0].flops == rows[-1].flops + 40 * X.size
    twice = dp.program(f=nested(12))(lambda layers, x: layers.f(layers.f(x)))
    assert len(dp.summary(twice, X).rows) == 1 + 2 * 13


@pytest.mark.slow
@pytest.mark.parametrize("f", [
    lambda net: jax.eval_shape(net, net.plan(X).params, TREE), repr])
def test_a_net_too_deep_is_refused_and_told_what_adds_no_depth(f):
    error = refused(f, nested(450))
    assert error.wants == "a net nested less deeply"
    assert "repeat(n, layer)" in error.remedy and "layer ** n" in error.remedy
    assert len(str(error)) < 400


@pytest.mark.parametrize("f", [hash, lambda net: net == DEEP], ids=["hash", "equality"])
def test_a_net_too_deep_to_be_hashed_or_compared_is_refused_by_name(f):
    assert "repeat(n, layer)" in refused(f, nested(1000)).remedy


def calls(f):
    """How many functions are called in f."""
    count = 0

    def count_calls(frame, event, given):
        nonlocal count
        count += event == "call"

    sys.setprofile(count_calls)
    try:
        f()
    finally:
        sys.setprofile(None)
    return count


def chain(n):
    net = dp.linear(4)
    for _ in range(n):
        net = net >> jnp.tanh
    return net


@pytest.mark.slow
def test_a_chain_of_n_links_is_made_in_n_steps():
    few, many = (calls(lambda n=n: chain(n).children) for n in (150, 600))
    assert many < 4.2 * few


def test_a_chain_is_the_serial_of_its_links_however_it_is_grouped():
    a, b, c = dp.linear(4), dp.linear(3), jnp.tanh
    for net in ((a >> b) >> c, a >> (b >> c), dp.serial(a, b) >> c, a >> dp.serial(b, c),
                (a >> b >> jax.nn.relu >> c)):
        assert isinstance(net, dp.Layer)
        names = ["linear_0", "linear_1", *(["relu~0"] if "relu" in repr(net) else []), "tanh~0"]
        assert list(net.children) == names and type(net) is dp.Layer
    kept = dp.serial(a, head=b)  # names are the own of a serial, which stays one
    assert list((kept >> c).children) == ["serial_0", "tanh~0"]
    half = a >> b
    assert list((half >> c).children) == ["linear_0", "linear_1", "tanh~0"]
    assert list(half.children) == ["linear_0", "linear_1"]
    with pytest.raises(dp.LayerError, match="wants a layer"):
        _ = half >> [c]
