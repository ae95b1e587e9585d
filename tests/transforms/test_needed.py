"""`needed` runs only the operations that the result depends on."""

import jax
import jax.numpy as jnp
from support.comparing import close

from diffprog.transforms.needed import needed

CALLS = []


def heard(x):
    jax.debug.callback(lambda _: CALLS.append(1), x)
    return x


def test_unused_operations_and_callbacks_are_removed():
    def first(x, unread):
        pair = jax.jit(lambda x: (x + 1, heard(x)))(x)
        jax.lax.scan(lambda c, _: (heard(c), None), unread["y"], length=2)
        return {"first": pair[0]}

    CALLS.clear()
    close(needed(first, jnp.ones(2), {"y": jnp.ones(3)})["first"], 2 * jnp.ones(2))
    jax.effects_barrier()
    assert CALLS == []
    traced = jax.make_jaxpr(lambda *given: needed(first, *given))(jnp.ones(2), {"y": jnp.ones(3)})
    assert "scan" not in str(traced) and "callback" not in str(traced)


def test_used_operations_stay_and_are_differentiable():
    close(needed(lambda x, y: (x, 2 * y), jnp.ones(2), jnp.ones(3))[1], 2 * jnp.ones(3))
    close(jax.grad(lambda x: needed(lambda x, y: (x ** 3, y), x, x)[0])(2.0), jnp.asarray(12.0))
