"""Restarted rows of a stream equal new ones, and the others continue."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import close

import diffprog as dp

KEY = jax.random.key(0)
ROWS = np.array([False, True, False])
ATTENTION = dp.self_attention(1, causal=True, rotary=dp.rotary())
NETS = {
    "lstm": dp.recurrent(dp.lstm(3)),
    "conv": dp.conv(3, 2, dims=1, padding="CAUSAL", dilation=2),
    "attention": ATTENTION,
    "window": dp.self_attention(1, causal=True, window=3),
    "positions": dp.learned_positions(12) >> ATTENTION,
    "copies": dp.repeat(2, dp.pre_norm(ATTENTION, dp.rms_norm())),
    "with statistics": dp.batch_norm() >> dp.recurrent(dp.gru(2)),
}


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "positions" else pytest.mark.slow)
    for name in NETS])
def test_a_restarted_row_equals_a_new_one(name):
    net, old, new = NETS[name], drawn(3, 4, 4), drawn(3, 4, 4, seed=1)
    params, rest = net.init(KEY, old)
    step = jax.jit(net.apply)
    _, state = step(params, net.start(params, rest, old, length=12), old)
    begun, after = step(params, net.start(params, rest, new, length=12), new)
    gone_on, later = step(params, state, new)
    restart = jax.jit(functools.partial(dp.training.restart, net, length=12))
    mixed, last = step(params, restart(params, state, new, ROWS), new)
    close(mixed[ROWS], begun[ROWS])
    close(mixed[~ROWS], gone_on[~ROWS])
    assert not np.allclose(begun[ROWS], gone_on[ROWS])
    more = step(params, last, old)[0]
    close(more[ROWS], step(params, after, old)[0][ROWS])
    close(more[~ROWS], step(params, later, old)[0][~ROWS])


@pytest.mark.slow
def test_a_restarted_row_uses_the_given_memory():
    net = dp.cross_attention(1)
    x, one, other = drawn(3, 2, 4), drawn(3, 5, 4, seed=1), drawn(3, 5, 4, seed=2)
    params, _ = net.init(KEY, x, memory=one)
    state = net.start(params, {}, x, length=4, memory=one)
    state = dp.training.restart(net, params, state, x, ROWS, length=4, memory=other)
    y, _ = net.apply(params, state, x)
    close(y, jnp.where(ROWS[:, None, None], net(params, x, memory=other),
                       net(params, x, memory=one)))


@pytest.mark.slow
def test_no_gradient_passes_a_restart():
    net, x = NETS["lstm"], drawn(3, 4, 4)
    params, rest = net.init(KEY, x)

    def last(x):
        _, state = net.apply(params, net.start(params, rest, x, length=8), x)
        state = dp.training.restart(net, params, state, x, ROWS, length=8)
        return net.apply(params, state, jnp.ones_like(x))[0].sum()

    found = jax.grad(last)(x)
    assert (found[ROWS] == 0).all() and (found[~ROWS] != 0).any()
