"""An eager call compiles what it needs at the first time, and nothing at the next four."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import diffprog as dp
from diffprog.core.layer import as_layer

KEY = jax.random.key(0)
LOOPS = (" scan[", " while[", " cond[", " remat", " checkpoint", "custom_root")
FAST = {"recurrent backwards", "repeat with state"}


def loops(case):
    """Is there a loop, a branch or a checkpoint in the program of the layer?"""
    layer = as_layer(case.layer)
    plan = layer.plan(case.x, **case.side)
    run = lambda *given: layer.apply(*given[:3], **given[3])  # noqa: E731
    traced = str(jax.make_jaxpr(run)(plan.params, plan.state, case.x, case.side))
    return any(name in traced for name in LOOPS)


def drawn(tree):
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(draw.normal(size=a.shape), a.dtype) if isinstance(
        a, jax.ShapeDtypeStruct) else a, tree)


def calls_of(layer, x, side, *, streams):
    """The eager calls of a layer, by what they do."""
    params, state = layer.init(KEY, x, **side)

    def total(params):
        y, _ = layer.apply(params, state, x, key=KEY, train=True, **side)
        return sum(jnp.sum(jnp.cos(a)) for a in jax.tree.leaves(y))

    def stream():
        carried = layer.start(params, state, x, length=x.shape[1], **side)
        _, carried = layer.apply(params, carried, x[:, :1], **{
            name: value[:, :1] for name, value in side.items()})

    calls = {
        "init": lambda: layer.init(KEY, x, **side),
        "rest": lambda: layer.apply(params, state, x, **side),
        "training": lambda: layer.apply(params, state, x, key=KEY, train=True, **side),
        "gradient": lambda: jax.grad(total)(params),
    }
    return calls | {"stream": stream} if streams else calls


def compiled(caplog, call):
    """What is compiled in calls 2 to 5."""
    call()
    caplog.clear()
    with jax.log_compiles():
        for _ in range(4):
            call()
    return [record.getMessage() for record in caplog.records
            if record.getMessage().startswith("Compiling")]


def check(caplog, calls):
    assert {name: found for name, call in calls.items() if (found := compiled(caplog, call))} == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow)
    for case in CASES])
def test_only_the_first_eager_call_of_a_loop_compiles(case, caplog):
    if case.name in FAST or loops(case):
        # Of side inputs the streams that are tried have those that are cut like x.
        streams = (case.options or {}).get("causal", False) and case.side.keys() <= {
            "mask", "segments", "positions"}
        check(caplog, calls_of(as_layer(case.layer), drawn(case.x), case.side, streams=streams))


@pytest.mark.slow
def test_only_the_first_eager_stream_compiles(caplog):
    x = jnp.cos(jnp.arange(12.0)).reshape(2, 3, 2)
    cell = dp.simple_rnn(2)
    for net in (dp.recurrent(dp.repeat(2, cell)), dp.repeat(2, dp.recurrent(cell))):
        calls = calls_of(net, x, {}, streams=True)
        check(caplog, {"stream": calls["stream"]})


@pytest.mark.slow
def test_only_the_first_eager_solution_compiles(caplog):
    f = dp.parallel(dp.linear(2, kernel_init=jax.nn.initializers.normal(0.1)), jnp.sin) >> dp.add
    calls = calls_of(dp.fixed_point(f, tolerance=1e-3), jnp.ones((2, 2)), {}, streams=False)
    check(caplog, {"gradient": calls["gradient"]})


def test_only_the_first_power_iteration_compiles(caplog):
    net = dp.spectral_norm(dp.linear(2, bias=False))
    check(caplog, {"init": calls_of(net, jnp.ones((1, 2)), {}, streams=False)["init"]})


def test_compilations_are_seen(caplog):
    assert len(compiled(caplog, lambda: jax.jit(lambda x: x + 1)(1.0))) == 4
