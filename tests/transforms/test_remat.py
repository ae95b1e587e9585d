"""`remat`: fewer stored activations, and the same values, gradients and names."""

import functools

import jax
import jax.numpy as jnp
import pytest
from support.comparing import KEY, X, close, gradient, names, params_of, same
from support.refusing import expect

import diffprog as dp

BLOCK = dp.residual(dp.serial(dp.linear(6), jnp.tanh, dp.linear(4)))
MANY = jax.random.normal(KEY, (100, 4))  # so that activations outweigh parameters


def kept(net):
    """The number of floats that the forward pass stores for the backward pass."""
    params = params_of(net)
    _, pull = jax.vjp(lambda p: net(p, MANY), params)
    return sum(leaf.size for leaf in jax.tree.leaves(pull))


@pytest.mark.slow
def test_repeat_of_remat_and_remat_of_repeat_agree():
    plain = dp.repeat(3, BLOCK)
    params = params_of(plain)
    nets = [dp.repeat(3, dp.remat(BLOCK)), dp.remat(plain), dp.repeat(3, BLOCK, remat=True),
            dp.remat(dp.repeat(3, dp.remat(BLOCK, policy="dots_saveable")))]
    for net in nets:
        close(net(params, X), plain(params, X))
        close(gradient(net, params), gradient(plain, params))
        assert kept(net) < kept(plain)


@pytest.mark.slow
def test_policies_differ_in_the_stored_activations():
    net = dp.serial(dp.linear(6), jnp.sin, jnp.sin, jnp.sin, dp.linear(4))
    least, dots, all_of_it = (kept(dp.remat(net, policy=policy)) for policy in (
        "nothing_saveable", "dots_saveable", "everything_saveable"))
    assert least < dots < all_of_it == kept(net)
    assert kept(dp.remat(net)) == least
    assert kept(dp.remat(net, policy=jax.checkpoint_policies.dots_saveable)) == dots


def test_a_policy_stores_products_with_weights_but_not_batched_ones():
    def attend(x):
        return jnp.sin(jnp.einsum("bij,bkj->bik", x[:, None], x[:, None]))[:, 0]

    net = dp.linear(4) >> attend
    dots, weights = (kept(dp.remat(net, policy=policy)) for policy in (
        "dots_saveable", "dots_with_no_batch_dims_saveable"))
    assert weights < dots


@pytest.mark.slow
def test_policies_in_repeat():
    assert repr(dp.repeat(2, BLOCK, remat="dots_saveable")).endswith("remat='dots_saveable')")
    few = kept(dp.repeat(3, BLOCK, remat=True))
    assert few < kept(dp.repeat(3, BLOCK, remat="dots_saveable")) < kept(dp.repeat(3, BLOCK))


@pytest.mark.parametrize("make", [dp.remat, functools.partial(dp.repeat, 2)])
def test_unknown_policies_raise(make):
    option = {"policy": "all"} if make is dp.remat else {"remat": "all"}
    shown = "remat(linear(4), policy='all')"
    expect("", f"{shown}: wants policy out of dots_saveable, "
               "dots_with_no_batch_dims_saveable, everything_saveable, nothing_saveable, "
               "got 'all'; choose one of them, or pass one of jax.checkpoint_policies itself",
           make, dp.linear(4), **option)


@pytest.mark.slow
def test_it_keeps_randomness_and_state():
    layer = dp.serial(dp.linear(4), dp.batch_norm(), dp.dropout(0.5))
    params, state = layer.init(KEY, X)
    for options in ({}, {"train": True, "key": KEY}):
        close(dp.remat(layer).apply(params, state, X, **options),
              layer.apply(params, state, X, **options))


@pytest.mark.parametrize("layer", [
    dp.linear(4), dp.serial(dp.linear(4), jnp.tanh), dp.residual(dp.linear(4)), dp.batch_norm(),
    dp.repeat(2, dp.linear(4)), dp.heads(2, dp.linear(2)), dp.serial(jnp.tanh), jnp.tanh,
], ids=lambda layer: repr(dp.serial(layer)))
def test_remat_renames_nothing_and_changes_no_value(layer):
    plain = dp.serial(dp.linear(4), layer, dp.linear(4))
    wrapped = dp.serial(dp.linear(4), dp.remat(layer), dp.linear(4))
    assert names(wrapped) == names(plain)
    params, state = plain.init(KEY, X)
    same(wrapped.init(KEY, X), (params, state))
    for net in (plain, wrapped):
        assert net.plan(X).params.keys() == params.keys()
    run = [jax.jit(net.apply, static_argnames="train") for net in (wrapped, plain)]
    same(*[f(params, state, X, train=True) for f in run])
    close(gradient(wrapped, params, state=state), gradient(plain, params, state=state))
    text = [str(jax.make_jaxpr(net.apply)(params, state, X)) for net in (wrapped, plain)]
    assert ["checkpoint" in t or "remat" in t for t in text] == [True, False]


def test_remat_keeps_the_dropout_pattern():
    plain = dp.serial(dp.linear(4), dp.dropout(0.5))
    wrapped = dp.serial(dp.linear(4), dp.remat(dp.dropout(0.5)))
    trees = plain.init(KEY, X)
    same(wrapped.apply(*trees, X, key=KEY, train=True), plain.apply(*trees, X, key=KEY, train=True))
