"""No examples and no steps: shapes with 0, zeros, or an error of the library."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import diffprog as dp

FAST = {case.name: case for case in CASES if isinstance(case.layer, dp.Layer) and not (
    case.slow or case.name == "fixed_point")}  # that one has a test of its own
MODELS = {name: next(case for case in CASES if case.name == name)
          for name in ("vit", "unet", "dit", "gpt", "bert", "transformer", "seq2seq")}


def without(tree, axis, length):
    """The arrays with nothing along an axis that is as long as that of the input."""
    def cut(a):
        if len(a.shape) <= axis or a.shape[axis] != length:
            return a
        return jax.ShapeDtypeStruct((*a.shape[:axis], 0, *a.shape[axis + 1 :]), a.dtype)

    return jax.tree.map(cut, tree)


@pytest.mark.parametrize("axis", [0, 1], ids=["examples", "steps"])
@pytest.mark.parametrize("case", (FAST | MODELS).values(), ids=FAST | MODELS)
def test_an_empty_input_has_an_output_shape_or_an_error(case, axis):
    """Shapes alone: what raises does so while the call is traced, in the library's words."""
    first = jax.tree.leaves(case.x)[0]
    whole_numbers = not jnp.issubdtype(first.dtype, jnp.floating)
    if axis == 1 and len(first.shape) == 2 and not whole_numbers:
        return  # the second axis is that of features
    plan = case.layer.plan(case.x, **case.side)
    x, side = without((case.x, case.side), axis, first.shape[axis])
    try:
        y, state = jax.eval_shape(lambda params, state, x, side: case.layer.apply(
            params, state, x, key=jax.random.key(0), **side), plan.params, plan.state, x, side)
    except dp.LayerError:
        return
    assert jax.tree.structure(state) == jax.tree.structure(plan.state)
    if axis == 0 and (case.options or {}).get("batched", True):
        assert {a.shape[0] for a in jax.tree.leaves(y)} == {0}


MEMORY = jnp.zeros((2, 0, 4))


@pytest.mark.parametrize(("net", "x", "side", "wanted"), [
    (dp.cross_attention(2), jnp.ones((2, 3, 4)), {"memory": MEMORY}, (2, 3, 4)),
    (dp.cross_attention(2), jnp.ones((2, 3, 4)),
     {"memory": MEMORY, "memory_mask": jnp.zeros((2, 0), bool)}, (2, 3, 4)),
    (dp.attention_head(3), jnp.ones((2, 3, 4)), {"memory": MEMORY}, (2, 3, 3)),
    (dp.self_attention(2, causal=True), jnp.ones((2, 0, 4)), {}, (2, 0, 4)),
    (dp.recurrent(dp.gru(3)), jnp.ones((2, 0, 4)), {}, (2, 0, 3)),
    (dp.conv(3, 3, dims=1, padding="CAUSAL"), jnp.ones((2, 0, 4)), {}, (2, 0, 3)),
    (dp.heads(2, dp.linear(3)), jnp.ones((0, 4)), {}, (0, 6)),
], ids=lambda value: repr(value) if isinstance(value, dp.Layer) else "")
def test_layers_over_no_entries_return_zeros_and_finite_gradients(net, x, side, wanted):
    """What sees nothing gives zeros before its bias, and no gradient is NaN."""
    seen = {name: jnp.ones((2, 1, *a.shape[2:]), a.dtype) for name, a in side.items()}
    whole = jnp.ones([max(n, 1) for n in x.shape])
    params, state = net.init(jax.random.key(0), whole, **seen)
    run = lambda params, x: net.apply(params, state, x, **side)[0]  # noqa: E731
    y = run(params, x)
    assert y.shape == wanted and not y.any()
    grads = jax.grad(lambda *given: run(*given).sum(), (0, 1))(params, x)
    chex.assert_tree_all_finite(grads)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [
    lambda: dp.losses.cross_entropy(jnp.zeros((0, 3)), jnp.zeros(0, int)),
    lambda: dp.losses.linear_cross_entropy(jnp.zeros((0, 3)), jnp.zeros((3, 5)), jnp.zeros(0, int),
                                    chunk=2)[0],
    lambda: dp.losses.squared_error(jnp.zeros((0, 3)), jnp.zeros((0, 3))),
    lambda: dp.losses.ctc(jnp.zeros((0, 4, 3)), jnp.zeros((0, 2), int)),
    lambda: dp.metrics.accuracy(jnp.zeros((0, 3)), jnp.zeros(0, int)),
    lambda: dp.metrics.top_k_accuracy(jnp.zeros((0, 3)), jnp.zeros(0, int), k=2),
    lambda: dp.metrics.confusion_matrix(jnp.zeros((0, 3)), jnp.zeros(0, int)).sum(),
    lambda: dp.losses.gaussian_kl(jnp.zeros((0, 3)), jnp.zeros((0, 3))),
])
def test_the_mean_of_no_entries_is_zero(loss):
    np.testing.assert_array_equal(loss(), 0)
