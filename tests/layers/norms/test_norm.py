"""`layer_norm` and `rms_norm` against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.in_numpy import EPS, standardized
from support.in_numpy import off_centre as drawn
from support.refusing import expect

import diffprog as dp
from diffprog.core.parameters import INITIALIZERS

KEY = jax.random.key(0)


@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3)])
def test_layer_norm_standardizes_each_vector(leading):
    x = drawn(*leading, 5)
    scale, bias = drawn(5, seed=1), drawn(5, seed=2)
    wanted = np.zeros_like(x)
    for i in np.ndindex(*leading):
        mean = sum(x[i]) / 5
        var = sum((v - mean) ** 2 for v in x[i]) / 5
        wanted[i] = standardized(x[i], mean, var, scale, bias)
    with jax.enable_x64(True):
        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        y = dp.layer_norm(eps=EPS)(params, jnp.asarray(x))
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["scale", "bias", None])
def test_layer_norm_without_scale_or_bias(name):
    x, factor = drawn(3, 5), drawn(5, seed=1)
    plain = standardized(x, x.mean(-1, keepdims=True), x.var(-1, keepdims=True))
    wanted = {"scale": plain * factor, "bias": plain + factor}.get(name, plain)
    norm = dp.layer_norm(eps=EPS, scale=name == "scale", bias=name == "bias")
    with jax.enable_x64(True):
        params = {name: jnp.asarray(factor)} if name else {}
        assert set(norm.init(KEY, jnp.asarray(x))[0]) == set(params)
        np.testing.assert_allclose(norm(params, jnp.asarray(x)), wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3)])
def test_rms_norm_divides_each_vector_by_its_root_mean_square(leading):
    x, scale = drawn(*leading, 5), drawn(5, seed=1)
    wanted = np.zeros_like(x)
    for i in np.ndindex(*leading):
        wanted[i] = scale * x[i] / np.sqrt(sum(v * v for v in x[i]) / 5 + EPS)
    with jax.enable_x64(True):
        x, given = jnp.asarray(x), {"scale": jnp.asarray(scale)}
        y = dp.rms_norm(eps=EPS)(given, x)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
        alone = dp.rms_norm(eps=EPS, scale=False)
        assert alone.init(KEY, x) == ({}, {})
        np.testing.assert_allclose(alone({}, x) * scale, wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_rms_norm_keeps_the_direction_and_subtracts_no_mean():
    x = jnp.asarray(drawn(4, 5) + 10, jnp.float32)
    norm = dp.rms_norm(eps=1e-12)
    params, _ = norm.init(KEY, x)
    y = np.asarray(norm(params, x), np.float64)
    np.testing.assert_allclose((y * y).mean(-1), np.ones(4), rtol=1e-5)
    np.testing.assert_allclose(y / y[:, :1], x / x[:, :1], rtol=1e-5)
    np.testing.assert_allclose(norm(params, 7 * x), y, rtol=1e-5)


@pytest.mark.parametrize(("norm", "names"), [
    (dp.layer_norm(), ["bias", "scale"]), (dp.rms_norm(), ["scale"]),
], ids=["layer_norm", "rms_norm"])
def test_initial_scale_is_one_and_bias_zero(norm, names):
    params, state = norm.init(KEY, jnp.ones((2, 3)))
    begin = {"scale": [1.0] * 3, "bias": [0.0] * 3}
    assert sorted(params) == names and state == {}
    assert {name: leaf.tolist() for name, leaf in params.items()} == {
        name: begin[name] for name in names}


def test_initializers_are_used():
    norm = dp.layer_norm(scale_init="zeros", bias_init=jax.nn.initializers.constant(2.0))
    params, _ = norm.init(KEY, jnp.ones((2, 3)))
    np.testing.assert_array_equal(norm(params, jnp.asarray(drawn(2, 3), jnp.float32)), 2.0)
    params, _ = dp.rms_norm(scale_init="zeros").init(KEY, jnp.ones((2, 3)))
    np.testing.assert_array_equal(params["scale"], 0.0)


WITH_BIAS = [dp.layer_norm, dp.instance_norm, dp.batch_norm, lambda **o: dp.group_norm(3, **o)]


@pytest.mark.parametrize(("make", "name"), [
    *((make, "scale") for make in (dp.rms_norm, *WITH_BIAS)),
    *((make, "bias") for make in WITH_BIAS)])
@pytest.mark.parametrize("value", [None, False, ""], ids=repr)
def test_a_wrong_initializer_raises(make, name, value):
    """No value of the initializer leaves the parameter out: `scale` and `bias` do."""
    norm = make(**{f"{name}_init": value})
    expect("", f"{norm!r}: wants {name}_init as a function (key, shape, dtype), a standard "
           f"deviation or a name ({', '.join(sorted(INITIALIZERS))}), got {value!r}; pass 0.02 or "
           "jax.nn.initializers.normal(0.02), for example", norm.init, KEY, jnp.ones((2, 4, 4, 3)))


def test_a_large_mean_costs_no_accuracy():
    # The mean of squares minus the square of the mean would be off by a hundred per cent here.
    x = np.random.default_rng(0).normal(1e4, 1.0, (200, 64)).astype(np.float32)
    wide = x.astype(np.float64)
    wanted = standardized(wide, wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True), eps=1e-5)
    norm = dp.layer_norm()
    params, _ = norm.init(KEY, x)
    np.testing.assert_allclose(norm(params, jnp.asarray(x)), wanted, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [dp.layer_norm(), dp.rms_norm()], ids=repr)
def test_bfloat16_keeps_its_statistics_in_float32(norm):
    x = jnp.asarray(drawn(64, 8), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    mean = wide.mean(-1, keepdims=True) if norm == dp.layer_norm() else 0
    wanted = standardized(wide, mean, np.square(wide - mean).mean(-1, keepdims=True), eps=1e-5)
    params, _ = norm.init(KEY, x)
    assert {leaf.dtype.name for leaf in params.values()} == {"float32"}
    y = norm(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=0.004, atol=0.004)


def test_a_constant_vector_becomes_the_bias():
    norm, x = dp.layer_norm(), jnp.full((5, 3), 7.0)
    params, _ = norm.init(KEY, x)
    params["bias"] = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(norm(params, x), np.tile([1.0, 2.0, 3.0], (5, 1)))


@pytest.mark.slow
def test_zero_stays_zero_and_has_a_gradient():
    norm, x = dp.rms_norm(), jnp.zeros((2, 3))
    params, _ = norm.init(KEY, x)
    np.testing.assert_array_equal(norm(params, x), x)
    grads = jax.grad(lambda x: norm(params, x).sum())(x)
    np.testing.assert_allclose(grads, 1e5**0.5, rtol=1e-5)


@pytest.mark.parametrize("norm", [
    dp.layer_norm(), dp.layer_norm(bias=False), dp.layer_norm(scale=False), dp.rms_norm(),
], ids=repr)
def test_parameters_of_one_feature_are_not_broadcast(norm):
    wide = jnp.ones((2, 4))
    params = jax.tree.map(lambda leaf: leaf[:1], norm.init(KEY, wide)[0])
    with pytest.raises(dp.LayerError, match="1 feature "):
        norm(params, wide)


@pytest.mark.parametrize("make", [dp.layer_norm, dp.rms_norm])
@pytest.mark.parametrize("eps", [0.0, -1e-5, 1])
def test_a_wrong_eps_raises(make, eps):
    with pytest.raises(dp.LayerError, match="eps"):
        make(eps=eps)


@pytest.mark.parametrize("make", [dp.layer_norm, dp.rms_norm])
@pytest.mark.parametrize("x", [
    np.ones((), np.float32), np.ones((2, 3), np.int32),
], ids=["scalar", "integers"])
def test_scalars_and_integers_raise_at_init(make, x):
    norm = make()
    with pytest.raises(dp.LayerError):
        norm.init(KEY, x)


@pytest.mark.parametrize("make", [dp.layer_norm, dp.rms_norm])
def test_integers_raise_at_inference(make):
    norm = make()
    params, _ = norm.init(KEY, jnp.ones((2, 3)))
    with pytest.raises(dp.LayerError, match="floating-point"):
        norm(params, jnp.array([[1, 2, 3], [4, 0, 0]]))


# The derivative of `layer_norm` is written by hand: all transformations of it are compared with
# those of the formula.

AFFINE = {"scale": drawn(5, seed=1), "bias": drawn(5, seed=2)}


def formula(params, x):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    y = (x - mean) / jnp.sqrt(var + EPS)
    return y * params.get("scale", 1.0) + params.get("bias", 0.0)


def pair(*names):
    """The layer and the formula as functions of (params, x), and float64 params."""
    norm = dp.layer_norm(eps=EPS, scale="scale" in names, bias="bias" in names)
    return norm, formula, {name: jnp.asarray(AFFINE[name]) for name in names}


def agree(make, f, g, *given):
    """Assert that make(f) and make(g) are equal up to rounding, in float64."""
    one, other = (jax.jit(make(h))(*given) for h in (f, g))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.slow
@pytest.mark.parametrize("names", [("scale", "bias"), ("scale",), ("bias",), ()], ids=str)
def test_first_derivatives_of_layer_norm_are_those_of_the_formula(names):
    with jax.enable_x64(True):
        norm, plain, params = pair(*names)
        x, dx = jnp.asarray(drawn(2, 3, 5)), jnp.asarray(drawn(2, 3, 5, seed=3))
        tangent = jax.tree.map(lambda a: a + 1, params), dx
        agree(lambda f: f, norm, plain, params, x)
        agree(lambda f: lambda *at: jax.jvp(f, at, tangent), norm, plain, params, x)
        agree(lambda f: lambda *at: jax.vjp(f, *at)[1](dx), norm, plain, params, x)
        agree(lambda f: jax.vmap(jax.jacrev(f, 1), (None, 0)), norm, plain, params, x[0])


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_of_layer_norm_are_those_of_the_formula(outer, inner):
    with jax.enable_x64(True):
        norm, plain, params = pair("scale", "bias")
        x, weights = jnp.asarray(drawn(5)), jnp.asarray(drawn(5, seed=3))
        loss = lambda f: lambda p, x: jnp.sum(jnp.sin(f(p, x)) * weights)  # noqa: E731
        agree(lambda f: outer(inner(loss(f), (0, 1)), (0, 1)), norm, plain, params, x)


@pytest.mark.slow
def test_third_derivatives_and_products_with_the_hessian():
    with jax.enable_x64(True):
        norm, plain, params = pair("scale", "bias")
        x, v = jnp.asarray(drawn(3, 5)), jnp.asarray(drawn(3, 5, seed=3))
        slope = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(params, x))))  # noqa: E731
        agree(lambda f: lambda x: jax.jvp(slope(f), (x,), (v,)), norm, plain, x)
        curve = lambda f: lambda x: jax.jvp(slope(f), (x,), (v,))[1]  # noqa: E731
        agree(lambda f: jax.jacrev(curve(f)), norm, plain, x)


@pytest.mark.slow
def test_the_derivative_passes_through_vmap_and_scan():
    with jax.enable_x64(True):
        norm, plain, params = pair("scale", "bias")
        x = jnp.asarray(drawn(4, 3, 5))

        def loop(f, x):
            return jax.lax.scan(lambda x, _: (x + f(params, x), None), x, length=3)[0]

        def mapped(f):
            slope = jax.grad(lambda x: jnp.sum(jnp.sin(loop(f, x))))
            return lambda x: (jax.vmap(slope)(x), jax.vmap(slope, 1, 1)(x),
                              jax.jvp(functools.partial(loop, f), (x,), (jnp.cos(x),)))

        agree(mapped, norm, plain, x)


def test_a_large_mean_costs_the_gradient_no_accuracy():
    x = np.random.default_rng(0).normal(1e4, 1.0, (20, 64)).astype(np.float32)
    weights = np.random.default_rng(1).normal(1.0, 1.0, (20, 64)).astype(np.float32)
    slope = lambda f, dtype: jax.jit(jax.grad(  # noqa: E731
        lambda x: jnp.sum(f({}, x) * weights.astype(dtype))))(jnp.asarray(x, dtype))
    found = slope(dp.layer_norm(eps=EPS, scale=False, bias=False), jnp.float32)
    with jax.enable_x64(True):
        wanted = np.asarray(slope(formula, jnp.float64))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-3)


@pytest.mark.slow
def test_the_gradient_in_bfloat16_is_reduced_in_float32():
    # The sum of 4096 ones in bfloat16 would stop at 256.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4096)), jnp.bfloat16)
    norm = dp.layer_norm()
    params, _ = norm.init(KEY, x)
    loss = lambda params, x: jnp.sum(norm(params, x).astype(jnp.float32) ** 3)  # noqa: E731
    of_params, of_x = jax.grad(loss, (0, 1))(params, x)
    assert of_x.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in of_params.values()} == {"float32"}
    wanted = jax.grad(lambda x: jnp.sum(formula({}, x) ** 3))(x.astype(jnp.float32))
    np.testing.assert_allclose(of_x.astype(jnp.float32), wanted, rtol=0.05, atol=0.05)


def test_a_constant_vector_has_a_finite_gradient():
    norm, x = dp.layer_norm(eps=EPS), jnp.full((2, 3), 7.0)
    params, _ = norm.init(KEY, x)
    grads = jax.grad(lambda x: norm(params, x)[:, 0].sum())(x)
    np.testing.assert_allclose(grads, np.tile([2 / 3, -1 / 3, -1 / 3], (2, 1)) / EPS**0.5,
                               rtol=1e-5)
