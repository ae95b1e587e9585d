"""A small net, its data and its step, for the tests of training."""

import functools

import jax
import numpy as np
import optax

import diffprog as dp

KEY = jax.random.key(0)
NET = dp.linear(3)
NOISY = dp.serial(dp.batch_norm(), dp.dropout(0.3), NET)  # with state, and with a use for keys


def examples(count=12, width=4, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, width)).astype(np.float32)
    return x, (x @ draw.normal(size=(width, 3))).argmax(-1).astype(np.int32)


@functools.cache  # tests share the compiled programs of a step
def sgd(net=NET, rate=0.1, **options):
    return dp.make_step(net, dp.classification(), optax.sgd(rate), **options)


@functools.cache
def noisy():
    return dp.make_step(NOISY, dp.classification(), optax.adam(0.05))


def train(step, data, steps, **options):
    """A fit without a bar; options of `Validation` may stand beside its data."""
    begin = {} if "state" in options else {"key": KEY}
    judged = {name: options.pop(name) for name in ("metric", "highest", "patience")
              if name in options}
    if judged:
        options["validation"] = dp.training.Validation(options.get("validation"), **judged)
    return dp.fit(step, data, steps=steps, **begin | {"progress": False} | options)


def numbers(state):
    """The leaves of a train state by path, with key data."""
    return {path: np.asarray(leaf) for path, leaf in dp.tree.paths(
        state._replace(key=jax.random.key_data(state.key))).items()}


def assert_same(one, other, **tolerance):
    one, other = numbers(one), numbers(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_allclose(one[path], other[path], err_msg=path, **tolerance)


def taken(step, batches):
    """The state after a step on each batch, and the metrics of each."""
    state, metrics = step.init(KEY, examples()[0]), []
    for batch in batches:
        state, read = step.apply(state, batch)
        metrics.append(read)
    return state, metrics
