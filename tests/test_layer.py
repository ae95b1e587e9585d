"""JAX transformations on the pair, and copies against their unrolled counterparts."""

import jax
import jax.numpy as jnp
import pytest
from comparing import KEY, X, close, equal, gradient, identity, params_of, same

import diffprog as dp

# JAX's transformations work on the pair unwrapped.

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
    assert jax.tree.map(jnp.shape, trees) == jax.tree.map(lambda a: a.shape, shapes)
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


def unrolled(layer, n):
    """What `repeat` and `heads` say they are, with a Python loop over copy i of the trees."""
    def at(tree, i):
        return jax.tree.map(lambda a: a[i], tree)

    def repeat(params, x):
        for i in range(n):
            x = layer(at(params, i), x)
        return x

    def heads(params, x):
        return jnp.concatenate([layer(at(params, i), x) for i in range(n)], -1)

    return {"repeat": repeat, "heads": heads}


@pytest.mark.parametrize("unroll", [1, 2])
def test_gradient_of_repeat(unroll):
    layer = dp.residual(dp.serial(dp.linear(5), jnp.tanh, dp.linear(4)))
    net, plain = dp.repeat(3, layer, unroll=unroll), unrolled(layer, 3)["repeat"]
    params = params_of(net)
    close(jax.jit(net)(params, X), jax.jit(plain)(params, X))
    close(gradient(net, params), gradient(plain, params))
    if unroll == 1:
        def second(f):
            slope = jax.grad(lambda x: jnp.sum(jnp.sin(f(params, x))))
            return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(slope(x)))))(X)

        close(second(net), second(plain))


def test_gradient_of_heads():
    layer = dp.serial(dp.linear(5), jnp.tanh, dp.linear(2))
    net, plain = dp.heads(3, layer), unrolled(layer, 3)["heads"]
    params = params_of(net)
    assert net(params, X).shape == (3, 6)
    close(jax.jit(net)(params, X), jax.jit(plain)(params, X))
    close(gradient(net, params), gradient(plain, params))
    close(*[jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(params, x) ** 2)))(X) for f in (net, plain)])


def test_repeat_moves_the_state_of_each_copy():
    layer = dp.serial(dp.linear(4), dp.batch_norm())
    net = dp.repeat(3, layer)
    params, state = net.init(KEY, X)
    y, after = jax.jit(net.apply, static_argnames="train")(params, state, X, train=True)
    x, moved = X, []
    run = jax.jit(layer.apply, static_argnames="train")
    for i in range(3):
        own, old = jax.tree.map(lambda a, i=i: a[i], (params, state))
        x, new = run(own, old, x, train=True)
        moved.append(new)
    close((y, after), (x, jax.tree.map(lambda *a: jnp.stack(a), *moved)))


@pytest.mark.parametrize("wrap", [dp.repeat, dp.heads], ids=["repeat", "heads"])
def test_copies_have_own_randomness(wrap):
    seen = dp.serial(dp.dropout(0.5), identity)
    ones = jnp.ones((6, 8))
    y, _ = wrap(2, seen).apply({}, {}, ones, key=KEY, train=True)
    first, second = (seen.apply({}, {}, ones, key=jax.random.fold_in(KEY, i), train=True)[0]
                     for i in range(2))
    assert not equal(first, second)
    same(y, first * second if wrap is dp.repeat else jnp.concatenate([first, second], -1))
