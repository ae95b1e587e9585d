"""`replace`: the replaced layers, and that all others stay."""

import jax
import jax.numpy as jnp
import pytest
from support.comparing import KEY, equal, params_of, same
from support.refusing import expect

import diffprog as dp

NET = dp.serial(body=dp.linear(8) >> jax.nn.relu >> dp.repeat(2, dp.residual(dp.linear(8))),
                head=dp.linear(3))


@pytest.mark.slow
def test_other_layers_keep_their_parameters():
    net = dp.replace(NET, "head", dp.linear(5))
    old, new = params_of(NET), params_of(net)
    same(new["body"], old["body"])
    assert new["head"]["kernel"].shape == (8, 5)
    assert NET.children["head"] is not net.children["head"]
    assert repr(NET.children["head"]) == "linear(3)"


def test_a_function_gets_the_old_layer():
    net = dp.replace(NET, "**/linear_0", dp.remat)
    assert repr(net) == ("serial(body=serial(remat(linear(8)), jax.nn.relu, repeat(2, "
                         "residual(linear(8)))), head=linear(3))")
    same(params_of(net), params_of(NET))


@pytest.mark.parametrize("wrap", [
    lambda f: dp.repeat(2, f), lambda f: dp.heads(1, f), lambda f: dp.ensemble(2, f), dp.remat,
    lambda f: dp.mixed(f, jnp.float32),
], ids=["repeat", "heads", "ensemble", "remat", "mixed"])
def test_replace_inside_wrappers(wrap):
    x = jnp.ones((2, 8))
    net = dp.serial(inner=wrap(dp.residual(dp.linear(8))))
    new = dp.replace(net, "inner/body", dp.linear(8, kernel_init="zeros"))
    assert not equal(params_of(net, x), params_of(new, x))
    assert jnp.all(params_of(new, x)["inner"]["body"]["kernel"] == 0)
    assert "kernel_init='zeros'" in repr(new)


def test_a_match_inside_a_match_is_replaced_first():
    seen = []

    def watch(layer):
        seen.append(repr(layer))
        return layer

    dp.replace(dp.serial(a=dp.serial(b=dp.linear(2))), "**", watch)
    assert seen == ["linear(2)", "serial(b=linear(2))"]


def test_an_unchanged_net_is_the_same_object():
    net = dp.replace(NET, "head", lambda old: old)
    assert net is NET


def test_a_shared_child_stays_shared():
    @dp.program(f=dp.linear(4))
    def twice(layers, x):
        return layers.f(layers.f(x))

    net = dp.replace(twice, "f", dp.linear(4, bias=False))
    assert dp.tree.count(params_of(net)) == 16


def test_invalid_patterns_and_layers_raise():
    expect("", "wants a pattern that matches a layer (body, body/linear_0, body/relu~0, "
               "body/repeat_0, body/repeat_0/body, head), got 'tail'; correct it: * is one level, "
               "** any number", dp.replace, NET, "tail", dp.linear(3))
    error = expect("body/relu~0", "body/relu~0 (jax.nn.relu): wants a function from a layer to a "
                                  "layer, got jax.nn.gelu, which takes no layer; write lambda "
                                  "old: jax.nn.gelu for an activation",
                   dp.replace, NET, "**/relu~0", jax.nn.gelu)
    assert error.__cause__
    expect("head", "head (linear(3)): wants a layer or a function of one input, got 3; pass "
                   "dp.linear(8) or jax.nn.relu, for example",
           dp.replace, NET, "head", lambda old: 3)


@pytest.mark.slow
def test_a_net_with_a_replaced_layer_streams():
    causal = dp.conv(4, 2, dims=1, padding="CAUSAL")
    net = dp.replace(dp.serial(causal, jnp.tanh, causal), "conv_1", lambda f: dp.residual(f))
    x = jax.random.normal(KEY, (2, 3, 4))
    params, state = net.init(KEY, x)
    state = net.start(params, state, x[:, :1], length=3)
    parts = []
    for t in range(3):
        y, state = net.apply(params, state, x[:, t : t + 1])
        parts.append(y)
    assert jnp.allclose(jnp.concatenate(parts, 1), net(params, x), atol=1e-6)
    assert list(net.children) == ["conv_0", "tanh~0", "conv_1"]
