"""Every Case on meshes of devices, and exported with sizes that are left open; nothing is compiled.

A new Case inherits the rows. Values are compared on two devices in a process of its own, where
devices can be made, by `on_devices.py`.
"""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import CASES, FIXED, floats
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparing import KEY, close
from support.refusing import refused

import diffprog as dp
from diffprog.core.layer import as_layer
from diffprog.core.meshes import unplaced, varying

TIMED = ("mask", "positions", "segments", "token_types")  # side inputs of each step
# Copies of convolutions: `jax.vmap` makes one in groups of them, by a reshape that does not say
# how its result is sharded.
CONVOLVED = {"heads, streaming", "ensemble, streaming", "hyper, streaming"}

each_case = pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow) for case in CASES])


def batched(case):
    return (case.options or {}).get("batched", True)


def sequential(case):
    """Is axis 1 of x time, of any length?"""
    timed = "causal" in (case.options or {}) or "mask" in case.side
    fixed = FIXED.items() <= case.reasons.items()
    return batched(case) and timed and not fixed and "attention_mask" not in case.side


def given(case, of_examples):
    """Shapes of all that a call is given; those of examples are made by ``of_examples(a, name)``.

    They are those whose first axis is as long as that of x.
    """
    net = as_layer(case.layer)
    count = jax.tree.leaves(case.x)[0].shape[0]

    def shaped(name, tree):
        return jax.tree.map(lambda a: of_examples(a, name) if batched(case) and a.shape[:1] == (
            count,) else jax.ShapeDtypeStruct(a.shape, a.dtype), tree)

    plan = net.plan(case.x, **case.side)
    return (plan.params, plan.state, shaped("x", case.x), jax.eval_shape(lambda: KEY),
            {name: shaped(name, value) for name, value in case.side.items()})


def uses(case):
    """Inference, the gradient of training, and the beginning of a stream."""
    net = as_layer(case.layer)

    def rest(params, state, x, key, side):
        return net.apply(params, state, x, **side)

    def loss(params, state, x, key, side):
        y, state = net.apply(params, state, x, key=key, train=True, **side)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(y)).astype(float), state

    def stream(params, state, x, key, side):
        state = net.start(params, state, x, length=5, **side)
        return net.apply(params, state, x, **side)

    yield rest
    yield jax.grad(loss, (0, 2), allow_int=True, has_aux=True)
    if net.start and "causal" in (case.options or {}) and (
            "streaming equals all at once" not in case.reasons):
        yield stream


def gathered(tree):
    """One number of all that a device has made, the same on all of them."""
    numbers = [leaf.sum().astype(jnp.float32) for leaf in jax.tree.leaves(tree)
               if leaf.dtype != jax.dtypes.float0 and not jnp.issubdtype(
                   leaf.dtype, jax.dtypes.prng_key)]
    total = sum(numbers, jnp.zeros(()))
    return jax.lax.psum(total, "data") if varying(jax.typeof(total)) else total


@each_case
def test_every_case_runs_under_shard_map(case):
    """With the check of what varies over the mesh, which is the default.

    JAX 0.12 raises of its own for erf, of which its exact gelu is made.
    """
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
    mark = functools.partial(given, case)
    specs = jax.tree.map(lambda a: P("data") if a is None else P(), mark(lambda a, name: None),
                         is_leaf=lambda a: a is None)
    for use in uses(case):
        f = jax.shard_map(lambda *given, use=use: gathered(use(*given)), mesh=mesh,
                          in_specs=specs, out_specs=P())
        try:
            jax.eval_shape(f, *mark(lambda a, name: jax.ShapeDtypeStruct(a.shape, a.dtype)))
        except ValueError as error:
            assert "Primitive polynomial requires" in str(error)
            with pytest.raises(ValueError, match="Primitive polynomial requires"):
                jax.eval_shape(jax.shard_map(
                    jax.grad(lambda x: jax.nn.gelu(x, approximate=False).sum()), mesh=mesh,
                    in_specs=P("data"), out_specs=P("data")), floats(2))


@each_case
def test_every_case_runs_on_an_explicit_mesh(case):
    """Or refuses it by name: copies of convolutions do."""
    count = jax.tree.leaves(case.x)[0].shape[0]
    mesh = AbstractMesh((count,), ("data",), axis_types=(AxisType.Explicit,))
    sharded = NamedSharding(mesh, P("data"))
    with jax.sharding.use_abstract_mesh(mesh):
        all_given = given(case, lambda a, name: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=sharded))
        refused = []
        for use in uses(case):
            try:
                jax.eval_shape(use, *all_given)
            except dp.LayerError as error:
                assert "axis_types=(jax.sharding.AxisType.Auto,)" in str(error)
                refused.append(use)
    assert bool(refused) == (case.name in CONVOLVED)


def of_any_batch(case):
    size, = export.symbolic_shape("b")
    return given(case, lambda a, name: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype))


def of_any_length(case):
    """The cache of a stream has room for five steps, so a chunk of it has no more."""
    size, time = export.symbolic_shape("b, t", constraints=["t <= 5"])
    return given(case, lambda a, name: jax.ShapeDtypeStruct(
        (size, time, *a.shape[2:]) if name in ("x", *TIMED) else (size, *a.shape[1:]), a.dtype))


@each_case
def test_every_case_is_traced_for_any_batch_and_length(case):
    if batched(case):
        of_any = (of_any_length if sequential(case) else of_any_batch)(case)
        rest, *others = uses(case)
        assert export.export(jax.jit(rest))(*of_any).in_avals
        for use in others:
            jax.jit(use).trace(*of_any)


@pytest.mark.slow
@pytest.mark.parametrize("of_any", [of_any_batch, of_any_length])
@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name) for case in CASES if batched(case)])
def test_every_case_is_exported_for_any_batch_and_length(case, of_any):
    """Gradients and streams too: what is traced may still not be lowered."""
    if of_any is of_any_batch or sequential(case):
        for use in uses(case):
            numbers = lambda *given, use=use: [  # noqa: E731
                leaf for leaf in jax.tree.leaves(use(*given)) if leaf.dtype != jax.dtypes.float0]
            assert export.export(jax.jit(numbers))(*of_any(case)).in_avals


STEPPED = {
    "classes": (dp.serial(dp.linear(4), dp.batch_norm(), dp.linear(3)), dp.classification(top_k=2),
                lambda b, t: (floats(b, 5), jax.ShapeDtypeStruct((b,), jnp.int32))),
    "text": (dp.embedding(11, 4) >> dp.recurrent(dp.gru(11)), dp.text.next_token(),
             lambda b, t: jax.ShapeDtypeStruct((b, t + 1), jnp.int32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPPED)
def test_a_step_is_traced_for_any_batch_and_length(name):
    net, objective, batch = STEPPED[name]
    step = dp.make_step(net, objective, optax.sgd(0.1))
    few = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), batch(2, 4))
    any_size = batch(*export.symbolic_shape("b, t"))
    state = jax.eval_shape(step.init, KEY, step.inputs(few)[0])
    for f in (step.apply, step.evaluate):
        found = jax.eval_shape(f, state, any_size)
        assert jax.tree.structure(found) == jax.tree.structure(jax.eval_shape(f, state, few))


TOLD = dp.Layer(
    lambda key, x, **_: ({"scale": jnp.ones(())}, {}),
    lambda params, state, x, *, time, condition, **_: (
        params["scale"] * x * (time + condition).astype(x.dtype)[:, None], state),
    side=frozenset({"time", "condition"}))
ON_MESH = {
    "weights": (dp.linear(3), dp.classification(class_weights=jnp.ones(3)), {
        "x": floats(2, 5), "y": jax.ShapeDtypeStruct((2,), jnp.int32)}),
    "text by chunks": (dp.serial(trunk=dp.embedding(11, 4), head=dp.linear(11)),
                       dp.text.chunked_next_token("trunk", "head/kernel", chunk=4),
                       {"x": jax.ShapeDtypeStruct((2, 5), jnp.int32)}),
    "vae": (dp.models.vae(dp.branch(dp.linear(2), dp.linear(2)), dp.linear(5)), dp.training.elbo(),
        {
        "x": floats(2, 5), "y": floats(2, 5)}),
    "diffusion": (TOLD, dp.diffusion.denoising(dp.diffusion.linear_noise(4), null_class=3), {
        "x": floats(2, 4), "condition": jax.ShapeDtypeStruct((2,), jnp.int32)}),
}


@pytest.mark.parametrize("name", ON_MESH)
def test_a_step_runs_on_an_explicit_mesh(name):
    net, objective, batch = ON_MESH[name]
    step = dp.make_step(net, objective, optax.sgd(0.1))
    x, side = step.inputs(jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), batch))
    state = jax.eval_shape(step.init, KEY, x, **side)
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, P("data"))), batch)
        jax.eval_shape(step.apply, state, given)
        if name != "diffusion":  # which is measured example by example, each with a row of a table
            jax.eval_shape(step.evaluate, state, given)
        else:
            jax.eval_shape(lambda x, classes: dp.diffusion.ddpm(
                net, {"scale": jnp.ones(())}, x, dp.diffusion.linear_noise(4), key=KEY, steps=2,
                guidance_scale=2.0, null_class=3, condition=classes), given["x"],
                    given["condition"])


def test_losses_and_metrics_are_traced_for_any_size():
    b, t = export.symbolic_shape("b, t")
    logits, ids = floats(b, t, 7), jax.ShapeDtypeStruct((b, t), jnp.int32)
    few = jax.ShapeDtypeStruct((b, 2), jnp.int32)
    found = jax.eval_shape(lambda logits, ids, few: (
        dp.losses.cross_entropy(logits, ids), dp.metrics.accuracy(logits, ids),
        dp.losses.squared_error(logits, logits),
        dp.losses.ctc(logits, few),
        *dp.losses.linear_cross_entropy(logits, jnp.ones((7, 8)), ids, chunk=3)),
        logits, ids, few)
    assert [a.shape for a in found] == [()] * 5 + [(b, t)]


def test_a_missing_constraint_on_a_symbolic_size_is_named():
    b, t = export.symbolic_shape("b, t")
    ids, net = jax.ShapeDtypeStruct((b, t), jnp.int32), dp.embedding(11, 4) >> dp.self_attention(
        2, causal=True) >> dp.linear(11)
    plan = net.plan(jnp.ones((1, 5), jnp.int32))
    params, state = plan.params, plan.state

    def stream(params, x):
        return net.apply(params, net.start(params, state, x, length=9), x)

    remedy = refused(jax.eval_shape, stream, params, ids).remedy
    assert 'constraints=["t <= 9"]' in remedy
    size, time = export.symbolic_shape("b, t", constraints=["t <= 9"])
    jax.eval_shape(stream, params, jax.ShapeDtypeStruct((size, time), jnp.int32))
    objective = dp.text.next_token()
    asked = lambda x: objective(net, params, {}, x, key=None, train=True)[0]  # noqa: E731
    assert '"b, t + 1"' in refused(jax.eval_shape, asked, ids).remedy
    assert "net.start" in refused(jax.eval_shape, lambda x: dp.text.generate(
        net, params, x, 3).tokens, ids).remedy


def test_many_cases_are_tried_in_every_row():
    assert sum(map(batched, CASES)) > 150 and sum(map(sequential, CASES)) > 60
    assert {case.name for case in CASES} >= CONVOLVED


# Values.

NET = {"width": 8, "depth": 2, "heads": 2, "hidden": 12}
REAL = jnp.array([[True, True, False, True], [False, True, True, False], [True] * 4])


@pytest.mark.slow
def test_every_case_has_the_same_values_on_two_devices():
    """Outputs, streams and gradients; on an explicit mesh those of what needs help there."""
    script = pathlib.Path(__file__).with_name("on_devices.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-400:] + done.stderr[-4000:]
    assert len(done.stdout.splitlines()) > 140


@pytest.mark.slow
@pytest.mark.parametrize(("net", "x", "side"), [
    (dp.models.llama(11, kv_heads=1, **NET), jnp.arange(12).reshape(3, 4) % 11, {"mask": REAL}),
    (dp.models.gpt(11, length=8, **NET), jnp.arange(12).reshape(3, 4) % 11, {"segments": REAL + 0}),
    (dp.recurrent(dp.lstm(3), unroll=2), floats(3, 4, 5), {"mask": REAL}),
    (dp.recurrent(dp.gru(3), bidirectional=True), floats(3, 4, 5), {}),
    (dp.conv(3, 3, dims=1, stride=2), floats(3, 4, 5), {}),
    (dp.learned_positions(6), floats(3, 4, 5), {}),
    (dp.batch_norm(), floats(3, 4, 5), {"mask": REAL}),
    (dp.hyper(dp.conv(2, 3, dims=1), dp.linear(3)), floats(3, 4, 5),
     {"condition": jnp.cos(jnp.arange(12.0)).reshape(3, 4)}),
], ids=lambda value: repr(value) if isinstance(value, dp.Layer) else "")
def test_exports_have_the_same_values_at_every_size(net, x, side):
    """Output and gradients of training, at two sizes of batch and of length."""
    x = jax.random.normal(KEY, x.shape) if isinstance(x, jax.ShapeDtypeStruct) else x
    params, state = net.init(KEY, x, **side)

    def loss(params, x, side):
        y = net.apply(params, state, x, train=True, **side)[0]
        return jnp.sum(jnp.sin(y)), y

    step = jax.jit(jax.grad(loss, has_aux=True))
    size, time = export.symbolic_shape("b, t")
    of_any = {name: jax.ShapeDtypeStruct(
        (size, time) if name in TIMED else (size, *a.shape[1:]), a.dtype)
        for name, a in side.items()}
    like = jax.ShapeDtypeStruct((size, time, *x.shape[2:]), x.dtype)
    exported = export.export(step)(jax.eval_shape(lambda: params), like, of_any)
    for rows, steps in ((3, 4), (2, 3)):
        cut = {name: a[:rows, :steps] if name in TIMED else a[:rows] for name, a in side.items()}
        here = (params, x[:rows, :steps], cut)
        close(exported.call(*here), step(*here))


# What could go wrong otherwise.

def test_a_loop_keeps_a_carry_where_it_is():
    """No part of a carry comes to vary without need: at rest the state of batch norm does not."""
    net = dp.repeat(2, dp.batch_norm() >> jnp.tanh)
    plan = net.plan(floats(4, 3))
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def run(train, params, state, x):
        y, state = net.apply(params, state, x, train=train)
        assert varying(jax.typeof(y)) == {"data"}
        assert {varying(jax.typeof(leaf)) for leaf in jax.tree.leaves(state)} == {
            frozenset({"data"} if train else ())}
        return y

    for train in (False, True):
        jax.eval_shape(jax.shard_map(functools.partial(run, train), mesh=mesh, in_specs=(
            P(), P(), P("data")), out_specs=P("data")), plan.params, plan.state, floats(4, 3))


@pytest.mark.parametrize(("net", "x"), [
    (dp.recurrent(dp.lstm(2)), floats(2, 3, 2)), (dp.dropout(0.5), floats(2, 3)),
    (dp.repeat(2, dp.batch_norm()), floats(4, 3)),
], ids=repr)
def test_without_a_mesh_nothing_is_added(net, x):
    """The programs of all who have one device are what they were."""
    plan = net.plan(x)
    program = str(jax.make_jaxpr(lambda *given: net.apply(
        *given, key=KEY, train=True))(plan.params, plan.state, x))
    assert "pcast" not in program and "reshard" not in program and "pvary" not in program


@pytest.mark.parametrize(("error", "refused"), [
    (TypeError("the carry has type float32[2@data,2]"), True),
    (ValueError("should be sharded the same"), True),
    (TypeError("unsupported operand"), False),
], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_only_what_is_of_an_explicit_mesh_is_refused_for_it(error, refused, kind):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    x = jax.device_put(jnp.ones((2, 2)), NamedSharding(mesh, P("data")))
    found = unplaced(error, {"x": x})
    assert bool(found) == (refused and kind == AxisType.Explicit)


def test_two_exports_of_one_net_do_not_disturb_each_other():
    """A plan that is remembered is of one symbolic size, and not of another one of its name."""
    net = dp.recurrent(dp.lstm(2)) >> dp.linear(3)
    plan = net.plan(floats(2, 3, 2))
    for _ in range(2):
        size, time = export.symbolic_shape("b, t")
        x = jax.ShapeDtypeStruct((size, time, 2), jnp.float32)
        y = export.export(jax.jit(net))(plan.params, x).out_avals[0]
        assert y.shape == (size, time, 3)
