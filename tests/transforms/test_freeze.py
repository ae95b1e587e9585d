"""`freeze`: no gradient, the same parameters, and statistics that still change."""

import jax
import pytest
from support.comparing import KEY, X, gradient, params_of, same

import diffprog as dp

NET = dp.serial(dp.linear(5), dp.batch_norm(), head=dp.linear(3))


def moved(net):
    params, state = net.init(KEY, X)
    grads = gradient(lambda p, x: net(p, x, state=state), params)
    return {path for path, g in dp.tree.paths(grads).items() if g.any()}


def test_patterns_choose_the_frozen_parameters():
    everything = moved(NET)
    assert everything == set(dp.tree.paths(params_of(NET)))
    assert moved(dp.freeze(NET, "head/**")) == everything - {"head/kernel", "head/bias"}
    assert moved(dp.freeze(NET, exclude="**/bias")) == {p for p in everything if p.endswith("bias")}
    assert moved(dp.freeze(NET, ("head/*", "**/scale"), exclude="head/bias")) == everything - {
        "head/kernel", "batch_norm_0/scale"}
    assert moved(dp.freeze(NET)) == set()


@pytest.mark.slow
def test_parameters_and_input_gradient_are_those_of_the_layer():
    net = dp.freeze(NET)
    params, state = NET.init(KEY, X)
    same(net.init(KEY, X), (params, state))
    to_x = lambda layer: jax.grad(lambda x: layer(params, x, state=state).sum())(X)  # noqa: E731
    same(to_x(net), to_x(NET))
    assert to_x(net).any()


@pytest.mark.slow
def test_running_statistics_still_change():
    net = dp.freeze(NET)
    params, state = net.init(KEY, X)
    _, after = net.apply(params, state, X, train=True)
    assert (after["batch_norm_0"]["mean"] != state["batch_norm_0"]["mean"]).any()
