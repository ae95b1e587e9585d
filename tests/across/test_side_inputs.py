"""Masks, positions and memory reach exactly the layers that name them, through every combinator."""

import jax
import jax.numpy as jnp
import pytest
from support.comparing import KEY, equal
from support.refusing import refused

import diffprog as dp

X = jax.random.normal(jax.random.key(5), (2, 4, 4))
SIDE = {
    "mask": jnp.array([[True, True, False, True], [True, True, True, False]]),
    "positions": jnp.array([[0, 1, 1, 2], [3, 5, 8, 9]]),
    "memory": jax.random.normal(jax.random.key(6), (2, 3, 5)),
    "memory_mask": jnp.array([[True, False, True], [True, True, True]]),
}
OTHER = {
    "mask": SIDE["mask"].at[1, 0].set(False), "positions": SIDE["positions"].at[0, 3].set(7),
    "memory": 2 * SIDE["memory"], "memory_mask": SIDE["memory_mask"].at[0, 0].set(False),
}


def asking():
    """One layer takes mask and positions, one the memory and its mask, and one nothing."""
    return dp.serial(own=dp.self_attention(1, rotary=dp.rotary()), ask=dp.cross_attention(2),
                     plain=dp.linear(4))


def read(pair):
    return pair[0] + sum(pair[1].values())


def doubled(layers, x):
    return layers.f(layers.f(x))


WAYS = {
    "serial": dp.serial(asking(), jnp.tanh),
    "residual": dp.residual(asking()),
    "shortcut": dp.residual(dp.linear(4), asking()),
    "branch": dp.branch(dp.linear(4), asking(), merge=dp.add),
    "parallel": dp.serial(lambda x: (x, 2 * x), dp.parallel(asking(), dp.linear(4)), dp.add),
    "program": dp.program(f=asking())(doubled),
    "repeat": dp.repeat(2, asking()),
    "heads": dp.heads(2, asking()),
    "ensemble": dp.ensemble(2, asking()),
    "remat": dp.remat(asking()),
    "linearize": dp.linearize(asking()),
    "mixed": dp.mixed(asking(), jnp.bfloat16),
    "tap": dp.tap(asking(), "ask") >> read,
    "replace": dp.replace(asking(), "plain", dp.linear(3)),
    "add_norm": dp.add_norm(asking()),
    "all": dp.pre_norm(dp.remat(dp.repeat(2, dp.mixed(dp.residual(asking()), jnp.bfloat16)))),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_combinator_passes_side_inputs_to_its_children(name):
    net = WAYS[name]
    assert net.side >= SIDE.keys()
    params, state = net.init(KEY, X, **SIDE)
    run = jax.jit(lambda side: net(params, X, state=state, **side))
    usual = run(SIDE)
    for given in SIDE:
        assert not equal(run(SIDE | {given: OTHER[given]}), usual), given
    assert "leave it out" in refused(net, params, X, state=state, **SIDE, condition=X).remedy


@pytest.mark.parametrize("net", [dp.linear(4), dp.repeat(2, dp.ffn(3)), dp.add_norm(dp.ffn(3))],
                         ids=repr)
@pytest.mark.parametrize(("name", "value"), SIDE.items(), ids=SIDE)
def test_side_inputs_that_no_layer_takes_are_refused(net, name, value):
    error = refused(net.init, KEY, X, **{name: value})
    assert (error.wants, error.got) == ("only side inputs that it takes (none)", name)
