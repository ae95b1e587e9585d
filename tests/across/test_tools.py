"""Laws of tools on every case: `summary` counts operations, `predict` may split the batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, floats
from jax.interpreters.partial_eval import dce_jaxpr
from support.comparing import KEY, close

import diffprog as dp
from diffprog.core.layer import as_layer
from diffprog.inspection.costs import flops
from diffprog.inspection.summaries import summary
from diffprog.training.evaluation import predict

_COUNTED = 0.05  # relative difference allowed between two counts of operations


def products(jaxpr):
    """The operations of all matrix products; None if the program has a loop or a branch."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("while", "cond"):
            return None
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        for part in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(part, "jaxpr", part)
            if not hasattr(inner, "eqns"):
                continue
            found = products(inner)
            if found is None:
                return None
            total += found * eqn.params.get("length", 1)
    return total


def counts(layer, x, side):
    """Assert that `summary` counts no less than the matrix products, and no more than XLA.

    Returns the reason why this cannot be tested, or None.
    """
    if not (layer.children or layer.computed):
        return "it is one layer, which XLA counts itself"
    plan = layer.plan(x, **side)
    given = plan.params, plan.state, x, side
    run = lambda params, state, x, side: layer.apply(params, state, x, **side)  # noqa: E731
    traced = jax.make_jaxpr(run)(*given).jaxpr
    least = products(traced)
    if least is None:
        return "the number of iterations is unknown"
    live = products(dce_jaxpr(traced, [True] * len(traced.outvars))[0])
    most, got = flops(run, *given), summary(layer, x, **side).flops
    # XLA drops dead code, such as the variance of a sample in inference; `summary` does not.
    dead_code, least = live != least, min(least, most)
    if not least:
        return "it has no matrix product"
    # XLA may count other operations once for all copies, or once for each.
    limit = (1 + _COUNTED) * most if least > most / 2 and not dead_code else math.inf
    assert (1 - _COUNTED) * least <= got <= limit + most - least
    return None


def values(leaf):
    """Random numbers in place of shapes; arrays stay."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype)
    return leaf


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


LEAF = "it is one layer, which XLA counts itself"
UNMULTIPLIED = "it has no matrix product"
ENDLESS = "the number of iterations is unknown"
UNCOUNTED = {
    **dict.fromkeys([
        "residual", "repeat with state", "heads, streaming", "ensemble, averaged",
        "ensemble, streaming", "mixed in repeat", "pin to training, of statistics", "replace",
        "weight_norm"], UNMULTIPLIED),
    **dict.fromkeys([
        "repeat of convolutions", "repeat, streaming", "remat of repeat", "linearize in repeat",
        "mixed, streaming", "hyper, streaming", "fixed_point", "fixed_point, randomly",
        "fixed_point, streaming", "pin, streaming", "tap in remat of repeat", "ema, streaming"],
        ENDLESS),
}


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow) for case in CASES])
def test_summary_counts_the_operations(case):
    reason = counts(as_layer(case.layer), *shapes((case.x, case.side)))
    assert reason == UNCOUNTED.get(case.name) or reason == LEAF


def test_most_compositions_are_counted():
    made = [case for case in CASES if as_layer(case.layer).children]
    assert len(made) > 4 * len(UNCOUNTED) and UNCOUNTED.keys() <= {case.name for case in CASES}


CUT = [case for case in CASES if (case.options or {}).get("batched", True)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_predict_does_not_depend_on_the_batch_size(case):
    net, x = as_layer(case.layer), jax.tree.map(values, case.x)
    params, state = net.init(KEY, x, **case.side)
    count = len(jax.tree.leaves(x)[0])
    wanted = net.apply(params, state, x, **case.side)[0]
    assert count > 1
    got = predict(net, params, x, state=state, batch_size=count - 1, **case.side)
    close(got, wanted)


@pytest.mark.parametrize("wrap", [
    lambda f: f, lambda f: dp.repeat(2, f),
    lambda f: dp.program(inner=f)(lambda layers, x: layers.inner(x)),
], ids=["alone", "repeat", "program"])
def test_a_layer_with_hidden_operations_is_caught(wrap):
    inner = dp.serial(dp.linear(3))

    def apply(params, state, x, *, key=None, train=False):
        y, state = inner.apply(params, state, x)
        return y + x @ jnp.ones((3, 30), x.dtype) @ jnp.ones((30, 3), x.dtype), state

    hiding = dp.Layer(inner.init, apply, children=inner.children, rebuild=inner.rebuild)
    with pytest.raises(AssertionError):
        counts(wrap(hiding), floats(3, 2, 3), {})


def test_a_layer_whose_batch_cannot_be_split_is_caught():
    net, x = as_layer(lambda x: x / len(x)), np.ones((3, 2), np.float32)
    with pytest.raises(AssertionError):
        close(predict(net, {}, x, batch_size=2), net({}, x))
