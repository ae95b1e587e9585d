"""A layer is a pair of functions: JAX's transformations work on it unwrapped."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, X, close, equal, same

import diffprog as dp

DEEP = dp.serial(dp.batch_norm(), dp.repeat(2, dp.residual(dp.linear(4))),
                 dp.dropout(0.5), head=dp.heads(2, dp.linear(1)))


@pytest.fixture(scope="module")
def trees():
    return DEEP.init(KEY, X)


def test_jit(trees):
    params, state = trees
    same(jax.jit(DEEP.init)(KEY, X), trees)
    close(jax.jit(DEEP.apply)(params, state, X), DEEP.apply(params, state, X))
    run = jax.jit(DEEP.apply, static_argnames="train")
    close(run(params, state, X, key=KEY, train=True),
          DEEP.apply(params, state, X, key=KEY, train=True))
    close(jax.jit(DEEP)(params, X, state=state), DEEP.apply(params, state, X)[0])


def test_vmap(trees):
    params, state = trees
    many = jnp.stack([X, 2 * X, X - 1])
    apply = jax.jit(DEEP.apply)
    mapped = jax.jit(jax.vmap(DEEP.apply, in_axes=(None, None, 0), out_axes=(0, None)))
    close(mapped(params, state, many)[0], jnp.stack([apply(params, state, x)[0] for x in many]))
    one = jax.jit(jax.vmap(lambda x: DEEP(params, x, state=state)))(X)
    close(one, apply(params, state, X)[0])  # without a batch axis
    keys = jnp.stack([KEY, jax.random.key(1)])
    many = jax.vmap(DEEP.init, in_axes=(0, None))(keys, X)
    same(jax.tree.map(lambda a: a[0], many), trees)
    assert not equal(jax.tree.map(lambda a: a[1], many), trees)


def test_abstract_evaluation(trees):
    shapes = jax.eval_shape(DEEP.init, KEY, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(trees, shapes)
    spec = jax.ShapeDtypeStruct(X.shape, X.dtype)
    same(DEEP.init(KEY, spec), trees)
    assert DEEP.plan(spec).y == jax.ShapeDtypeStruct((3, 2), jnp.float32)


def test_grad(trees):
    params, state = trees

    def loss(params, x):
        y, after = DEEP.apply(params, state, x, key=KEY, train=True)
        return jnp.sum(jnp.square(y)), after

    grads, after = jax.jit(jax.grad(loss, has_aux=True))(params, X)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert not equal(after, state)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads["repeat_0"]))
    along = jax.jit(lambda p: jax.jvp(lambda p: loss(p, X)[0], (p,), (p,))[1])(params)
    inner = sum(jnp.vdot(g, p) for g, p in zip(
        jax.tree.leaves(grads), jax.tree.leaves(params), strict=True))
    close(along, inner)


def test_a_layer_is_a_pair():
    net = dp.serial(dp.linear(3), dp.batch_norm())
    init, apply = net
    assert init is net.init and apply is net.apply
    params, state = init(KEY, X)
    y, after = apply(params, state, X, train=True)
    same((y, after), net.apply(params, state, X, train=True))


def test_a_replaced_apply_loses_the_fields_that_describe_the_old_one():
    """`dataclasses.replace` hands on what it is not told to replace, and the layer forgets it."""
    net = dp.repeat(2, dp.linear(4))
    named = dataclasses.replace(net, name="other")
    assert repr(named.within(lambda part: dp.linear(4, bias=False))) == (
        "repeat(2, linear(4, bias=False))")
    assert dataclasses.replace(named, apply=lambda *given, **more: net.apply(
        *given, **more)).within is None
    again = dataclasses.replace(named, apply=net.apply, within=lambda f: f(net))
    assert again.within(lambda part: part) is net


@pytest.mark.parametrize("net", [
    dp.mixed(dp.linear(3), jnp.bfloat16), dp.batch_norm(), dp.sinusoidal_positions(),
    dp.fixed_point(lambda pair: pair[1] + 0.9 * jnp.sin(pair[0])),
], ids=repr)
def test_float64_of_numpy_is_what_jax_makes_of_it(net):
    """A warning that x is truncated would fail here, and so would a tolerance of float64."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    params, state = net.init(KEY, x)
    same(net.apply(params, state, x), net.apply(params, state, jnp.asarray(x)))
    assert np.isfinite(net(params, x, state=state)).all()
