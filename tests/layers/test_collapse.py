"""`collapse` against NumPy, row by row over the valid steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import close, drawn, params_of, same

import diffprog as dp

X = drawn(2, 2, 5, 3)
KERNEL = drawn(3, 1, seed=1)
MASK = np.array([[[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]], [[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]], bool)


def attended(x):
    weights = np.exp(x @ KERNEL)
    return (weights / weights.sum() * x).sum(0)


ROWS = {"first": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0),
        "max": lambda x: x.max(0), "attention": attended}


def params(how, dtype=jnp.float32):
    return {"kernel": jnp.asarray(KERNEL, dtype)} if how == "attention" else {}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ROWS)
def test_collapse_ignores_masked_steps(how, masked):
    net, mask = dp.collapse(how), MASK if masked else np.ones_like(MASK)
    wanted = np.zeros((2, 2, 3))
    for row in np.ndindex(2, 2):
        if mask[row].any():
            wanted[row] = ROWS[how](X[row][mask[row]])
    with jax.enable_x64(True):
        x = jnp.where(mask[..., None], X, jnp.nan)
        run = jax.jit(lambda x: net(params(how, jnp.float64), x, mask=MASK if masked else None))
        y = run(x)
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-14)
        if masked:
            assert not y[1, 1].any()  # exactly


@pytest.mark.parametrize("how", ROWS)
def test_padding_has_no_gradient(how):
    def total(params, x):
        return jnp.sum(jnp.sin(dp.collapse(how)(params, x, mask=jnp.asarray(MASK)) + 1))

    x = jnp.where(MASK[..., None], jnp.asarray(X, jnp.float32), jnp.nan)
    slope = jax.jit(jax.grad(total, (0, 1)))
    own, slopes = slope(params(how), x)
    chex.assert_tree_all_finite((own, slopes))
    assert not slopes[~MASK].any() and slopes[MASK].any()
    if how == "attention":  # rows with one valid step or none do not depend on the kernel
        wanted, _ = slope(params(how), x.at[1].set(7.0))
        close(own, wanted)


@pytest.mark.parametrize("how", ROWS)
def test_16_bit_inputs_are_reduced_in_float32(how):
    x = 1 + jnp.asarray(np.arange(300) % 2, jnp.bfloat16).reshape(1, 300, 1) / 2
    y = dp.collapse(how)({"kernel": jnp.zeros((1, 1))} if how == "attention" else {}, x,
                         mask=jnp.ones((1, 300), bool))
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 0]) == {"first": 1.0, "last": 1.5, "max": 1.5}.get(how, 1.25)


@pytest.mark.slow
def test_a_mask_of_rows_and_the_learned_kernel():
    net, x = dp.collapse("attention"), jnp.asarray(X, jnp.float32)
    own = params_of(net, x)
    assert dp.tree.paths(own).keys() == {"kernel"} and own["kernel"].shape == (3, 1)
    y = net(own, x, mask=jnp.array([True, False]))
    close(y[0], net(own, x[0]))
    same(y[1], jnp.zeros((2, 3)))
    assert dp.collapse("last").bare and params_of(dp.collapse("last"), x) == {}
    ids = jnp.array([[[3], [1], [2]]])
    assert [int(dp.collapse(how)({}, ids)[0, 0]) for how in ("first", "last", "max")] == [3, 2, 3]
