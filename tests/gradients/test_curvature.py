"""Second-order products against the explicit matrices of a small net, in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.inspection.costs import flops

KEY = jax.random.key(0)
NET = dp.serial(dp.repeat(2, dp.residual(dp.linear(2) >> jnp.tanh)), head=dp.linear(3))
LABELS = jnp.array([[0, 2, 1], [1, 1, 0]])
MASK = jnp.array([[True, False, True], [True, True, False]])


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@functools.cache
def small(net=NET):
    """Parameters, and the outputs on six inputs as a function of them."""
    x = jax.random.normal(jax.random.key(1), (2, 3, 2), jnp.float64)
    params, state = jax.jit(net.init)(KEY, x)
    params = jax.tree.map(lambda p: p + np.sin(np.arange(p.size)).reshape(p.shape) / 4, params)
    return params, lambda params: net(params, x, state=state)


def matrix(product, params):
    """The matrix of a linear function of trees, column by column."""
    flat, tree = ravel_pytree(params)
    return jax.vmap(lambda e: ravel_pytree(product(tree(e)))[0], out_axes=1)(jnp.eye(flat.size))


def flattened(f, params):
    """A function of the flattened parameters, and those."""
    flat, tree = ravel_pytree(params)
    return lambda flat: ravel_pytree(f(tree(flat)))[0], flat


def equal(one, other):
    assert one.shape == other.shape
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * max(1, np.abs(other).max()))


def test_the_hessian_product_equals_jax_hessian():
    params, forward = small()
    loss = lambda params: dp.losses.cross_entropy(forward(params), LABELS)  # noqa: E731

    @jax.jit
    def both(params):
        flat_loss, flat = flattened(loss, params)
        found = matrix(functools.partial(dp.gradients.hessian_product, loss, params), params)
        return found, jax.hessian(flat_loss)(flat)[0]

    found, wanted = both(params)
    equal(found, wanted)
    equal(found, found.T)
    assert np.linalg.eigvalsh(found)[0] < -1e-3  # a net is not convex


@pytest.mark.slow
def test_the_hessian_of_an_objective_in_training():
    """The statistics of the batch depend on the parameters too."""
    net = dp.serial(dp.linear(2), dp.batch_norm(), jnp.tanh, dp.linear(3))
    x = jax.random.normal(KEY, (6, 2), jnp.float64)
    params, state = jax.jit(net.init)(KEY, x)

    def loss(params):
        return dp.classification()(net, params, state, (x, LABELS.ravel()), key=None, train=True)[0]

    @jax.jit
    def both(params, vector):
        flat_loss, flat = flattened(loss, params)
        step = 1e-5 * ravel_pytree(vector)[0]
        gradient = jax.grad(lambda flat: flat_loss(flat)[0])
        change = (gradient(flat + step) - gradient(flat - step)) / 2e-5
        found = dp.gradients.hessian_product(loss, params, vector)
        return ravel_pytree(found)[0], change

    found, change = both(params, jax.tree.map(np.cos, params))
    np.testing.assert_allclose(found, change, rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("convex", [True, False])
def test_gauss_newton_is_the_product_of_three_matrices(convex):
    params, forward = small()

    def loss(y):
        return dp.losses.cross_entropy(y, LABELS) if convex else jnp.sum(jnp.sin(y) ** 2)

    @jax.jit
    def all_three(params):
        flat_forward, flat = flattened(forward, params)
        outputs = forward(params)
        curved = jax.hessian(lambda y: loss(y.reshape(outputs.shape)))(outputs.ravel())
        found = matrix(functools.partial(dp.gradients.gauss_newton_product, forward, loss, params),
            params)
        return found, jax.jacobian(flat_forward)(flat), curved

    found, jacobian, curved = map(np.asarray, all_three(params))
    equal(found, jacobian.T @ curved @ jacobian)
    equal(found, found.T)
    values = np.linalg.eigvalsh(found)
    assert (values[0] > -1e-12) == convex
    if convex:  # six entries, with two free logits each
        assert values[-1] > 0.1 and (values > 1e-9).sum() <= 12 < values.size


@pytest.mark.slow
def test_gauss_newton_of_a_linear_net_is_the_hessian():
    params, forward = small(dp.linear(3))
    loss = lambda y: dp.losses.cross_entropy(y, LABELS)  # noqa: E731
    found, wanted = jax.jit(lambda params, v: (
        dp.gradients.gauss_newton_product(forward, loss, params, v),
        dp.gradients.hessian_product(lambda p: loss(forward(p)), params, v)))(
            params, jax.tree.map(np.cos, params))
    equal(ravel_pytree(found)[0], ravel_pytree(wanted)[0])


@pytest.mark.slow
def test_outputs_may_be_a_tree_and_leaves_without_effect():
    params = {"a": jnp.array([1.0, 2.0]), "idle": jnp.ones(2)}
    forward = lambda p: {"sin": jnp.sin(p["a"]), "sum": p["a"].sum()}  # noqa: E731
    loss = lambda y: jnp.sum(y["sin"] ** 2) + y["sum"] ** 2  # noqa: E731
    found = dp.gradients.gauss_newton_product(forward, loss, params,
        jax.tree.map(jnp.ones_like, params))
    equal(found["a"], 2 * jnp.cos(params["a"]) ** 2 + 4)
    equal(found["idle"], jnp.zeros(2))


# For each distribution: outcomes, their probabilities, log-density, and our loss.
TARGETS = {
    "categorical": (
        range(3), lambda f, y: jax.nn.softmax(f)[y], lambda f, y: jax.nn.log_softmax(f)[y],
        lambda f, mask: dp.losses.cross_entropy(f, LABELS, mask=mask)),
    "bernoulli": (
        (1, -1), lambda f, y: jax.nn.sigmoid(y * f), lambda f, y: jax.nn.log_sigmoid(y * f),
        lambda f, mask: dp.losses.binary_cross_entropy(f, (f > 0) * 1.0, mask=mask)),
    # Two points have the mean and the variance of a normal, and the gradient needs no more.
    "gaussian": (
        (1, -1), lambda f, y: 0.5 + 0 * f,
        lambda f, y: -(jax.lax.stop_gradient(f) + y - f) ** 2 / 2,
        lambda f, mask: dp.losses.squared_error(f, jnp.ones(f.shape), mask=mask) / 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("distribution", TARGETS)
def test_fisher_is_the_expected_square_of_the_gradient_and_gauss_newton_of_the_loss(distribution):
    params, forward = small()
    targets, probability, log_density, loss = TARGETS[distribution]

    def entries(params):
        valid = forward(params)[np.nonzero(MASK)]
        return valid if distribution == "categorical" else valid.ravel()

    @jax.jit
    def all_three(params):
        flat, tree = ravel_pytree(params)
        expected = 0.0
        for y in targets:
            weights = jax.vmap(lambda f, y=y: probability(f, y))(entries(params))
            scores = jax.jacobian(lambda flat, y=y: jax.vmap(
                lambda f: log_density(f, y))(entries(tree(flat))))(flat)
            expected += jnp.einsum("e,ei,ej->ij", weights, scores, scores) / len(weights)
        vector = jax.tree.map(jnp.cos, params)

        def whole_and_masked(product):
            return product(vector, None), matrix(lambda v: product(v, MASK), params)

        found = whole_and_masked(lambda v, mask: dp.gradients.fisher_product(
            forward, params, v, distribution=distribution, mask=mask))
        wanted = whole_and_masked(lambda v, mask: dp.gradients.gauss_newton_product(
            forward, lambda f: loss(f, mask), params, v))
        return found, wanted, expected

    (whole, masked), (wanted_whole, wanted_masked), expected = all_three(params)
    equal(masked, expected)
    equal(masked, wanted_masked)
    equal(ravel_pytree(whole)[0], ravel_pytree(wanted_whole)[0])


@pytest.mark.slow
@pytest.mark.parametrize("distribution", TARGETS)
def test_masked_entries_do_not_reach_a_product(distribution):
    params, forward = small()
    vector = jax.tree.map(np.cos, params)
    shown = MASK[..., None]

    def product(filler):
        return dp.gradients.fisher_product(
            lambda p: forward(p) + jnp.where(shown, 0, filler), params, vector,
            distribution=distribution, mask=MASK)

    wanted, found = ravel_pytree(product(0.0))[0], ravel_pytree(product(jnp.nan))[0]
    chex.assert_tree_all_finite(found)
    equal(found, wanted)
    loss = lambda p: dp.losses.cross_entropy(  # noqa: E731
        jnp.where(shown, forward(p), jnp.nan), LABELS, mask=MASK)
    chex.assert_tree_all_finite(dp.gradients.hessian_product(loss, params, vector))


@pytest.mark.slow
def test_conjugate_gradients_take_a_product():
    params, forward = small()

    def product(v):
        curved = dp.gradients.fisher_product(forward, params, v, distribution="categorical")
        return jax.tree.map(lambda c, v: c + 0.1 * v, curved, v)

    gradient = jax.tree.map(np.cos, params)
    step = jax.jit(lambda b: jax.scipy.sparse.linalg.cg(product, b, tol=1e-12)[0])(gradient)
    back = jax.jit(product)(step)
    np.testing.assert_allclose(
        ravel_pytree(back)[0], ravel_pytree(gradient)[0], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_cost_of_products():
    """In multiples of the gradient; the operations are mostly those of the kernels."""
    net, x = dp.serial(*[dp.linear(64), jnp.tanh] * 8, dp.linear(4)), jnp.ones((16, 64))
    params = jax.eval_shape(lambda: net.init(KEY, x)[0])
    loss = lambda y: dp.losses.cross_entropy(y, jnp.zeros(16, int))  # noqa: E731
    gradient = flops(jax.grad(lambda p: loss(net(p, x))), params)
    evaluation = flops(lambda p: net(p, x), params)
    hessian = flops(lambda p, v: dp.gradients.hessian_product(
        lambda p: loss(net(p, x)), p, v), params, params)
    gauss_newton = flops(lambda p, v: dp.gradients.gauss_newton_product(
        lambda p: net(p, x), loss, p, v), params, params)
    assert 2.8 < gradient / evaluation < 3
    assert 2.4 < hessian / gradient < 3
    assert 1.6 < gauss_newton / gradient < 1.7
