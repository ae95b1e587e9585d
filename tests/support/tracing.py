"""Tracing all that a layer does, in shapes alone: nothing is computed and nothing compiled."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import diffprog as dp
from diffprog.core.dtypes import is_float
from diffprog.core.layer import as_layer

KEY = jax.eval_shape(lambda: jax.random.key(0))
TIMED = ("mask", "positions", "segments", "token_types")  # side inputs that are cut with x
PRECISIONS = ("float32", "bfloat16", "all in bfloat16", "mixed")


class Given(NamedTuple):
    """A layer and shapes of what it is called on; `streams` if it promises to."""

    layer: Any
    params: Any
    state: Any
    x: Any
    side: dict[str, Any]
    streams: bool


def given(case, precision="float32"):
    """A case in one of the `PRECISIONS`: parameters are float32 in all but the third."""
    net, dtype = as_layer(case.layer), jnp.bfloat16 if "bfloat16" in precision else None
    layer = dp.mixed(net, jnp.bfloat16) if precision == "mixed" else net
    x, side = shapes((case.x, case.side), dtype)
    plan = layer.plan(x, **side)
    params, state = shapes((plan.params, plan.state), dtype if "all" in precision else None)
    return Given(layer, params, state, x, side, layer.start is not None
                 and "streaming equals all at once" not in case.reasons)


def shapes(tree, dtype=None, more=()):
    """The shapes of a tree, its floats in a dtype, with more axes in front."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(
        (*more, *a.shape), dtype if dtype and is_float(a) else a.dtype), tree)


def total(y):
    """The sum of the floats of an output, of any dtypes."""
    floats = [leaf.sum(dtype=jnp.float32) for leaf in jax.tree.leaves(y) if is_float(leaf)]
    return sum(floats, jnp.zeros((), jnp.float32))


def training(layer):
    """The loss of a call in training, and the new state."""

    def loss(params, x, state, key, side):
        y, state = layer.apply(params, state, x, key=key, train=True, **side)
        return total(y), state

    return loss


def gradient(layer):
    """That of `training`, by parameters and x."""
    return jax.grad(training(layer), (0, 1), allow_int=True, has_aux=True)


def trace(of):
    """Trace init, a call at rest, the gradient of training, and a stream."""
    layer, params, state, x, side, _ = of
    jax.eval_shape(layer.init, KEY, x, **side)
    jax.eval_shape(layer.apply, params, state, x, **side)
    jax.eval_shape(gradient(layer), params, x, state, KEY, side)
    if of.streams:
        trace_stream(of)


def trace_stream(of):
    """Trace the start of a stream, and chunks of one step and of all steps."""
    layer, params, state, x, side, _ = of
    steps = jax.tree.leaves(x)[0].shape[1]
    for length in (1, steps):
        cut = functools.partial(jax.tree.map, lambda a, n=length: jax.ShapeDtypeStruct(
            (a.shape[0], n, *a.shape[2:]), a.dtype))
        first = {name: cut(value) if name in TIMED else value for name, value in side.items()}
        chunk = {name: value for name, value in first.items() if name not in layer.kept}
        carried = jax.eval_shape(functools.partial(layer.start, length=steps),
                                 params, state, cut(x), **first)
        jax.eval_shape(layer.apply, params, carried, cut(x), **chunk)


def trace_forward(of):
    """Trace a call in training."""
    jax.eval_shape(training(of.layer), of.params, of.x, of.state, KEY, of.side)
