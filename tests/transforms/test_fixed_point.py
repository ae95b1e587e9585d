"""`fixed_point` against what it stands for: closed forms, unrolled steps, finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import KEY, X, close, drawn, gradient, identity, names, params_of, same

import diffprog as dp
from diffprog.derivatives import widened

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
def test_of_a_linear_layer_it_has_a_closed_form():
    """z = z A + x B + c, so z = (x B + c) (1 - A)^-1, and so is what is pulled back."""
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
    at_rest = pull @ inverse.T
    np.testing.assert_allclose(down, at_rest @ b.T, rtol=1e-9, atol=1e-10)
    wanted = trees_of([(z.T @ at_rest, at_rest.sum(0)), (x.T @ at_rest, at_rest.sum(0))])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10),
                 slopes, wanted)


@in_float64
def test_derivatives_are_those_of_200_unrolled_steps_and_of_finite_differences():
    x = jnp.asarray(drawn(3, 4))
    params = jax.tree.map(widened, params_of(NET))

    def derivatives(net):
        """Of first order in reverse mode, and of second order, backwards over both modes."""
        bent = lambda params, x: jnp.sum(jnp.sin(3 * net(params, x)))  # noqa: E731
        slope = jax.grad(bent, (0, 1))
        along = jax.jvp(lambda x: slope(params, x), (x,), (jnp.cos(x),))[1]
        again = jax.grad(lambda params, x: sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(slope(params, x))), (0, 1))
        return bent(params, x), slope(params, x), along, again(params, x)

    ours, wanted = (jax.jit(derivatives, static_argnums=0)(net) for net in (NET, unrolled))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), ours, wanted)
    assert dp.check_gradients(NET, params, x).worst.error < 1e-7


def test_what_does_not_converge_is_nan_and_so_are_its_derivatives():
    nets = {
        "moves on forever": dp.fixed_point(lambda pair: pair[0] + 1 + 0 * pair[1]),
        "overflows": dp.fixed_point(lambda pair: jnp.exp(99 * (1 + pair[0])) + pair[1]),
        "has too few steps": dp.fixed_point(lambda pair: jnp.cos(pair[0] + pair[1]), steps=3),
    }
    for what, net in nets.items():
        y, slope = jax.jit(jax.value_and_grad(lambda x, net=net: net({}, x).sum()))(X)
        assert np.isnan(y) and np.isnan(slope).all(), what
    y = dp.fixed_point(lambda pair: jnp.cos(pair[0]) + 0 * pair[1])({}, X)
    np.testing.assert_allclose(y, 0.7390851, atol=1e-5)


def test_only_the_derivative_is_nan_where_only_it_does_not_converge():
    """x = 0 is at rest at once; what pulls it back has four eigenvalues, and four steps."""
    net = dp.fixed_point(lambda pair: jnp.tanh(jnp.array([3, -3, 5, 7]) * pair[0] + pair[1]),
                         steps=4)
    y, slope = jax.value_and_grad(lambda x: net({}, x).sum())(0 * X)
    assert y == 0 and np.isnan(slope).all()


def test_nan_in_the_input_stays_where_it_is():
    params = params_of(NET)
    y = jax.jit(NET)(params, X.at[0].set(jnp.nan))
    assert np.isnan(y[0]).all()
    close(y[1:], NET(params, X)[1:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_it_is_solved_as_far_as_the_dtype_can_tell(dtype):
    params = params_of(NET)
    y, slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(NET(params, x))))(X.astype(dtype))
    wanted, exact = jax.jit(jax.value_and_grad(lambda x: jnp.sum(unrolled(params, x))))(X)
    share = 2 * float(jnp.finfo(dtype).eps) ** 0.75
    np.testing.assert_allclose(y, wanted, atol=12 * share)
    np.testing.assert_allclose(slope.astype(float), exact, atol=4 * share)


def test_a_tolerance_is_for_what_computes_more_coarsely_than_x():
    rough = dp.mixed(F, jnp.bfloat16)
    params = params_of(NET)
    close_enough = jax.jit(dp.fixed_point(rough, tolerance=0.02))(params, X)
    np.testing.assert_allclose(close_enough, NET(params, X), atol=0.1)


def test_one_key_is_that_of_all_applications():
    drop = dp.dropout(0.5)
    noisy = dp.parallel(dp.linear(4, kernel_init=SMALL) >> drop, dp.linear(4)) >> dp.add >> jnp.tanh
    net, x = dp.fixed_point(noisy), X
    params = params_of(net)
    run = jax.jit(functools.partial(net.apply, train=True))
    z = run(params, {}, x, key=KEY)[0]
    close(noisy.apply(params, {}, (z, x), key=KEY, train=True)[0], z)
    assert abs(run(params, {}, x, key=jax.random.key(1))[0] - z).max() > 1e-3


def test_a_tree_of_states_is_solved_together():
    def step(layers, pair):
        (a, b), (x, y) = pair
        return jnp.tanh(layers.down(b) + x), jnp.tanh(layers.up(a).mean(0) + y)

    f = dp.program(up=dp.linear(2, kernel_init=SMALL), down=dp.linear(4, kernel_init=SMALL))(step)
    net, x = dp.fixed_point(f), (X, jnp.ones(2))
    params = params_of(net, x)
    z = jax.jit(net)(params, x)
    close(f(params, (z, x)), z)


def test_it_keeps_the_trees_the_activations_and_the_stream_of_its_layer():
    assert names(NET) == names(F)
    same(NET.init(KEY, X), F.init(KEY, (X, X)))
    params = params_of(NET)
    y, seen = dp.tap(NET, "parallel_0/linear_0")(params, X)
    close((y, seen["parallel_0/linear_0"]),
          (NET(params, X), dp.linear(4)(params["parallel_0"]["linear_0"], y)))
    assert NET.start is None  # of a position-wise layer; what mixes time goes on from its past
    kind = dp.conv(4, 2, dims=1, padding="CAUSAL")
    assert dp.fixed_point(dp.parallel(kind, identity) >> dp.add).start is not None


def test_memory_does_not_grow_with_the_number_of_applications():
    params = params_of(NET)
    sizes = []
    for steps in (20, 200):
        net = dp.fixed_point(F, steps=steps)
        _, pull = jax.vjp(lambda p, net=net: net(p, X), params)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
    assert sizes[0] == sizes[1] < 40 * X.size


def test_it_is_differentiated_under_remat_repeat_and_vmap():
    plain = dp.repeat(2, NET)
    params = params_of(plain)
    close(gradient(dp.remat(plain), params), gradient(plain, params))
    one = jax.vmap(lambda x: NET(params_of(NET), x))
    close(jax.jit(one)(X), NET(params_of(NET), X))
