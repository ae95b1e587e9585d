"""What is read in jaxprs, some of it written in another way from version to version of JAX."""

import jax
import jax.numpy as jnp

from diffprog.core.jaxprs import primitives, scan_sizes


def test_the_parts_of_a_scan():
    x, steps = jnp.ones(3), (jnp.ones((4, 3)), jnp.ones((4, 2)))

    def run(x, steps):
        def body(carry, step):
            return (carry[0] + step[0] * x, carry[1] + 1), step[1]

        return jax.lax.scan(body, (x, jnp.zeros(2)), steps)

    scan, = (e for e in jax.make_jaxpr(run)(x, steps).eqns if e.primitive.name == "scan")
    assert scan_sizes(scan.params) == (1, 2)
    assert len(scan.invars) == 1 + 2 + len(steps)


def test_primitives_inside_loops_and_calls_are_found():
    def run(x):
        once = jax.jit(jnp.sin)(x)
        return jax.lax.cond(x.sum() > 0, lambda x: jax.lax.map(jnp.cos, x), jnp.tanh, once)

    found = primitives(jax.make_jaxpr(run)(jnp.ones(3)).jaxpr)
    assert {"sin", "cond", "scan", "cos", "tanh"} <= found and "exp" not in found
