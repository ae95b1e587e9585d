"""Streaming is forwarded by every combinator, shown on a toy."""

import jax
import jax.numpy as jnp
import pytest
from cases import CASES
from support.comparing import KEY, close, equal, same

import diffprog as dp

# Streaming, shown on a toy: the running sum over axis 1.

SERIES = jax.random.normal(jax.random.key(2), (2, 6, 3))


def running():
    def init(key, x):
        return {"scale": jax.random.normal(key, x.shape[-1:])}, {}

    def apply(params, state, x, *, key=None, train=False):
        y = jnp.cumsum(x, axis=1)
        if "total" in state:
            y = y + state["total"][:, None]
            state = {"total": y[:, -1]}
        return params["scale"] * y, state

    def start(params, state, x, *, length):
        return {"total": jnp.zeros_like(x[:, 0])}

    return dp.Layer(init, apply, start, name="running")


def again(layers, x):
    return layers.run(layers.lin(layers.run(x)))


STREAMS = {
    "alone": (running(), {"total"}),
    "serial": (dp.serial(running(), jax.nn.relu, dp.linear(3), running()),
               {"running_0/total", "running_1/total"}),
    "residual": (dp.residual(running()), {"body/total"}),
    "branch": (dp.branch(running(), dp.linear(2), merge=dp.concatenate), {"running_0/total"}),
    "program": (dp.program(run=running(), lin=dp.linear(3))(again), {"run/total", "run@1/total"}),
    "program of a serial": (dp.program(run=dp.serial(running()), lin=dp.linear(3))(again),
                            {"run/running_0/total", "run@1/running_0/total"}),
    "repeat": (dp.repeat(3, running()), {"total"}),
    "heads": (dp.heads(2, running()), {"total"}),
    "remat": (dp.remat(running()), {"total"}),
    "repeat of a program": (dp.repeat(2, dp.program(run=running(), lin=dp.linear(3))(again)),
                            {"run/total", "run@1/total"}),
    "with running statistics": (dp.serial(dp.batch_norm(), dp.repeat(2, dp.serial(
        dp.batch_norm(), dp.residual(running())))),
        {"batch_norm_0/mean", "batch_norm_0/var", "repeat_0/batch_norm_0/mean",
         "repeat_0/batch_norm_0/var", "repeat_0/residual_0/body/total"}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_chunk_by_chunk_equals_all_at_once(name):
    net, kept = STREAMS[name]
    params, state = net.init(KEY, SERIES)
    apply = jax.jit(net.apply)
    whole, after = apply(params, state, SERIES)
    same(after, state)  # without start nothing is carried
    for sizes in ((1,) * 6, (3, 1, 2)):
        carried = net.start(params, state, SERIES[:, :1], length=6)
        assert set(dp.tree.paths(carried)) == kept
        chunks, at = [], 0
        for size in sizes:
            x = SERIES[:, at : at + size]
            y, new = apply(params, carried, x)
            assert jax.tree.structure(new) == jax.tree.structure(carried)
            assert not equal(new, carried)
            chunks.append(y)
            carried, at = new, at + size
        close(jnp.concatenate(chunks, 1), whole)


@pytest.mark.parametrize("net", [
    dp.repeat(3, running()), dp.heads(3, running()),
], ids=["repeat", "heads"])
def test_streaming_state_of_copies_is_stacked(net):
    params, state = net.init(KEY, SERIES)
    carried = net.start(params, state, SERIES, length=6)
    assert carried["total"].shape == (3, 2, 3)


def test_streaming_state_serves_an_equal_net():
    def build():
        return dp.serial(running(), dp.residual(dp.remat(running())), last=running())

    params, state = build().init(KEY, SERIES)
    carried = build().start(params, state, SERIES[:, :1], length=6)
    first, carried = build().apply(params, carried, SERIES[:, :4])
    last, _ = build().apply(params, carried, SERIES[:, 4:])
    close(jnp.concatenate([first, last], 1), build()(params, SERIES))


# What belongs to the layer, and what to the call.

NORMED = dp.serial(norm=dp.batch_norm(), run=running())
TWICE = dp.program(f=NORMED)(lambda layers, x: layers.f(2 + layers.f(x)))
SHARED = {
    "in a serial": (TWICE, "f/norm", "f/run/total", "f@1/run/total"),
    "in a wrapper": (dp.program(f=dp.remat(dp.mixed(NORMED, jnp.float32)))(
        lambda layers, x: layers.f(2 + layers.f(x))), "f/norm", "f/run/total", "f@1/run/total"),
    "in a program called once": (dp.serial(g=TWICE), "g/f/norm", "g/f/run/total",
                                 "g/f@1/run/total"),
    "in a program called twice": (
        dp.program(g=dp.serial(f=NORMED))(lambda layers, x: layers.g(2 + layers.g(x))),
        "g/f/norm", "g/f/run/total", "g@1/f/run/total"),
    "in a repeat": (dp.repeat(1, TWICE), "f/norm", "f/run/total", "f@1/run/total"),
    "in heads": (dp.heads(1, TWICE), "f/norm", "f/run/total", "f@1/run/total"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_statistics_of_a_child_called_twice_stay_one_in_a_stream(name):
    """They are the child's, whatever its calls carry: the first reference is by hand, chunkwise."""
    net, norm, *carries = SHARED[name]
    params, state = net.init(KEY, SERIES)
    assert {*dp.tree.paths(state)} == {f"{norm}/mean", f"{norm}/var"}
    run = jax.jit(net.apply, static_argnames="train")
    stream = net.start(params, state, SERIES[:, :1], length=6)
    assert {*dp.tree.paths(stream)} == {f"{norm}/mean", f"{norm}/var", *carries}
    scale = dp.tree.paths(params)[f"{norm}/scale"].reshape(-1)
    own = {"scale": scale, "bias": dp.tree.paths(params)[f"{norm}/bias"].reshape(-1)}
    rates = next(leaf for path, leaf in dp.tree.paths(params).items() if path.endswith("run/scale"))
    wanted = dp.batch_norm().init(KEY, SERIES)[1]
    totals = [0, 0]
    for at in (0, 2, 4):
        x = SERIES[:, at : at + 2]
        _, stream = run(params, stream, x, train=True)
        for call in range(2):
            y, wanted = dp.batch_norm().apply(own, wanted, x, train=True)
            y = jnp.cumsum(y, 1) + totals[call]
            totals[call] = y[:, -1:]
            x = 2 + rates.reshape(-1) * y
        found = dp.tree.paths(stream)
        close({name: found[f"{norm}/{name}"].reshape(-1) for name in wanted}, wanted)
        for total, path in zip(totals, carries, strict=True):
            close(found[path].reshape(2, 3), total[:, 0])


def test_computed_parameters_of_a_child_called_twice_stay_one_in_a_stream():
    f = dp.ema(running(), decay=0.5)
    net = dp.program(f=f)(lambda layers, x: layers.f(layers.f(x)))
    params, state = net.init(KEY, SERIES)
    carried = net.start(params, state, SERIES[:, :1], length=6)
    assert {*dp.tree.paths(carried)} == {*dp.tree.paths(state), "f/total", "f@1/total"}
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    _, after = net.apply(moved, carried, SERIES, train=True)
    _, wanted = net.apply(moved, state, SERIES, train=True)
    (count,) = [leaf for path, leaf in dp.tree.paths(wanted).items() if path.endswith("count")]
    assert count == 2
    same({path: dp.tree.paths(after)[path] for path in dp.tree.paths(wanted)},
         dp.tree.paths(wanted))


STREAMED = [case for case in CASES if not case.slow and (case.options or {}).get("causal")
            and case.layer.start and "source" not in case.side]


@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case.name)
def test_the_arrays_of_a_stream_are_new_and_distinct(case):
    """So it can be donated; arrays that are the same are one variable of the traced program."""
    net, steps = case.layer, case.x.shape[1]
    plan = net.plan(case.x, **case.side)
    given = (plan.params, plan.state, case.x, case.side)
    traced = jax.make_jaxpr(lambda params, state, x, side: net.start(
        params, state, x, length=steps, **side))(*given).jaxpr
    variables = [*traced.invars, *traced.constvars, *traced.outvars]
    assert len(set(map(id, variables))) == len(variables)


def test_donating_a_stream_keeps_the_arrays_it_was_started_from():
    net = dp.serial(dp.batch_norm(), dp.residual(dp.cross_attention(1)), running())
    x, memory, real = SERIES, jnp.ones((2, 5, 3)), jnp.ones((2, 5), bool)
    params, state = net.init(KEY, x, memory=memory, memory_mask=real)
    stream = net.start(params, state, x, length=6, memory=memory, memory_mask=real)
    spend = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), donate_argnums=0)
    spend(stream)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stream))
    given = (params, state, x, memory, real)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_streaming_in_a_scan():
    net = dp.program(run=running(), lin=dp.linear(3))(again)
    params, state = net.init(KEY, SERIES)
    carried = net.start(params, state, SERIES[:, :1], length=6)

    def step(carried, x):
        y, carried = net.apply(params, carried, x[:, None])
        return carried, y[:, 0]

    _, y = jax.lax.scan(step, carried, SERIES.swapaxes(0, 1))
    close(y.swapaxes(0, 1), net(params, SERIES))


@pytest.mark.parametrize("net", [
    dp.linear(3), dp.serial(dp.linear(3), abs), dp.repeat(2, dp.linear(3)),
    dp.heads(2, dp.residual(dp.layer_norm())), dp.remat(abs), dp.batch_norm(),
], ids=repr)
def test_layers_that_do_not_mix_time_have_no_start(net):
    assert net.start is None


@pytest.mark.parametrize(("layer", "path"), [
    (dp.conv(3, 3, dims=1), "a/b"), (dp.flatten(keep=1), "a/b"), (dp.max_pool(1, dims=1), "a/b"),
    (dp.global_avg_pool(dims=1), "a/b"), (dp.residual(dp.conv(3, 3, dims=1)), "a/b/body"),
    (dp.repeat(2, dp.serial(c=dp.conv(3, 3, dims=1))), "a/b/c"),
    (dp.heads(2, dp.serial(c=dp.conv(3, 3, dims=1))), "a/b/c"),
    (dp.remat(dp.serial(c=dp.conv(3, 3, dims=1))), "a/b/c"),
], ids=repr)
def test_start_raises_for_layers_that_cannot_stream(layer, path):
    net = dp.serial(a=dp.serial(running(), b=layer))
    params, state = net.init(KEY, SERIES)
    with pytest.raises(dp.LayerError, match="wants the whole input at once, got a streaming call"
                       ) as caught:
        net.start(params, state, SERIES[:, :1], length=6)
    assert caught.value.path == path


@pytest.mark.parametrize("name", ["alone", "serial", "program", "repeat", "heads"])
def test_start_resets_a_used_stream(name):
    net, _ = STREAMS[name]
    params, state = net.init(KEY, SERIES)
    fresh = net.start(params, state, SERIES[:, :1], length=6)
    _, used = net.apply(params, fresh, SERIES)
    same(net.start(params, used, SERIES[:, :1], length=6), fresh)


@pytest.mark.parametrize("length", [0, 2.5, True])
def test_start_requires_a_positive_length(length):
    net = dp.serial(a=running())
    params, state = net.init(KEY, SERIES)
    with pytest.raises(dp.LayerError, match="length as an int of at least 1"):
        net.start(params, state, SERIES, length=length)


def test_start_requires_the_parameters_of_its_children():
    net = dp.serial(a=running())
    with pytest.raises(dp.LayerError, match="params of its children"):
        net.start({"b": {}}, {}, SERIES, length=6)


@pytest.mark.parametrize(("started", "called"), [(2, 1), (3, 2), (1, 2), (2, 3)])
def test_a_streaming_call_makes_the_calls_that_start_made(started, called):
    @dp.program(run=running())
    def as_often_as_long(layers, x):
        for _ in range(x.shape[1]):
            x = layers.run(x)
        return x

    params, state = as_often_as_long.init(KEY, SERIES)
    carried = as_often_as_long.start(params, state, SERIES[:, :started], length=6)
    as_often_as_long.apply(params, carried, SERIES[:, :started])
    with pytest.raises(dp.LayerError, match="as many calls of run as start made"):
        as_often_as_long.apply(params, carried, SERIES[:, :called])


def test_a_streaming_call_may_not_leave_out_a_child():
    @dp.program(run=running())
    def unless_masked(layers, x, *, mask=None):
        return layers.run(x) if mask is None else x

    params, state = unless_masked.init(KEY, SERIES)
    carried = unless_masked.start(params, state, SERIES, length=6)
    with pytest.raises(dp.LayerError, match="as many calls of run as start made"):
        unless_masked.apply(params, carried, SERIES, mask=jnp.ones(2, bool))
