"""`dtypes`: casting where something is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import same

from diffprog.core.dtypes import (
    along,
    cast,
    float_dtype,
    is_float,
    is_inexact,
    is_int,
    is_key,
    is_short,
    joint,
    outside,
    standard_promotion,
    wide,
)

BF16 = jnp.bfloat16


@pytest.mark.parametrize(("leaf", "short"), [
    (jnp.ones(2, BF16), True), (np.ones(2, np.float16), True), (jnp.ones(2), False),
    (jnp.ones(2, int), False), (jax.random.key(0), False), (1.0, False)], ids=str)
def test_is_short_is_true_of_16_bit_floats_alone(leaf, short):
    assert is_short(leaf) == short


@pytest.mark.parametrize(("leaf", "kinds"), [
    (jnp.ones(2, BF16), {is_float, is_inexact}), (np.ones(2, np.complex64), {is_inexact}),
    (np.ones(2, np.uint8), {is_int}), (jax.ShapeDtypeStruct((2,), jnp.int32), {is_int}),
    (np.ones(2, bool), set()), (jax.random.key(0), {is_key}), (1, set()), ([1.0], set()),
], ids=["bfloat16", "complex64", "uint8", "a shape", "bool", "key", "1", "[1.0]"])
def test_the_kinds_of_arrays(leaf, kinds):
    assert {kind for kind in (is_float, is_inexact, is_int, is_key) if kind(leaf)} == kinds


def test_the_dtype_of_a_tree_is_that_of_its_floats():
    tree = {"a": jnp.ones(2, BF16), "b": jnp.arange(2), "c": jax.random.key(0)}
    assert float_dtype(tree) == BF16
    assert float_dtype({**tree, "d": jnp.ones(2, jnp.float16)}) == jnp.float32
    assert float_dtype(jnp.arange(2)) is None


def test_wide_is_at_least_float32():
    assert wide(jnp.ones(2, BF16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert wide(jnp.ones(2, jnp.float64)).dtype == jnp.float64


def test_cast_leaves_what_is_no_float():
    tree = {"a": jnp.ones(2), "b": jnp.arange(2), "c": jax.random.key(0)}
    same(cast(tree, None)["a"], tree["a"])
    assert [leaf.dtype for leaf in cast(tree, BF16).values()] == [
        BF16, jnp.int32, tree["c"].dtype]


def test_beside_32_bits_a_parameter_is_only_cast():
    x = jnp.ones((3, 2))
    assert str(jax.make_jaxpr(lambda b: x + along(b, x))(jnp.ones(2))) == str(
        jax.make_jaxpr(lambda b: x + b)(jnp.ones(2)))
    same(along(jnp.ones(2, BF16), x), jnp.ones((1, 2)))


def test_dtypes_are_joined_as_by_default_under_any_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert joint(jnp.ones(2, BF16), jnp.int8, jnp.float32) == jnp.float32
        with standard_promotion():
            same(jnp.ones(2, BF16) * jnp.ones((2, 2)), jnp.ones((2, 2)))
        with pytest.raises(ValueError, match="strict"):
            jnp.ones(2, BF16) * jnp.ones(2)
        with pytest.raises(ValueError, match="rank_promotion"):
            jnp.ones(2) * jnp.ones((2, 2))


@pytest.mark.parametrize("dtype", [BF16, jnp.float16])
def test_beside_16_bits_it_has_the_shape_and_dtype_of_x(dtype):
    x = jnp.array([[jnp.nan, jnp.inf], [1, 2], [3, 4]], dtype)
    bias = jnp.array([1.5, -1 / 3])
    same(along(bias, x), jnp.broadcast_to(bias.astype(dtype), (3, 2)))
    # x has no part in it.
    grads = jax.grad(lambda x: along(bias, x).astype(jnp.float32).sum())(x)
    assert (grads == 0).all()


@pytest.mark.parametrize("leaf", [jnp.zeros(2), jnp.zeros(2, BF16)], ids=["float32", "bfloat16"])
def test_its_gradient_is_summed_wide_over_mapped_axes_too(leaf):
    x = jnp.zeros((512, 8, 2), BF16)
    run = lambda b: jax.vmap(jax.vmap(lambda x: x + along(b, x)))(x)  # noqa: E731
    grads = jax.grad(lambda b: run(b).astype(jnp.float32).sum())(leaf)
    assert grads.tolist() == [4096, 4096] and grads.dtype == leaf.dtype


def test_xla_computes_nothing_for_the_choice():
    x, bias = jnp.ones((64, 2), BF16), jnp.ones(2)
    program = jax.jit(lambda b, x: x + along(b, x)).lower(bias, x).compile().as_text()
    assert "select" not in program


def test_loop_constants_are_wide_outside_and_keep_their_dtype_inside():
    tree = {"a": jnp.ones(2, BF16), "b": jnp.ones(2), "c": jnp.arange(2), "d": jax.random.key(0)}
    wide, inside = outside(tree)
    assert wide["a"].dtype == jnp.float32 and wide["b"] is tree["b"]
    assert [a.dtype for a in inside(wide).values()] == [a.dtype for a in tree.values()]
