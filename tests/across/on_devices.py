"""Every Case on two devices, by values: run by `test_meshes.py` in a process of its own.

It makes two devices of one CPU, which must be asked for before JAX is imported. It prints the
names of the cases that were compared, and raises at the first that is another one there.
"""

import functools
import os
import pathlib
import sys

if __name__ == "__main__":  # not where pytest looks for examples in docstrings
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from cases import CASES, NET, floats
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.comparing import close

import diffprog as dp
from diffprog.core.dtypes import is_float
from diffprog.core.layer import as_layer

jax.config.update("jax_disable_most_optimizations", True)

# What no device can compute from its own examples, or from a key that all share:
LEFT_OUT = {
    "training": "batch norm and noise depend on all examples: it is traced in test_meshes",
    "batched=False": "it has no axis of examples",
    "through": "what wrappers hand on is tried in the cases of the wrappers",
}
MESH = functools.partial(jax.make_mesh, (2,), ("data",), devices=jax.devices())
ROWS = P("data")


def tried(case):
    return (case.options or {}).get("batched", True) and " through " not in case.name


def twice(count, tree):
    """The examples and then, in reverse, the examples: as many on either device."""
    return jax.tree.map(lambda a: jnp.concatenate([a, a[::-1]]) if a.shape[:1] == (
        count,) else jnp.asarray(a), tree)


def drawn(tree):
    """Values for shapes; what has values keeps them."""
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype) if isinstance(
        a, jax.ShapeDtypeStruct) else jnp.asarray(a), tree)


def moved(tree):
    """Away from what init gives, where averages equal what they average."""
    keys = iter(jax.random.split(jax.random.key(2), 999))
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape, a.dtype)
                        if is_float(a) else a, tree)


def compare(case):
    """Outputs of inference and of a stream, and gradients of both, are those of one device."""
    net = as_layer(case.layer)
    x, side = drawn(case.x), drawn(case.side)
    count = jax.tree.leaves(x)[0].shape[0]
    x, side = twice(count, (x, side))
    params, state = net.init(jax.random.key(0), x, **side)
    params = moved(params)
    streams = net.start and "causal" in (case.options or {}) and (
        "streaming equals all at once" not in case.reasons)

    def run(params, state, x, side):
        y = net.apply(params, state, x, **side)[0]
        if not streams:
            return y
        begun = net.start(params, state, x, length=5, **side)
        return y, net.apply(params, begun, x, **side)[0]

    of_rows = jax.tree.map(lambda a: ROWS if a.shape[:1] == (2 * count,) else P(), (x, side))
    sharded = jax.shard_map(run, mesh=MESH(axis_types=(AxisType.Auto,)),
                            in_specs=(P(), P(), *of_rows), out_specs=ROWS)
    close(*(jax.jit(functools.partial(value_and_gradients, f))(params, state, x, side)
            for f in (sharded, run)))


def value_and_gradients(f, params, state, x, side):
    """The output, and the gradients of a sum in which no two entries weigh the same."""
    def loss(params, x):
        y = f(params, state, x, side)
        leaves = [leaf for leaf in jax.tree.leaves(y) if is_float(leaf)]
        weighed = [jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(
            leaf.shape)) for leaf in leaves]
        return sum(weighed, jnp.zeros(())), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(params, x)
    floats = [leaf for leaf in jax.tree.leaves(gradients) if is_float(leaf)]
    return jax.tree.leaves(y), floats


SERIES = floats(4, 5, 8)
# Layers that JAX alone cannot place on an explicit mesh; all draw from one key.
EXPLICIT = {
    "dropout": (dp.dropout(0.5), SERIES),
    "embedding": (dp.embedding(11, 4), jnp.arange(20).reshape(4, 5) % 11),
    "lstm": (dp.recurrent(dp.lstm(4)), SERIES),
    "kv_heads": (dp.self_attention(4, kv_heads=2, causal=True, dropout=0.5), SERIES),
    "conv": (dp.conv(3, 3) >> dp.conv(2, 1), floats(4, 4, 6, 2)),
    "patches": (dp.patches(2) >> dp.linear(3), floats(4, 4, 6, 2)),
    "tap": (dp.tap(dp.repeat(2, dp.linear(8) >> jnp.tanh), "linear_0"), SERIES),
    "fixed_point": (next(case.layer for case in CASES if case.name == "fixed_point"), floats(4, 4)),
    "llama": (dp.models.llama(11, kv_heads=1, **NET), jnp.arange(20).reshape(4, 5) % 11),
}


def compare_explicit(net, x):
    """Training on an explicit mesh gives what it gives on one device."""
    x, key = drawn(x), jax.random.key(3)
    params, state = net.init(jax.random.key(0), x)

    def run(params, state, x, side):
        return net.apply(params, state, x, key=key, train=True)[0]

    step = jax.jit(functools.partial(value_and_gradients, run))
    wanted = step(params, state, x, {})
    mesh = MESH(axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        got = step(params, state, jax.device_put(x, NamedSharding(mesh, ROWS)), {})
    close(got, wanted)


if __name__ == "__main__":
    for name, (net, x) in EXPLICIT.items():
        compare_explicit(net, x)
        print(name, "explicit", flush=True)
    for case in filter(tried, CASES):
        compare(case)
        print(case.name, flush=True)
