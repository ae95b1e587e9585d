"""What JAX writes into a jaxpr in another way from version to version."""

import jax
import jax.numpy as jnp

from diffprog.core.jaxprs import scan_sizes


def test_the_parts_of_a_scan():
    x, steps = jnp.ones(3), (jnp.ones((4, 3)), jnp.ones((4, 2)))

    def run(x, steps):
        def body(carry, step):
            return (carry[0] + step[0] * x, carry[1] + 1), step[1]

        return jax.lax.scan(body, (x, jnp.zeros(2)), steps)

    scan, = (e for e in jax.make_jaxpr(run)(x, steps).eqns if e.primitive.name == "scan")
    assert scan_sizes(scan.params) == (1, 2)
    assert len(scan.invars) == 1 + 2 + len(steps)
