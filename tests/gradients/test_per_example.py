"""Per-example gradients, norms and kernels against one example at a time and explicit Jacobians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog.inspection.costs import flops

KEY = jax.random.key(0)
OBJECTIVE = dp.classification()
NET = dp.residual(dp.linear(4) >> jnp.tanh) >> dp.linear(3)
NOISY = dp.serial(dp.linear(16), dp.dropout(0.5), dp.linear(3))  # of 2**16 masks no two are alike
NORMED = dp.serial(dp.linear(4), dp.batch_norm(), jnp.tanh, dp.linear(3))
X = jax.random.normal(jax.random.key(1), (5, 4))
Y = jnp.array([0, 2, 1, 2, 0])


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def one_by_one(net, params, state, batch, keys=None, train=False):
    """The gradient of the objective on each example alone, and on the batch."""
    def gradient(batch, key):
        return jax.grad(lambda p: OBJECTIVE(net, p, state, batch, key=key, train=train)[0])(params)

    ones = jax.tree.map(lambda a: a[:, None], batch)
    alone = jax.lax.map(lambda one: gradient(*one), (ones, keys))
    return alone, gradient(batch, None if keys is None else keys[0])


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def together(net, params, state, batch, **options):
    return dp.gradients.per_example_gradients(net, OBJECTIVE, params, state, batch, **options)


def close(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for path, leaf in dp.tree.paths(other).items():
        np.testing.assert_allclose(dp.tree.paths(one)[path], leaf, rtol=0, atol=1e-6)


@pytest.mark.parametrize("net", [NET, NORMED], ids=["without state", "with statistics"])
def test_gradients_are_those_of_one_example_at_a_time(net):
    params, state = jax.jit(net.init)(KEY, X)
    state = jax.tree.map(lambda s: s + 0.5, state)
    alone, whole = one_by_one(net, params, state, (X, Y))
    gradients = together(net, params, state, (X, Y))
    close(gradients, alone)
    close(jax.tree.map(lambda g: g.mean(0), gradients), whole)


@pytest.mark.slow
def test_masked_examples_count_with_their_valid_entries():
    mask = jnp.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]], bool)
    batch = {"x": jnp.stack([X, X**2, -X], 1), "y": jnp.arange(15).reshape(5, 3) % 3, "mask": mask}
    params, _ = jax.jit(NET.init)(KEY, batch["x"])
    alone, whole = one_by_one(NET, params, {}, batch)
    gradients = together(NET, params, {}, batch)
    close(gradients, alone)
    assert not any(leaf[1].any() for leaf in jax.tree.leaves(gradients))
    weights = np.asarray(mask.sum(1) / mask.sum())
    close(jax.tree.map(lambda g: np.tensordot(weights, g, 1), gradients), whole)


@pytest.mark.slow
def test_every_example_has_its_own_key():
    batch = (jnp.repeat(X[:1], 5, 0), jnp.zeros(5, int))
    params, _ = jax.jit(NOISY.init)(KEY, X)
    alone, _ = one_by_one(NOISY, params, {}, batch, jax.random.split(KEY, 5), train=True)
    gradients = together(NOISY, params, {}, batch, key=KEY, train=True)
    close(gradients, alone)
    rows = np.asarray(gradients["linear_1"]["kernel"]).reshape(5, -1)
    assert len(np.unique(rows, axis=0)) == 5
    with pytest.raises(dp.LayerError, match="a key when train=True"):
        dp.gradients.per_example_gradients(NOISY, OBJECTIVE, params, {}, batch, train=True)


def test_statistics_of_a_batch_are_refused_in_training():
    params, state = jax.jit(NORMED.init)(KEY, X)
    for f in (dp.gradients.per_example_gradients, dp.gradients.per_example_gradient_norms):
        with pytest.raises(dp.LayerError, match="train=False for a net with batch statistics, got "
                           "train=True and batch_norm_0/mean, batch_norm_0/var"):
            f(NORMED, OBJECTIVE, params, state, (X, Y), train=True)


@pytest.mark.slow
def test_norms_are_those_of_the_gradients():
    params, _ = jax.jit(NOISY.init)(KEY, X)
    options = {"key": KEY, "train": True}
    gradients = together(NOISY, params, {}, (X, Y), **options)
    squares = sum((np.asarray(g) ** 2).reshape(5, -1).sum(1) for g in jax.tree.leaves(gradients))
    norms = jax.jit(lambda params: [dp.gradients.per_example_gradient_norms(
        NOISY, OBJECTIVE, params, {}, (X, Y), batch_size=batch_size, **options)
        for batch_size in (None, 2)])(params)
    for found in norms:
        assert found.shape == (5,)
        np.testing.assert_allclose(found, np.sqrt(squares), rtol=1e-5)


def memory(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_the_memory_of_norms_scales_with_the_batch_size():
    net, x, y = dp.linear(128), jnp.ones((32, 4, 64)), jnp.zeros((32, 4), int)
    params, _ = net.init(KEY, x)
    every, few = (
        memory(lambda params, batch_size=batch_size: dp.gradients.per_example_gradient_norms(
        net, OBJECTIVE, params, {}, (x, y), batch_size=batch_size), params)
        for batch_size in (None, 4))
    one = 4 * dp.tree.count(params)  # a gradient; XLA may hold the squares of all beside them
    assert 32 * one < every < 2 * 40 * one
    assert 7 < every / few < 9


# The tangent kernel.


def pixels(params, x):
    """Outputs with two axes; inputs are a tree."""
    y = jnp.tanh(x["a"] @ params["kernel"])
    return y[:, None] * x["b"][:, :, None]


def number(params, x):
    return jnp.sin(x @ params["kernel"]).sum(-1)


def drawn(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def with_state():
    x = drawn(3, 4)
    params, state = jax.jit(NORMED.init)(KEY, x)
    return functools.partial(NORMED, state=state), params, x, drawn(4, 4, seed=2)


def of_images():
    net, x = dp.conv(2, 3) >> jnp.tanh >> dp.flatten() >> dp.linear(2), drawn(3, 2, 2, 1)
    return net, jax.jit(net.init)(KEY, x)[0], x, drawn(2, 2, 2, 1, seed=2)


def with_two_axes():
    one, other = ({"a": drawn(n, 4, seed=n), "b": drawn(n, 3, seed=2 * n)} for n in (3, 2))
    return pixels, {"kernel": drawn(4, 2)}, one, other


def with_none():
    return number, {"kernel": drawn(4, 2)}, drawn(3, 4), drawn(2, 4, seed=2)


def jacobian(f, params, x):
    """(examples, outputs, parameters)"""
    rows = jax.tree.leaves(jax.jit(jax.jacobian(f))(params, x))
    n, size = len(jax.tree.leaves(x)[0]), jax.eval_shape(f, params, x).size
    return np.concatenate([np.asarray(leaf).reshape(n, size // n, -1) for leaf in rows], -1)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "batch_size"), [
    (with_state, 3), (of_images, 1), (with_two_axes, 2), (with_none, 1)])
def test_the_kernel_is_the_product_of_two_jacobians(case, batch_size):
    with jax.enable_x64(True):
        f, params, x1, x2 = case()
        found = jax.jit(functools.partial(
            dp.gradients.tangent_kernel, f, batch_size=batch_size))(params, x1, x2)
        one, other = jacobian(f, params, x1), jacobian(f, params, x2)
        wanted = np.einsum("iap,jbp->ijab", one, other)
        outputs = jax.eval_shape(f, params, x1).shape[1:]
        assert found.shape == (*wanted.shape[:2], *outputs, *outputs)
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=0, atol=1e-12)


def test_the_kernel_of_one_set_is_positive_semi_definite():
    params, _ = jax.jit(NET.init)(KEY, X)
    kernel = np.asarray(jax.jit(functools.partial(dp.gradients.tangent_kernel, NET))(params, X))
    np.testing.assert_allclose(kernel, kernel.transpose(1, 0, 3, 2), atol=1e-5)
    values = np.linalg.eigvalsh(kernel.swapaxes(1, 2).reshape(15, 15))
    assert -1e-4 < values[0] and values[-1] > 1


@pytest.mark.slow
def test_the_kernel_stores_no_jacobian():
    net, x = dp.serial(dp.linear(128), jnp.tanh, dp.linear(4)), jnp.ones((64, 64))
    params, _ = net.init(KEY, x)
    used = memory(lambda params: dp.gradients.tangent_kernel(net, params, x), params)
    one_gradient = 4 * dp.tree.count(params)
    assert used < 16 * one_gradient  # a Jacobian is 256


@pytest.mark.slow
def test_the_cost_of_the_kernel():
    """Per output of x2 one gradient, and one directional derivative (two evaluations) on all x1."""
    net, n1, n2 = dp.serial(*[dp.linear(32), jnp.tanh] * 4, dp.linear(4)), 8, 5
    x1, x2 = jnp.ones((n1, 32)), jnp.ones((n2, 32))
    params = jax.eval_shape(lambda: net.init(KEY, x1)[0])
    evaluation = flops(net, params, x1[:1])
    found = flops(functools.partial(dp.gradients.tangent_kernel, net), params, x1, x2)
    assert found < 4 * n2 * (3 + 2 * n1) * evaluation
    assert found > 0.7 * 4 * n2 * (2 + 2 * n1) * evaluation
