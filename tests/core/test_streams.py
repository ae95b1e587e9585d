"""Streams of one net do not know of each other: what a call needs is in its own arguments."""

import concurrent.futures

import jax
import jax.numpy as jnp
import pytest
from support.comparing import KEY, close, same
from support.refusing import refused

import diffprog as dp

X = jax.random.normal(KEY, (2, 4, 3))


def reader():
    """Joins the memory of its stream to each step, so that its output is as wide as that."""

    def joined(x, memory):
        wide = jnp.broadcast_to(memory[:, None], (*x.shape[:2], memory.shape[-1]))
        return jnp.concatenate([x, wide], -1)

    def init(key, x, *, memory):
        return {}, {}

    def apply(params, state, x, *, key=None, train=False, memory=None):
        return joined(x, state["memory"] if memory is None else memory), state

    def start(params, state, x, *, length, memory):
        return {"memory": memory}

    return dp.Layer(init, apply, start, side=frozenset({"memory"}), kept=frozenset({"memory"}),
                    name="reader")


def cell():
    """Adds up its steps and a memory that the stream keeps."""

    def init(key, x, *, memory):
        return {}, {}

    def apply(params, state, x, *, key=None, train=False, memory=None):
        total = x + state["total"] if state else x
        memory = state["memory"] if memory is None else memory
        seen = memory.sum(-1).reshape(-1, *[1] * (x.ndim - 1))
        return total + seen, {**state, "total": total} if state else state

    def start(params, state, x, *, length, memory):
        return {"total": jnp.zeros_like(x), "memory": memory}

    return dp.Layer(init, apply, start, side=frozenset({"memory"}), kept=frozenset({"memory"}),
                    name="cell")


WITH_MEMORY = {
    "tap": dp.tap(dp.serial(read=reader()), "read"),
    "tap of tap": dp.tap(dp.tap(dp.serial(read=dp.serial(read=reader())), "read"), "read/read"),
    "tap in repeat": dp.repeat(2, dp.tap(dp.serial(read=cell()), "read") >> (
        lambda pair: pair[0])),
    "recurrent": dp.recurrent(cell()),
    "recurrent of tap": dp.recurrent(dp.tap(dp.serial(read=cell()), "read") >> (
        lambda pair: pair[0])),
    "fixed point": dp.fixed_point(dp.serial(
        first=lambda pair: 0.1 * pair[0] + pair[1], read=cell()), steps=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_two_streams_of_one_net_are_each_as_alone(name):
    """Of other examples and of another memory, begun before and going on after each other."""
    net = WITH_MEMORY[name]
    given = [(X, jnp.ones((2, 2))), (jnp.ones((3, 4, 3)), jnp.ones((3, 5)))]
    side = {"mask": jnp.ones((2, 1), bool)} if name.startswith("recurrent") else {}

    def begun(x, memory):
        params, rest = net.init(KEY, x, memory=memory)
        return params, net.start(params, rest, x[:, :1], length=4, memory=memory)

    def shapes(params, state, x):
        return jax.eval_shape(lambda *trees: net.apply(*trees, **side), params, state, x)

    params, first = begun(*given[0])
    alone = shapes(params, first, X[:, :1])
    begun(*given[1])
    assert shapes(params, first, X[:, :1]) == alone


@pytest.mark.slow
def test_a_tapped_stream_has_outputs_of_its_own_memory():
    net = WITH_MEMORY["tap"]
    streams = {m: net.start({}, {}, X[:, :1], length=4, memory=jnp.full((2, m), float(m)))
               for m in (1, 3)}
    for m, state in streams.items():
        for t in range(2):
            (y, seen), state = net.apply({}, state, X[:, t : t + 1])
            close(y, jnp.concatenate([X[:, t : t + 1], jnp.full((2, 1, m), float(m))], -1))
            same(seen["read"], y)


def test_a_stream_without_its_memory_is_not_refused_for_the_names_of_its_state():
    """`init` cannot be asked without the memory, so the layer must know what is in its state."""
    net = dp.serial(read=reader(), act=jnp.tanh)
    state = net.start({}, {}, X[:, :1], length=4, memory=jnp.ones((2, 2)))
    again = dp.serial(read=reader(), act=jnp.tanh)  # which has seen nothing
    same(again.apply({}, state, X), net.apply({}, state, X))


@pytest.mark.slow
def test_running_statistics_are_shared_by_the_calls_of_a_stream_that_lacks_its_memory():
    """What `init` gave belongs to the child, also where a plan would take what was not given."""
    causal = dp.conv(3, 2, dims=1, padding="CAUSAL")
    child = dp.serial(norm=dp.batch_norm(), mix=causal, look=cell_like())
    net = dp.program(f=child)(lambda layers, x: layers.f(layers.f(x)))
    memory = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    params, rest = net.init(KEY, X, memory=memory)
    whole = net(params, X, state=rest, memory=memory)
    state = net.start(params, rest, X[:, :1], length=4, memory=memory)
    fresh = dp.program(f=child)(lambda layers, x: layers.f(layers.f(x)))
    y = []
    for t in range(4):
        out, state = fresh.apply(params, state, X[:, t : t + 1])
        y.append(out)
    close(jnp.concatenate(y, 1), whole)
    assert "norm" not in state["f@1"]


def cell_like():
    """Adds what it remembers of the memory: the same at every step."""

    def apply(params, state, x, *, key=None, train=False, memory=None):
        memory = state["memory"] if memory is None else memory
        return x + memory.mean(-1)[:, None, None], state

    def start(params, state, x, *, length, memory):
        return {"memory": memory}

    return dp.Layer(lambda key, x, *, memory: ({}, {}), apply, start, name="look",
                    side=frozenset({"memory"}), kept=frozenset({"memory"}))


def test_a_child_that_a_stream_calls_no_more_is_noticed_in_a_net_that_was_never_planned():
    causal = dp.conv(3, 2, dims=1, padding="CAUSAL")

    def made():
        return dp.program(f=causal, g=dp.batch_norm())(
            lambda layers, x, *, flag=None: layers.g(x if flag is None else layers.f(x)))

    net, flag = made(), jnp.ones(())
    params, rest = net.init(KEY, X, flag=flag)
    state = net.start(params, rest, X[:, :1], length=4, flag=flag)
    error = refused(made().apply, params, state, X)
    assert error.wants == "as many calls of f as start made" and error.got == "0"
    # At rest a child with statistics may be called or not.
    made().apply(params, rest, X)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tap", "plain", "stream"])
def test_sixteen_threads_trace_one_net(name):
    net = dp.serial(
        dp.linear(3), dp.repeat(2, dp.residual(dp.linear(3) >> jnp.tanh)),
        dp.conv(3, 2, dims=1, padding="CAUSAL"), dp.lora(dp.linear(3), 1), dp.batch_norm())
    if name == "tap":
        net = dp.tap(net, "**/tanh~0")
    params, state = net.init(KEY, X)
    if name == "stream":
        state = net.start(params, state, X[:, :1], length=4)

    def traced(i):
        x = jnp.ones((2, 1 + i % 4, 3))
        jaxpr = jax.make_jaxpr(lambda *given: net.apply(*given, train=i % 2 == 1))(
            params, state, x)
        return i, str(jaxpr.out_avals)

    alone = dict(map(traced, range(4)))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for i, shapes in pool.map(traced, range(64)):
            assert shapes == alone[i % 4]
