"""`ensemble` equals a Python loop over its copies, in value and gradient."""

import jax
import jax.numpy as jnp
import pytest
from support.comparing import KEY, X, close, equal, gradient, params_of, same

import diffprog as dp

LAYER = dp.serial(dp.linear(5), jnp.tanh, dp.linear(2))


def copy(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


def test_ensemble_equals_a_loop_over_its_members():
    net = dp.ensemble(3, LAYER)
    params = params_of(net)

    def loop(params, x):
        return jnp.stack([LAYER(copy(params, i), x) for i in range(3)])

    assert net(params, X).shape == (3, 3, 2)
    close(jax.jit(net)(params, X), jax.jit(loop)(params, X))
    close(gradient(net, params), gradient(loop, params))


@pytest.mark.slow
def test_a_member_is_initialized_as_the_layer_alone():
    net = dp.ensemble(2, LAYER)
    params = params_of(net)
    for i in range(2):
        same(copy(params, i), LAYER.init(jax.random.fold_in(KEY, i), X)[0])


@pytest.mark.slow
def test_members_have_their_own_statistics_and_noise():
    net = dp.ensemble(2, dp.serial(dp.linear(4), dp.batch_norm(), dp.dropout(0.5)))
    params, state = net.init(KEY, X)
    y, after = net.apply(params, state, X, key=KEY, train=True)
    assert not equal(y[0] == 0, y[1] == 0)
    assert after["batch_norm_0"]["mean"].shape == (2, 4)
    assert not equal(*after["batch_norm_0"]["mean"])


def test_outputs_may_be_pytrees():
    net = dp.ensemble(2, dp.branch(dp.linear(2), jnp.sin))
    assert [a.shape for a in net.plan(X).y] == [(2, 3, 2), (2, 3, 4)]


def test_children_are_named_ensemble():
    net = dp.serial(dp.ensemble(2, dp.linear(3)), dp.ensemble(2, dp.linear(3)))
    assert list(net.children) == ["ensemble_0", "ensemble_1"]
    assert repr(net) == "serial(ensemble(2, linear(3)), ensemble(2, linear(3)))"
