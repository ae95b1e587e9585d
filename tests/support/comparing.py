"""What several test files compare with: keys, inputs, trees and jaxprs."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (3, 4))


def names(net):
    return list(net.children)


def same(a, b):
    """Assert that two trees are equal to the last bit, in dtypes too."""
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(a, b)


def close(a, b):
    """Assert that two trees are equal but for rounding, which is relative to the largest entry."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(b))
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.shape == v.shape
        np.testing.assert_allclose(np.asarray(u), np.asarray(v), rtol=0, atol=1e-5 * largest)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def computes(net, params, x, wanted):
    """Assert that a net with these parameters gives what NumPy gave, in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        dp.tree.verify(net, params, jnp.asarray(x))
        y = net(params, jnp.asarray(x))
        assert y.shape == wanted.shape
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)


def equal(a, b):
    try:
        same(a, b)
    except AssertionError:
        return False
    return True


def params_of(net, x=X, **side):
    return net.init(KEY, x, **side)[0]


def gradient(net, params, x=X, **side):
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(net(p, x, **side)))))(params)


def spy(seen):
    """A function that changes nothing and remembers what passes."""

    def spy(x):
        seen.append(x)
        return x

    return spy


def identity(x):
    return x


def copies(x):
    return x, x


def equations(jaxpr):
    """How often each primitive occurs, also inside other equations."""
    count = collections.Counter()
    for equation in jaxpr.eqns:
        count[equation.primitive.name] += 1
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                count += equations(inner)
    return count


def moved(tree, seed=3):
    """The tree with every float moved at random: as training leaves no two trees alike."""
    leaves, structure = jax.tree.flatten(tree)
    draw = np.random.default_rng(seed)
    return structure.unflatten([
        leaf + jnp.asarray(0.2 * draw.normal(size=leaf.shape), leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf for leaf in leaves])
