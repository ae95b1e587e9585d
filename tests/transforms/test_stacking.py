"""Copies have their own parameters and keys, and are initialized as the layer alone."""

import functools

import jax
import jax.numpy as jnp
import pytest
from support.comparing import KEY, X, equal, identity, same

import diffprog as dp


@pytest.mark.parametrize("wrap", [
    functools.partial(dp.repeat, 3), functools.partial(dp.heads, 3)], ids=["repeat", "heads"])
def test_copies_are_initialized_as_if_alone(wrap):
    layer = dp.serial(dp.linear(4), dp.batch_norm())
    trees = wrap(layer).init(KEY, X)
    for i in range(3):
        alone = layer.init(jax.random.fold_in(KEY, i), X)
        same(jax.tree.map(lambda a, i=i: a[i], trees), alone)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [dp.repeat, dp.heads], ids=["repeat", "heads"])
def test_copies_have_different_keys(wrap):
    seen = dp.serial(dp.dropout(0.5), identity)
    ones = jnp.ones((6, 8))
    y, _ = wrap(2, seen).apply({}, {}, ones, key=KEY, train=True)
    first, second = (seen.apply({}, {}, ones, key=jax.random.fold_in(KEY, i), train=True)[0]
                     for i in range(2))
    assert not equal(first, second)
    same(y, first * second if wrap is dp.repeat else jnp.concatenate([first, second], -1))
