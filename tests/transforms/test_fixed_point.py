"""`fixed_point` against closed forms, unrolled iterations and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, X, close, drawn, gradient, identity, names, params_of, same

import diffprog as dp
from diffprog.gradients.agreement import widened

SMALL = jax.nn.initializers.normal(0.2)
PAIR = dp.parallel(dp.linear(4, kernel_init=SMALL), dp.linear(4)) >> dp.add
F = PAIR >> jnp.tanh
NET = dp.fixed_point(F)


def in_float64(test):
    @functools.wraps(test)
    def run():
        with jax.enable_x64(True):
            test()

    return run


def unrolled(params, x):
    return jax.lax.scan(lambda z, _: (F(params, (z, x)), None), jnp.zeros_like(x), length=200)[0]


def trees_of(pair):
    return {"parallel_0": {f"linear_{i}": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
                           for i, (kernel, bias) in enumerate(pair)}}


@in_float64
def test_a_linear_layer_has_a_closed_form():
    """z = z A + x B + c, so z = (x B + c) (1 - A)^-1, and likewise for the cotangent."""
    a, b, c, x, pull = (drawn(*shape, seed=seed) for seed, shape in enumerate(
        [(4, 4), (4, 4), (4,), (3, 4), (3, 4)]))
    a *= 0.8 / abs(np.linalg.eigvals(a)).max()
    net, params = dp.fixed_point(PAIR), trees_of([(a, c), (b, 0 * c)])
    inverse = np.linalg.inv(np.eye(4) - a)

    @jax.jit
    def both(params, x):
        y, back = jax.vjp(net, params, x)
        return y, back(jnp.asarray(pull))

    y, (slopes, down) = both(params, jnp.asarray(x))
    z = (x @ b + c) @ inverse
    np.testing.assert_allclose(y, z, rtol=1e-10)
    adjoint = pull @ inverse.T
    np.testing.assert_allclose(down, adjoint @ b.T, rtol=1e-9, atol=1e-10)
    wanted = trees_of([(z.T @ adjoint, adjoint.sum(0)), (x.T @ adjoint, adjoint.sum(0))])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10),
                 slopes, wanted)


@pytest.mark.slow
@in_float64
def test_derivatives_are_those_of_200_unrolled_steps_and_of_finite_differences():
    x = jnp.asarray(drawn(3, 4))
    params = jax.tree.map(widened, params_of(NET))

    def derivatives(net):
        """First order in reverse mode, second order in forward over reverse and reverse twice."""
        bent = lambda params, x: jnp.sum(jnp.sin(3 * net(params, x)))  # noqa: E731
        slope = jax.grad(bent, (0, 1))
        along = jax.jvp(lambda x: slope(params, x), (x,), (jnp.cos(x),))[1]
        again = jax.grad(lambda params, x: sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(slope(params, x))), (0, 1))
        return bent(params, x), slope(params, x), along, again(params, x)

    ours, wanted = (jax.jit(derivatives, static_argnums=0)(net) for net in (NET, unrolled))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), ours, wanted)
    assert dp.gradients.check_gradients(NET, params, x).worst.error < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("net", [
    dp.fixed_point(lambda pair: pair[0] + 1 + 0 * pair[1]),
    dp.fixed_point(lambda pair: jnp.exp(99 * (1 + pair[0])) + pair[1]),
    dp.fixed_point(lambda pair: jnp.cos(pair[0] + pair[1]), steps=3),
], ids=["no fixed point", "overflow", "too few steps"])
def test_divergence_returns_nan_and_nan_derivatives(net):
    y, slope = jax.jit(jax.value_and_grad(lambda x: net({}, x).sum()))(X)
    assert np.isnan(y) and np.isnan(slope).all()


def test_the_fixed_point_of_cos():
    y = dp.fixed_point(lambda pair: jnp.cos(pair[0]) + 0 * pair[1])({}, X)
    np.testing.assert_allclose(y, 0.7390851, atol=1e-5)


@pytest.mark.slow
def test_only_the_derivative_is_nan_if_only_it_does_not_converge():
    """x = 0 is a fixed point; the linear equation has four eigenvalues and only four steps."""
    net = dp.fixed_point(lambda pair: jnp.tanh(jnp.array([3, -3, 5, 7]) * pair[0] + pair[1]),
                         steps=4)
    y, slope = jax.value_and_grad(lambda x: net({}, x).sum())(0 * X)
    assert y == 0 and np.isnan(slope).all()


# Examples are solved separately.

def wave(pair):
    return jax.tree.map(lambda z, x: x + 0.9 * jnp.sin(z), *pair)


WAVE = dp.fixed_point(wave)
FAR = np.array([1e6, 1.0, 0.1])


def settled(x):
    """The z with ``z = x + 0.9 sin(z)``, by bisection in float64."""
    low, high = x - 1, x + 1
    for _ in range(80):
        middle = (low + high) / 2
        less = middle < x + 0.9 * np.sin(middle)
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return low


LIKE = {
    "one feature": lambda x: x[:, None],
    "one number": lambda x: x,
    "two axes": lambda x: x[:, None, None] * jnp.ones((1, 2, 2)),
    "a tree": lambda x: {"a": x[:, None] * jnp.ones(2), "b": x},
    "16 bits": lambda x: x[:, None].astype(jnp.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIKE)
def test_a_large_example_does_not_affect_the_accuracy_of_a_small_one(name):
    x = LIKE[name](jnp.asarray(FAR, jnp.float32))
    wanted = settled(FAR)
    assert abs(wanted[1] - 1.8621) < 5e-5
    exact = 0.03 if name == "16 bits" else 2e-5
    for leaf in jax.tree.leaves(jax.jit(WAVE)({}, x)):
        for row, z in zip(leaf[1:].astype(float), wanted[1:], strict=True):
            np.testing.assert_allclose(row, np.full(row.shape, z), rtol=exact)


@pytest.mark.slow
def test_derivatives_of_a_large_example_do_not_affect_those_of_a_small_one():
    """dz/dx is ``1 / (1 - 0.9 cos z)``, whatever the cotangents or tangents of other examples."""
    x = jnp.asarray(FAR, jnp.float32)[:, None]
    weights = jnp.array([[1e6], [1.0], [1.0]])
    wanted = 1 / (1 - 0.9 * np.cos(settled(FAR)))
    slope = jax.grad(lambda x: (WAVE({}, x) * weights).sum())(x)
    pushed = jax.jvp(lambda x: WAVE({}, x), (x,), (weights,))[1]
    bent = jax.grad(lambda x: jax.grad(lambda x: (WAVE({}, x) * weights).sum())(x).sum())(x)
    z = settled(FAR)
    for found, right in ((slope, wanted), (pushed, wanted),
                         (bent, -0.9 * np.sin(z) * wanted**3)):
        np.testing.assert_allclose(found[1:, 0], right[1:], rtol=1e-4)


@pytest.mark.slow
def test_the_gradient_of_parameters_is_a_sum_over_examples():
    """One example is saturated and far from its target; the reference solves one by one."""
    a, b, x, target = (drawn(*shape, seed=seed) for seed, shape in enumerate(
        [(4, 4), (4, 4), (5, 4), (5, 4)]))
    a *= 0.9 / np.linalg.norm(a, 2)
    x[0] = 50 * np.linalg.inv(b).sum(0)  # x @ b is 50 everywhere
    target[0] = 1e6
    z = np.zeros((5, 4))
    for _ in range(2000):
        z = np.tanh(z @ a + x @ b)
    slopes = [np.zeros((4, 4)), np.zeros((4, 4))]
    for row, cause, pull in zip(z, x, 2 * (z - target), strict=True):
        bend = np.diag(1 - row**2)
        adjoint = bend @ np.linalg.solve(np.eye(4) - a @ bend, pull)
        slopes = [slope + np.outer(given, adjoint) for slope, given in
                  zip(slopes, (row, cause), strict=True)]
    params = jax.tree.map(jnp.float32, trees_of([(a, np.zeros(4)), (b, np.zeros(4))]))

    def error(params):
        return jnp.sum(jnp.square(NET(params, jnp.float32(x)) - jnp.float32(target)))

    found = jax.jit(jax.grad(error))(params)["parallel_0"]
    for i, slope in enumerate(slopes):
        np.testing.assert_allclose(found[f"linear_{i}"]["kernel"], slope, rtol=0,
                                   atol=1e-4 * abs(slope).max())


def calls(f, *given, steps=200):
    """The solution, and each z at which the solver evaluates f."""
    seen = []

    def watched(pair):
        jax.debug.callback(lambda z: seen.append(np.asarray(z)), pair[0])
        return f(pair)

    y = dp.fixed_point(watched, steps=steps)({}, *given)
    jax.block_until_ready(y)
    jax.effects_barrier()
    return y, seen


@pytest.mark.slow
def test_the_slowest_example_decides_the_number_of_applications():
    def slow(pair):
        z, (x, speed) = pair[0][0], pair[1]
        return jnp.cos(speed * z) + x, speed

    x, speeds = jnp.zeros((3, 1)), jnp.array([[0.0], [0.5], [0.9]])
    _, together = calls(slow, (x, speeds))
    alone = [len(calls(slow, (x[i : i + 1], speeds[i : i + 1]))[1]) for i in range(3)]
    assert alone[0] < alone[1] < alone[2]
    assert len(together) == alone[2]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 3e38])
def test_an_example_that_diverges_does_not_affect_others(bad):
    """It is not finite at first, or overflows; the others are computed as without it."""
    net = dp.fixed_point(lambda pair: jnp.sin(pair[0]) * 0.9 + pair[1] * (1 + abs(pair[0])))
    x = jnp.array([[0.3], [bad], [-0.2]])
    both = jax.jit(lambda x: jax.vjp(lambda x: net({}, x), x))
    y, pull = both(x)
    (slope,) = pull(jnp.ones_like(x))
    clean = x.at[1].set(0.1)
    wanted, pull = both(clean)
    (right,) = pull(jnp.ones_like(x))
    assert np.isnan(y[1]).all() and np.isnan(slope[1]).all()
    for found, other in ((y, wanted), (slope, right)):
        np.testing.assert_allclose(found[::2], other[::2], rtol=2e-5)
        assert np.isfinite(other).all()


@pytest.mark.slow
def test_examples_that_f_mixes_converge_together():
    """One converges before the others and moves again with them; reference: a linear system."""
    mixing = np.array([[0.95, 0.0, 0.0], [0.5, 0.1, 0.0], [1e-4, 1e-4, 0.0]])
    x = np.array([[1.0], [0.0], [0.0]])
    wanted = np.linalg.solve(np.eye(3) - mixing, x)

    def f(pair):
        z, x = pair  # any number of examples; only the first three are mixed
        rows = jnp.zeros((len(z), len(z))).at[:3, :3].set(mixing[:len(z), :len(z)])
        return jnp.einsum("ij,j...->i...", rows, z) + x

    net = dp.fixed_point(f)
    np.testing.assert_allclose(net({}, jnp.float32(x)), wanted, rtol=2e-4)
    mean = dp.fixed_point(lambda pair: pair[0].mean(0, keepdims=True) / 2 + pair[1])
    x = jnp.array([[1e3], [1.0], [-10.0]])
    np.testing.assert_allclose(mean({}, x), x + x.mean(), rtol=1e-4)
    pushed = jax.grad(lambda x: mean({}, x)[1, 0])(x)
    np.testing.assert_allclose(pushed[:, 0], [1 / 3, 4 / 3, 1 / 3], rtol=1e-4)


@pytest.mark.slow
def test_x_without_a_batch_axis_is_solved_as_a_whole():
    """The tolerance is relative to the largest entry, also for one that cancels to zero."""
    a = np.array([[0.3, -0.4], [0.5, 0.2]])
    wanted = np.array([100.0, 0.0])
    net, x = dp.fixed_point(dp.parallel(dp.linear(2), identity) >> dp.add), wanted - wanted @ a
    params = {"parallel_0": {"linear_0": {"kernel": jnp.float32(a), "bias": jnp.zeros(2)}}}
    np.testing.assert_allclose(net(params, jnp.float32(x)), wanted, atol=1e-3)
    both = dp.fixed_point(lambda pair: jax.tree.map(lambda z, x: x + z[:2].sum() / 9, *pair))
    x = (jnp.ones((3, 2)), jnp.ones(2))  # leaves with different first axes
    close(both({}, x), jax.jit(both)({}, x))


@pytest.mark.slow
def test_a_side_input_as_long_as_the_batch_does_not_hide_the_batch_axis():
    def forward(params, pair, *, scale):
        return pair[1] + scale * jnp.sin(pair[0])

    x = jnp.asarray(FAR, jnp.float32)[:, None] * jnp.ones(3)  # three examples of three features
    net = dp.fixed_point(dp.stateless(None, forward, name="wave"))
    y = jax.jit(net)({}, x, scale=jnp.full(3, 0.9))
    np.testing.assert_allclose(y[1:, 0], settled(FAR)[1:], rtol=2e-5)
    whole = jax.jit(net)({}, x, scale=jnp.full((3, 1), 0.9))
    np.testing.assert_allclose(whole[1:, 0], settled(FAR)[1:], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    (0, 4), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(2, 0, 4), (0, 3, 4)])])
def test_an_empty_batch_returns_an_empty_solution(shape):
    x = jnp.ones(shape)
    params = params_of(NET, x)
    y, slope = jax.value_and_grad(lambda params: NET(params, x).sum())(params)
    assert NET(params, x).shape == shape and y == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slope))
    assert dp.fixed_point(wave)({}, jnp.ones((3, 0))).shape == (3, 0)


@pytest.mark.slow
def test_nan_stays_in_its_example():
    params = params_of(NET)
    y = jax.jit(NET)(params, X.at[0].set(jnp.nan))
    assert np.isnan(y[0]).all()
    close(y[1:], NET(params, X)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_accuracy_is_that_of_the_dtype(dtype):
    params = params_of(NET)
    y, slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(NET(params, x))))(X.astype(dtype))
    wanted, exact = jax.jit(jax.value_and_grad(lambda x: jnp.sum(unrolled(params, x))))(X)
    tolerance = 2 * float(jnp.finfo(dtype).eps) ** 0.75
    np.testing.assert_allclose(y, wanted, atol=12 * tolerance)
    np.testing.assert_allclose(slope.astype(float), exact, atol=4 * tolerance)


@pytest.mark.slow
def test_a_tolerance_allows_f_to_be_less_precise_than_x():
    rough = dp.mixed(F, jnp.bfloat16)
    params = params_of(NET)
    close_enough = jax.jit(dp.fixed_point(rough, tolerance=0.02))(params, X)
    np.testing.assert_allclose(close_enough, NET(params, X), atol=0.1)


def test_all_iterations_share_one_key():
    drop = dp.dropout(0.5)
    noisy = dp.parallel(dp.linear(4, kernel_init=SMALL) >> drop, dp.linear(4)) >> dp.add >> jnp.tanh
    net, x = dp.fixed_point(noisy), X
    params = params_of(net)
    run = jax.jit(functools.partial(net.apply, train=True))
    z = run(params, {}, x, key=KEY)[0]
    close(noisy.apply(params, {}, (z, x), key=KEY, train=True)[0], z)
    assert abs(run(params, {}, x, key=jax.random.key(1))[0] - z).max() > 1e-3


@pytest.mark.slow
def test_a_pytree_is_solved_as_one():
    def step(layers, pair):
        (a, b), (x, y) = pair
        return jnp.tanh(layers.down(b) + x), jnp.tanh(layers.up(a).mean(0) + y)

    f = dp.program(up=dp.linear(2, kernel_init=SMALL), down=dp.linear(4, kernel_init=SMALL))(step)
    net, x = dp.fixed_point(f), (X, jnp.ones(2))
    params = params_of(net, x)
    z = jax.jit(net)(params, x)
    close(f(params, (z, x)), z)


@pytest.mark.slow
def test_parameters_taps_and_streams_are_those_of_the_layer():
    assert names(NET) == names(F)
    same(NET.init(KEY, X), F.init(KEY, (X, X)))
    params = params_of(NET)
    y, seen = dp.tap(NET, "parallel_0/linear_0")(params, X)
    close((y, seen["parallel_0/linear_0"]),
          (NET(params, X), dp.linear(4)(params["parallel_0"]["linear_0"], y)))
    assert NET.start is None  # a position-wise layer; one that mixes time streams
    kind = dp.conv(4, 2, dims=1, padding="CAUSAL")
    assert dp.fixed_point(dp.parallel(kind, identity) >> dp.add).start is not None


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_applications():
    params = params_of(NET)
    sizes = []
    for steps in (20, 200):
        net = dp.fixed_point(F, steps=steps)
        _, pull = jax.vjp(lambda p, net=net: net(p, X), params)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
    assert sizes[0] == sizes[1] < 40 * X.size


@pytest.mark.slow
def test_gradients_under_remat_repeat_and_vmap():
    plain = dp.repeat(2, NET)
    params = params_of(plain)
    close(gradient(dp.remat(plain), params), gradient(plain, params))
    one = jax.vmap(lambda x: NET(params_of(NET), x))
    close(jax.jit(one)(X), NET(params_of(NET), X))


@pytest.mark.slow
def test_second_derivatives_in_a_loop_need_forward_mode_or_unrolling():
    def slope(net):
        params, state = net.init(KEY, X)
        return jax.grad(lambda x: jnp.sum(jnp.sin(net(params, x, state=state))))

    loop, written_out = (slope(dp.repeat(2, NET, unroll=unroll)) for unroll in (1, 2))
    forwards = jax.jvp(loop, (X,), (jnp.cos(X),))[1]
    backwards = jax.grad(lambda x: jnp.vdot(written_out(x), jnp.cos(X)))(X)
    close(forwards, backwards)
    with pytest.raises(ValueError, match="while_loop"):  # update the docstring once JAX can
        jax.grad(lambda x: jnp.vdot(loop(x), jnp.cos(X)))(X)
