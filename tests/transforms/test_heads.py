"""`heads` against a Python loop over its copies."""

import jax
import jax.numpy as jnp
from support.comparing import X, close, gradient, params_of

import diffprog as dp


def unrolled(layer, n):
    """`heads` as a Python loop over the copies."""

    def plain(params, x):
        copies = [jax.tree.map(lambda a, i=i: a[i], params) for i in range(n)]
        return jnp.concatenate([layer(copy, x) for copy in copies], -1)

    return plain


def test_gradient_of_heads():
    layer = dp.serial(dp.linear(5), jnp.tanh, dp.linear(2))
    net, plain = dp.heads(3, layer), unrolled(layer, 3)
    params = params_of(net)
    assert net(params, X).shape == (3, 6)
    close(jax.jit(net)(params, X), jax.jit(plain)(params, X))
    close(gradient(net, params), gradient(plain, params))
    close(*[jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(params, x) ** 2)))(X) for f in (net, plain)])
