"""Every Case is traced under each transformation and setting of JAX; nothing is compiled.

A new Case inherits the table. What cannot go through a row says so in the Case, by `exempt`.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from cases import CASES

import diffprog as dp
from diffprog.dtypes import cast, is_float
from diffprog.layer import as_layer

TIMED = ("mask", "positions", "segments", "token_types")  # side inputs that are cut with x


def total(y):
    """The sum of the floats of an output, of any dtype."""
    floats = [leaf.sum(dtype=jnp.float32) for leaf in jax.tree.leaves(y) if is_float(leaf)]
    return sum(floats, jnp.zeros(()))


def calls(layer, x, side):
    """Trace all that a layer can do: init, inference, training with gradients, a stream."""
    layer, key = as_layer(layer), jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(layer.init, key, x, **side)

    def loss(params, x, state, key, side):
        y, state = layer.apply(params, state, x, key=key, train=True, **side)
        return total(y), state

    jax.eval_shape(layer.apply, params, state, x, **side)
    gradient = jax.grad(loss, (0, 1), allow_int=True, has_aux=True)
    jax.eval_shape(gradient, params, x, state, key, side)
    return layer, params, state


def streamed(layer, params, state, x, side):
    """Trace the start of a stream, a chunk of one step of it and one of all steps."""
    steps = jax.tree.leaves(x)[0].shape[1]
    for length in (1, steps):
        cut = functools.partial(jax.tree.map, lambda a, n=length: jax.eval_shape(
            lambda a: a[:, :n], a))
        first = {name: cut(value) if name in TIMED else value for name, value in side.items()}
        carried = jax.eval_shape(functools.partial(layer.start, length=steps),
                                 params, state, cut(x), **first)
        given = {name: value for name, value in first.items() if name not in layer.kept}
        jax.eval_shape(layer.apply, params, carried, cut(x), **given)


def traced(case):
    """Trace a case in float32, in bfloat16 and under `mixed`."""
    net, streams = as_layer(case.layer), "streaming equals all at once" not in case.reasons
    for layer, dtype in ((net, None), (net, jnp.bfloat16), (dp.mixed(net, jnp.bfloat16), None)):
        x, side = jax.eval_shape(lambda dtype=dtype: cast((jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), (case.x, case.side))), dtype))
        made = calls(layer, x, side)
        if streams and layer.start:
            streamed(*made, x, side)


def rank(case):
    """No operation widens an operand by axes that are not written down."""
    with jax.numpy_rank_promotion("raise"):
        traced(case)


def strict(case):
    """No operation casts an operand without a word."""
    with jax.numpy_dtype_promotion("strict"):
        traced(case)


def vmap(case):
    """Over parameters and over inputs, with gradients."""
    layer, key = as_layer(case.layer), jax.eval_shape(lambda: jax.random.key(0))
    plan = layer.plan(case.x, **case.side)

    def loss(params, x, state, key):
        y, state = layer.apply(params, state, x, key=key, train=True, **case.side)
        return total(y), state

    gradient = jax.grad(loss, (0, 1), allow_int=True, has_aux=True)
    given = (plan.params, case.x, plan.state, key)
    for over in (0, 1) if jax.tree.leaves(plan.params) else (1,):
        along = [0 if place == over else None for place in range(len(given))]
        stacked = [jax.tree.map(doubled, value) if place == over else value
                   for place, value in enumerate(given)]
        jax.eval_shape(jax.vmap(gradient, along), *stacked)


def doubled(leaf):
    """Two of the same shape, stacked."""
    return jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype)


ROWS = {"rank": rank, "strict": strict, "vmap": vmap}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_goes_through_every_row(case, row):
    if row in case.exempt:
        with pytest.raises(dp.LayerError):
            ROWS[row](case)
    else:
        ROWS[row](case)


def test_few_cases_are_exempt():
    exempt = [(case.name, row) for case in CASES for row in case.exempt]
    assert len(exempt) <= 10
    assert all(row in ROWS and case.exempt[row] for case in CASES for row in case.exempt)
