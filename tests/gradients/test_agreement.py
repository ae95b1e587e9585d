"""`check_gradients` accepts correct derivatives and finds relative errors of 1e-3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp


def wide():
    return jax.config.read("jax_enable_x64")


def with_rule(value, slope):
    """The function `value` with the custom derivative `slope`."""
    f = jax.custom_jvp(value)
    f.defjvp(lambda given, moved: (value(*given), slope(*given) * moved[0]))
    return f


def with_transpose(factor):
    """``x / 2``, with only its reverse mode scaled by a factor."""
    def solve(_, b):
        return b / 2

    def transposed(_, b):
        return b / 2 * factor

    return lambda x: jax.lax.custom_linear_solve(lambda y: 2 * y, x, solve, transposed)


def smooth(tree, y):
    a = jnp.tanh(tree["a"]) @ tree["b"]["c"]
    return {"one": a * jnp.exp(y), "two": (jnp.sin(a).sum(), y**3)}


def test_a_smooth_function_of_pytrees_passes():
    tree = {"a": jnp.ones((2, 3)), "b": {"c": jnp.array([0.5, -1.0, 2.0])}}
    report = dp.gradients.check_gradients(smooth, tree, jnp.float32(0.3))
    assert [row.path for row in report.rows] == ["0/a", "0/b/c", "1"]
    assert report.worst.error < 1e-7
    assert report.worst.error == max(row.error for row in report.rows)
    assert str(report).count("\n") == 2 and "0/b/c: reverse" in str(report)


def test_derivatives_equal_the_formula():
    (row,) = dp.gradients.check_gradients(jnp.exp, jnp.array(0.7)).rows
    (base,) = dp.gradients.check_gradients(lambda x: x, jnp.array(0.7)).rows
    # Both are the same direction and projection, times the derivative.
    assert abs(base.reverse) > 1e-3
    for kind in ("reverse", "forward", "difference"):
        ratio = getattr(row, kind) / getattr(base, kind)
        np.testing.assert_allclose(ratio, np.exp(np.float32(0.7), dtype=np.float64), rtol=1e-8)


@pytest.mark.parametrize("f", [jnp.sin, jnp.exp])
def test_it_works_in_float64_whatever_the_session_has(f):
    assert not wide()
    x = jnp.array([0.3, -1.2, 2.0], jnp.float32)
    assert dp.gradients.check_gradients(f, x).worst.error < 1e-7
    seen = []
    dp.gradients.check_gradients(lambda x: seen.append(x.dtype) or f(x), x)
    assert {dtype.name for dtype in seen} == {"float64"}


@pytest.mark.parametrize("off", [1.001, 0.999, -1.0, 0.0])
def test_a_wrong_rule_is_caught(off):
    right = with_rule(jnp.sin, jnp.cos)
    wrong = with_rule(jnp.sin, lambda x: off * jnp.cos(x))
    x = jnp.array([0.3, -1.2, 2.0])
    dp.gradients.check_gradients(right, x)
    with pytest.raises(dp.LayerError, match="derivatives that agree"):
        dp.gradients.check_gradients(wrong, x)


def test_a_wrong_reverse_mode_is_caught():
    x = jnp.array([0.3, -1.2, 2.0])
    dp.gradients.check_gradients(with_transpose(1.0), x)
    with pytest.raises(dp.LayerError, match="derivatives that agree") as caught:
        dp.gradients.check_gradients(with_transpose(1.001), x)
    numbers = str(caught.value).replace(",", "").split()
    reverse, forward, difference = (
        float(numbers[numbers.index(kind) + 1]) for kind in ("reverse", "forward", "difference"))
    np.testing.assert_allclose(reverse, 1.001 * forward, rtol=1e-6)
    np.testing.assert_allclose(forward, difference, rtol=1e-6)


def test_a_rule_for_reverse_mode_alone_is_refused():
    def make(off):
        f = jax.custom_vjp(jnp.sin)
        f.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (off * g * jnp.cos(x),))
        return f

    x = jnp.array([0.3, -1.2, 2.0])
    with pytest.raises(TypeError, match="forward-mode"):
        dp.gradients.check_gradients(make(1.0), x)


def test_the_worst_leaf_is_named():
    wrong = with_rule(jnp.sin, lambda x: 1.001 * jnp.cos(x))
    worse = with_rule(jnp.sin, lambda x: 1.5 * jnp.cos(x))

    def f(tree):
        return jnp.sin(tree["fine"]) + wrong(tree["off"]["by"]) + worse(tree["off"]["more"])

    tree = {"fine": jnp.ones(2), "off": {"by": jnp.ones(2), "more": jnp.ones(2)}}
    with pytest.raises(dp.LayerError, match="got off/more: reverse"):
        dp.gradients.check_gradients(f, tree)


def test_the_tolerance_is_relative_to_the_derivative():
    wrong = with_rule(lambda x: 1e6 * jnp.sin(x), lambda x: 1e6 * 1.001 * jnp.cos(x))
    x = jnp.array([0.3, -1.2, 2.0])
    assert 1e-4 < dp.gradients.check_gradients(wrong, x, tolerance=1e-2).worst.error < 1e-2
    with pytest.raises(dp.LayerError, match=r"agree to 0\.0001"):
        dp.gradients.check_gradients(wrong, x, tolerance=1e-4)


def test_every_entry_of_a_leaf_is_tested():
    # The rule is wrong at one entry of a hundred.
    wrong = with_rule(jnp.sin, lambda x: jnp.cos(x).at[57].mul(1.5))
    with pytest.raises(dp.LayerError):
        dp.gradients.check_gradients(wrong, jnp.ones(100))


def test_every_output_is_tested():
    wrong = with_rule(jnp.sin, lambda x: 1.5 * jnp.cos(x))
    with pytest.raises(dp.LayerError):
        dp.gradients.check_gradients(lambda x: {"a": x, "b": (x * x, wrong(x))}, jnp.ones(3))


@pytest.mark.parametrize("f", [
    lambda x: jnp.sqrt(x).sum(), lambda x: x / 0,
], ids=["sqrt", "division"])
def test_a_gradient_that_is_not_finite_is_caught(f):
    with pytest.raises(dp.LayerError, match="error inf"):
        dp.gradients.check_gradients(f, jnp.zeros(2))


def test_a_kink_is_caught():
    with pytest.raises(dp.LayerError):
        dp.gradients.check_gradients(jax.nn.relu, jnp.zeros(()))


@pytest.mark.slow
def test_leaves_that_are_no_floats_are_constant():
    rows, key = jnp.array([2, 0]), jax.random.key(0)
    seen = []

    def f(table, rows, key, flag):
        seen.append((rows.dtype, flag.dtype))
        return jnp.where(flag, table[rows], 0) * jax.random.normal(key, (2,))

    report = dp.gradients.check_gradients(f, jnp.ones(3), rows, key, jnp.array(True))
    assert [row.path for row in report.rows] == ["0"]
    assert set(seen) == {(jnp.dtype("int32"), jnp.dtype("bool"))}
    # The rows come before the floats here: leaves and paths must not be confused.
    report = dp.gradients.check_gradients(lambda rows, x: x["z"][rows], rows,
        {"n": rows, "z": jnp.ones(3)})
    assert [row.path for row in report.rows] == ["1/z"]
    assert abs(report.worst.reverse) > 1e-3


@pytest.mark.parametrize("given", [(jnp.arange(3),), ({},), (jnp.arange(3), {}), ()])
def test_arguments_without_floats_are_refused(given):
    with pytest.raises(dp.LayerError, match="floating-point argument"):
        dp.gradients.check_gradients(lambda *_: jnp.ones(2), *given)


def test_a_function_that_leaves_float64_is_refused():
    with pytest.raises(dp.LayerError, match="computes in float64"):
        dp.gradients.check_gradients(lambda x: jnp.sin(x).astype(jnp.float32), jnp.ones(2))


@pytest.mark.parametrize("session", [False, True])
def test_the_precision_of_the_session_is_restored(session):
    def fails(x):
        raise RuntimeError("inside")

    def twice(x):
        return 2 * x

    with jax.enable_x64(session):
        dp.gradients.check_gradients(twice, jnp.ones(2))
        assert wide() is session
        wrong = with_rule(twice, lambda x: 3 * x)
        for f, error in ((fails, RuntimeError), (wrong, dp.LayerError)):
            with pytest.raises(error):
                dp.gradients.check_gradients(f, jnp.ones(2))
            assert wide() is session
        assert jnp.asarray(1.0).dtype == (jnp.float64 if session else jnp.float32)


def test_the_seed_decides_the_direction():
    x = jnp.ones(3)
    same = [dp.gradients.check_gradients(jnp.sin, x, seed=seed).worst.reverse for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_a_function_without_floating_results_is_refused():
    with pytest.raises(dp.LayerError, match="floating-point numbers"):
        dp.gradients.check_gradients(lambda x: x.astype(int), jnp.ones(2))


def test_a_function_that_computes_in_float32_is_refused():
    weights = jnp.ones(2)  # float32, closed over
    with pytest.raises(dp.LayerError, match="computes in float64"):
        dp.gradients.check_gradients(lambda x: x.astype(jnp.float32) * weights, jnp.ones(2))
