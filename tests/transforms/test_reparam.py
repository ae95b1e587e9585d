"""`reparam`: the tree in place of a leaf, its gradient, its state and its key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, X, close, gradient, names, params_of, same

import diffprog as dp

NET = dp.serial(dp.linear(5), jnp.tanh, head=dp.linear(3))


def logarithm(key, kernel):
    return {"log": jnp.log(jnp.abs(kernel))}


def exponential(tree):
    return jnp.exp(tree["log"])


def drawn(key, kernel):
    return {"kernel": kernel, "noise": jax.random.normal(key, kernel.shape)}


@pytest.mark.slow
def test_a_leaf_is_replaced_by_a_tree_and_computed_from_it():
    net = dp.reparam(NET, logarithm, exponential, "head/kernel")
    plain, params = params_of(NET), params_of(net)
    assert params["linear_0"].keys() == {"kernel", "bias"} and names(net) == names(NET)
    kernel = plain["head"]["kernel"]
    np.testing.assert_allclose(params["head"]["kernel"]["log"], np.log(np.abs(kernel)), rtol=1e-6)
    plain["head"]["kernel"] = jnp.exp(params["head"]["kernel"]["log"])
    close(net(params, X), NET(plain, X))
    # d/dlog = d/dw * w, by hand.
    through = gradient(net, params)["head"]["kernel"]["log"]
    direct = gradient(NET, plain)["head"]["kernel"]
    close(through, direct * plain["head"]["kernel"])


def test_several_patterns():
    net = dp.reparam(NET, logarithm, exponential, ("linear_0/kernel", "head/*"))
    replaced = {path for path in dp.tree.paths(params_of(net)) if path.endswith("log")}
    assert replaced == {"linear_0/kernel/log", "head/kernel/log", "head/bias/log"}


@pytest.mark.slow
def test_leaves_and_copies_have_different_keys():
    net = dp.reparam(dp.serial(dp.repeat(2, dp.linear(4)), dp.linear(4)), drawn,
                     lambda tree: tree["kernel"])
    params = params_of(net)
    first, second = params["repeat_0"]["kernel"]["noise"]
    other = params["linear_0"]["kernel"]["noise"]
    assert len({float(noise[0, 0]) for noise in (first, second, other)}) == 3
    same(params, jax.jit(net.init)(KEY, X)[0])


def test_carried_arrays_are_state():
    """A counter of training calls for each copy."""
    def use(leaf, calls, train):
        return leaf, calls + train

    net = dp.repeat(2, dp.reparam(dp.linear(4), lambda key, leaf: leaf, use,
                                  carry=lambda leaf: jnp.zeros((), jnp.int32)))
    params, state = net.init(KEY, X)
    for _ in range(3):
        y, state = net.apply(params, state, X, train=True)
    same(net.apply(params, state, X)[1], state)
    assert state["#reparam"]["kernel"].tolist() == [3, 3]
    same(y, dp.repeat(2, dp.linear(4))(params, X))


def test_a_constant_has_no_gradient():
    net = dp.reparam(dp.linear(3), drawn, lambda tree: tree["kernel"] + tree["noise"],
                     constant="noise")
    grads = gradient(net, params_of(net))["kernel"]
    assert bool(grads["kernel"].any()) and not bool(grads["noise"].any())


def test_tap_inside_reparam():
    net = dp.tap(dp.reparam(NET, logarithm, exponential), "linear_0")
    params = params_of(net)
    _, seen = net(params, X)
    plain, _ = dp.tree.merge(net, params)
    same(seen["linear_0"], dp.linear(5)(plain["linear_0"], X))
