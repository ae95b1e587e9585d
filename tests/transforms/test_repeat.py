"""`repeat` against a Python loop over its copies."""

import jax
import jax.numpy as jnp
import pytest
from support.comparing import KEY, X, close, gradient, params_of

import diffprog as dp


def unrolled(layer, n):
    """`repeat` as a Python loop over the copies."""

    def plain(params, x):
        for i in range(n):
            x = layer(jax.tree.map(lambda a, i=i: a[i], params), x)
        return x

    return plain


@pytest.mark.parametrize("unroll", [1, 2])
def test_gradient_of_repeat(unroll):
    layer = dp.residual(dp.serial(dp.linear(5), jnp.tanh, dp.linear(4)))
    net, plain = dp.repeat(3, layer, unroll=unroll), unrolled(layer, 3)
    params = params_of(net)
    close(jax.jit(net)(params, X), jax.jit(plain)(params, X))
    close(gradient(net, params), gradient(plain, params))
    if unroll == 1:
        def second(f):
            slope = jax.grad(lambda x: jnp.sum(jnp.sin(f(params, x))))
            return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(slope(x)))))(X)

        close(second(net), second(plain))


def test_repeat_updates_the_state_of_each_copy():
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
