"""`embedding` and `unembed` against NumPy: rows, scores, gradients, ids out of range."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from support.comparing import KEY, close, drawn

import diffprog as dp

NET = dp.embedding(11, 3)
TABLE = {"embedding": jnp.asarray(drawn(11, 3), jnp.float32)}
IDS = np.random.default_rng(1).integers(11, size=(2, 1, 5))


@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 5)])
def test_each_id_has_a_row(shape):
    ids = np.resize(IDS, shape)
    params, state = NET.init(KEY, jax.ShapeDtypeStruct(shape, jnp.int32))
    assert state == {} and params["embedding"].shape == (11, 3)
    wanted = np.zeros((*shape, 3), np.float32)
    for place in np.ndindex(shape):
        wanted[place] = np.asarray(TABLE["embedding"])[ids[place]]
    np.testing.assert_array_equal(NET(TABLE, jnp.asarray(ids)), wanted)


def test_embedding_equals_one_hot_and_linear_in_value_and_gradient():
    ids, weights = jnp.asarray(IDS), drawn(2, 1, 5, 3)
    product = dp.one_hot(11) >> dp.linear(3, bias=False)

    def loss(net):
        return lambda params: jnp.sum(jnp.sin(net(params, ids)) * weights)

    ours, grads = jax.value_and_grad(loss(NET))(TABLE)
    theirs, wanted = jax.value_and_grad(loss(product))(
        {"linear_0": {"kernel": TABLE["embedding"]}})
    close(ours, theirs)
    close(grads["embedding"], wanted["linear_0"]["kernel"])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32", "int64", "uint64"])
def test_ids_out_of_range_return_nan_and_not_another_row(dtype):
    """Also ids that overflow a dtype used inside."""
    kind = np.iinfo(dtype)
    candidates = [-1, -11, -(2**32) + 3, 11, 127, 255, 2**31, 2**32 - 1, 2**32 + 3, kind.min,
                  kind.max]
    wrong = sorted({i for i in candidates if kind.min <= i <= kind.max and not 0 <= i < 11})
    with jax.enable_x64(True):
        ids = jnp.asarray(np.array([4, *wrong, 10], dtype))
        assert ids.dtype == dtype and len(wrong) > 1

        def run(params, ids):
            y = NET(params, ids)
            return jnp.sum(jnp.nan_to_num(y)), y

        (_, y), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(TABLE, ids)
    assert np.isnan(y[1:-1]).all()
    np.testing.assert_array_equal(y[jnp.array([0, -1])], TABLE["embedding"][jnp.array([4, 10])])
    wanted = np.zeros((11, 3))
    wanted[[4, 10]] = 1
    np.testing.assert_array_equal(grads["embedding"], wanted)


def test_ids_out_of_range_have_no_gradient():
    grads = jax.grad(lambda params: jnp.sum(NET(params, jnp.array([-1, 12]))))(TABLE)
    np.testing.assert_array_equal(grads["embedding"], 0)


FIRST_WRONG = "index 12 is out of bounds for axis 0 with size 11"


@pytest.mark.parametrize("run", [
    lambda params, ids: NET(params, ids),
    jax.jit(lambda params, ids: NET(params, ids)),
    lambda params, ids: jax.vmap(NET, (None, 0))(params, ids),
    lambda params, ids: jax.grad(lambda p: jnp.sum(NET(p, ids)))(params),
    lambda params, ids: jax.lax.scan(lambda c, i: (c, NET(params, i)), 0, ids)[1],
], ids=["eager", "jit", "vmap", "grad", "scan"])
def test_checkify_names_the_id_out_of_range(run):
    checked = checkify.checkify(run, errors=checkify.index_checks)
    error, _ = checked(TABLE, jnp.array([[0, 1], [3, 12]]))
    with pytest.raises(checkify.JaxRuntimeError, match=FIRST_WRONG):
        error.throw()
    checked(TABLE, jnp.array([[0, 1], [3, 10]]))[0].throw()


def test_checkify_reports_negative_ids_and_costs_nothing_unless_used():
    error, _ = checkify.checkify(jax.jit(NET.apply), errors=checkify.index_checks)(
        TABLE, {}, jnp.array([3, -1]))
    assert "index -1 is out of bounds for axis 0 with size 11" in error.get()
    jaxpr = jax.make_jaxpr(NET)(TABLE, jnp.array([3, -1]))
    assert [e.primitive.name for e in jaxpr.eqns] == ["broadcast_in_dim", "gather"]


def test_parameters_are_float32_and_other_dtypes_are_kept():
    ids = jnp.array([1, 2])
    with jax.enable_x64(True):
        plan = NET.plan(ids)
        assert plan.params["embedding"].dtype == plan.y.dtype == jnp.float32
        for dtype in (jnp.bfloat16, jnp.float64):
            cast = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), TABLE)
            assert NET(cast, ids).dtype == dtype


# Scores.

def test_unembed_scores_by_inner_products():
    x = drawn(2, 4, 3, seed=2)
    wanted = np.zeros((2, 4, 11))
    for place in np.ndindex(2, 4, 11):
        wanted[place] = sum(x[place[:2]] * np.asarray(TABLE["embedding"])[place[2]])
    y = dp.unembed(TABLE, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
    assert dp.unembed(TABLE, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert dp.unembed(TABLE, jnp.ones(3)).shape == (11,)


def test_scores_have_variance_1_at_init():
    params, _ = dp.embedding(500, 64).init(KEY, jnp.array([0]))
    x = jax.random.normal(jax.random.key(1), (100, 64))
    assert abs(float(dp.unembed(params, x).var()) - 1) < 0.05
    assert abs(float(params["embedding"].std()) * math.sqrt(64) - 1) < 0.02


@dp.program(embed=dp.embedding(11, 3), body=dp.linear(3))
def tied(layers, x):
    y = jnp.tanh(layers.body(layers.embed(x)))
    return dp.unembed(layers.embed.params, y)


def test_the_gradient_of_a_tied_embedding_is_the_sum_of_both_uses():
    ids = jnp.asarray(IDS[:, 0])
    params, _ = tied.init(KEY, ids)

    def loss(read, scored):
        y = jnp.tanh(read[ids] @ params["body"]["kernel"] + params["body"]["bias"])
        return jnp.sum(jnp.sin(y @ scored.T))

    table = params["embed"]["embedding"]
    ours, grads = jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(tied(p, ids)))))(params)
    wanted, parts = jax.jit(jax.value_and_grad(loss, (0, 1)))(table, table)
    close(ours, wanted)
    close(grads["embed"]["embedding"], sum(parts))
