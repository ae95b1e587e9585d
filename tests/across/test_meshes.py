"""Every Case on meshes of devices, and exported with sizes that are left open; nothing is compiled.

A new Case inherits the rows. Values are compared on two devices in a process of its own, where
devices can be made, by `on_devices.py`.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, FIXED
from comparing import KEY
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import diffprog as dp
from diffprog.layer import as_layer
from diffprog.meshes import varying

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
    """With the check of what varies over the mesh, which is the default."""
    mesh = AbstractMesh((1,), ("data",))
    mark = functools.partial(given, case)
    specs = jax.tree.map(lambda a: P("data") if a is None else P(), mark(lambda a, name: None),
                         is_leaf=lambda a: a is None)
    for use in uses(case):
        f = jax.shard_map(lambda *given, use=use: gathered(use(*given)), mesh=mesh,
                          in_specs=specs, out_specs=P())
        jax.eval_shape(f, *mark(lambda a, name: jax.ShapeDtypeStruct(a.shape, a.dtype)))


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


def test_many_cases_are_tried_in_every_row():
    assert sum(map(batched, CASES)) > 150 and sum(map(sequential, CASES)) > 60
    assert {case.name for case in CASES} >= CONVOLVED
