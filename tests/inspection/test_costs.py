"""What a net costs: FLOPs by hand and by XLA, subtotals by kind."""

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp
from diffprog.inspection.costs import flops


def shape(*sides, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sides, dtype)


def cost(net, x, **side):
    return dp.summary(net, x, **side).flops


def test_a_multiplication_with_an_addition_counts_as_two_operations():
    assert cost(dp.linear(5, bias=False), shape(3, 4)) == 2 * 3 * 4 * 5
    assert cost(dp.linear(5), shape(3, 4)) - cost(dp.linear(5, bias=False), shape(3, 4)) == 15


def test_it_is_what_xla_says_of_a_net_without_loops():
    net = dp.serial(dp.conv(4, 3), jax.nn.relu, dp.max_pool(2), dp.flatten(), dp.linear(3))
    x = shape(2, 6, 6, 1)
    plan = net.plan(x)
    whole = jax.jit(lambda p, x: net(p, x)).lower(plan.params, x).cost_analysis()["flops"]
    assert cost(net, x) == whole


@pytest.mark.parametrize("unroll", [0, 1, 2, 3, 5, 7])
def test_the_body_of_a_scan_counts_as_often_as_it_runs(unroll):
    def body(x, _):
        return jnp.tanh(x @ x), None

    def f(x):
        return jax.lax.scan(body, x, None, length=5, unroll=unroll)[0]

    def loop(x):
        for _ in range(5):
            x, _ = body(x, None)
        return x

    x = shape(8, 8)
    counting = 2 if 0 < unroll < 5 else 0  # the loop's own counter, once
    assert flops(f, x) == flops(loop, x) + counting


def test_scans_in_scans_and_in_functions():
    def inner(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)[0]

    def outer(x):
        return jax.lax.scan(lambda x, _: (jax.jit(inner)(x), None), x, None, length=4)[0]

    product = flops(lambda x: x @ x, shape(8, 8))
    assert 12 * product <= flops(jax.checkpoint(outer), shape(8, 8)) <= 12 * product + 20


def times(n):
    """A function of `n` products in a loop."""
    return lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=n)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("here", "elsewhere"), [(1, 5), (5, 1), (2, 3)])
def test_of_branches_by_platform_the_one_of_this_backend_counts(here, elsewhere):
    def f(x):
        backend = {jax.default_backend().replace("gpu", "cuda"): times(here)}
        return jax.lax.platform_dependent(x, **backend, default=times(elsewhere))

    def other(x):
        return jax.lax.platform_dependent(x, tpu=times(elsewhere), default=times(here))

    x = shape(8, 8)
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        assert flops(wrap(f), x) == flops(wrap(other), x) == flops(times(here), x)
    slope = lambda f: jax.grad(lambda x: f(x).sum())  # noqa: E731
    assert flops(slope(f), x) == flops(slope(times(here)), x)


def test_of_branches_by_value_the_dearest_counts():
    x, product = shape(8, 8), 2 * 8**3
    f = lambda x: jax.lax.cond(x[0, 0] > 0, times(5), lambda x: x @ x @ x @ x @ x, x)  # noqa: E731
    assert 5 * product <= flops(f, x) <= 5 * product + 10


@pytest.mark.slow
@pytest.mark.parametrize("block", [
    dp.residual(dp.serial(dp.linear(4), jnp.sin)),
    dp.residual(dp.serial(dp.conv(4, 3, dims=1), jnp.sin)),  # unrolled on CPU
    dp.linear(4),
], ids=["dense", "convolution", "leaf"])
def test_repeat_costs_its_copies(block):
    x = shape(2, 5, 4)
    one = cost(block, x)
    assert one > 0
    for n in (2, 3):
        assert cost(dp.repeat(n, block), x) == n * one
        assert cost(dp.ensemble(n, block), x) == n * one
        assert cost(dp.repeat(2, dp.heads(1, dp.repeat(n, block))), x) == 2 * n * one
    assert cost(dp.remat(block), x) == one
    kernels = dp.tree.select(block.plan(x).params, "**/kernel")
    casts = dp.tree.count(kernels) + 2 * 5 * 4  # a bias is cast where it is added to each entry
    assert cost(dp.mixed(block, jnp.bfloat16), x) == one + casts


def test_a_program_costs_what_it_computes_itself_and_its_children():
    @dp.program(f=dp.linear(4))
    def net(layers, x):
        return layers.f(x) * 2 + x @ x.T @ x

    seen = dp.summary(net, shape(3, 4))
    own = flops(lambda y, x: y * 2 + x @ x.T @ x, shape(3, 4), shape(3, 4))
    assert seen.flops == seen.rows[0].flops == own + seen.rows[1].flops
    assert seen.kinds["net"].flops == own


def test_what_a_program_makes_for_a_child_alone_is_counted():
    @dp.program(f=dp.linear(4), g=dp.linear(4))
    def net(layers, x):
        return layers.g(layers.f(x @ x.T @ x * 3) * 2)

    products = 2 * 3 * 4 * 3 + 2 * 3 * 3 * 4
    assert dp.summary(net, shape(3, 4)).kinds["net"].flops == products + 12 + 12


# Of a linear layer (12, 8) -> (12, 8): products and the sums with the bias.
LINEAR, KERNEL = 2 * 12 * 8 * 8 + 12 * 8, 8 * 8


def lengths(rows, columns=1):
    """Of each entry the size, the quotient by the largest and its square; of each column the
    largest and the sum, a product, and thrice whether it is zero and what then, of a constant."""
    return 3 * rows * columns + 2 * (rows - 1) * columns + 7 * columns + 3


@pytest.mark.slow
@pytest.mark.parametrize(("net", "more"), [
    (dp.lora(dp.linear(8), 4), 2 * 8 * 4 * 8 + KERNEL),  # down @ up, the sum with the base
    (dp.lora(dp.linear(8), 2), 2 * 8 * 2 * 8 + KERNEL),
    # Lengths of columns, quotients by them, products with the kernel.
    (dp.weight_norm(dp.linear(8)), lengths(8, 8) + 8 + KERNEL),
    # kernel @ vector, its length, whether that is zero and what then, quotients.
    (dp.spectral_norm(dp.linear(8)), 2 * KERNEL + lengths(8) + 3 + KERNEL),
    # The product at the difference, that of the bias, the difference itself, the sum with it.
    (dp.linearize(dp.linear(8)), 2 * 12 * 8 * 8 + 12 * 8 + KERNEL + 8 + 12 * 8),
    (dp.reparam(dp.linear(8), lambda key, w: w, lambda w: 2 * w), KERNEL),
    (dp.ema(dp.linear(8)), 0), (dp.freeze(dp.linear(8)), 0), (dp.remat(dp.linear(8)), 0),
], ids=lambda given: repr(given).split("(")[0])
def test_wrappers_that_compute_something_count_it(net, more):
    x = shape(12, 8)
    assert cost(net, x) == LINEAR + more
    for n in (1, 3):
        assert cost(dp.ensemble(n, net), x) == n * (LINEAR + more)
        assert cost(dp.repeat(n, dp.remat(net)), x) == n * (LINEAR + more)
    assert cost(dp.serial(net), x) == cost(dp.remat(net), x) == LINEAR + more


@pytest.mark.slow
def test_kernels_of_copies_are_computed_for_each():
    x, one = shape(12, 8), LINEAR + 2 * 8 * 4 * 8 + KERNEL
    assert cost(dp.lora(dp.repeat(3, dp.linear(8)), 4), x) == 3 * one
    assert cost(dp.lora(dp.serial(dp.linear(8), dp.heads(2, dp.linear(8))), 4), x) == 3 * one
    double = dp.weight_norm(dp.spectral_norm(dp.linear(8)))
    alone = [cost(wrap(dp.linear(8)), x) - LINEAR for wrap in (dp.weight_norm, dp.spectral_norm)]
    assert cost(double, x) == LINEAR + sum(alone)


def test_quantized_kernels_are_rounded_in_each_call():
    net = dp.quantize(dp.linear(8))
    params = net.plan(shape(12, 8)).params
    assert cost(net, shape(12, 8)) == LINEAR + flops(
        lambda params: dp.tree.merge(net, params), params) == 2097


@pytest.mark.slow
def test_one_application_of_a_fixed_point_counts_for_all_examples():
    net = dp.fixed_point(dp.add >> dp.linear(8) >> jnp.tanh >> dp.linear(8))
    assert cost(net, shape(1, 8)) == 8 + 2 * (2 * 8 * 8 + 8) == 280
    assert cost(net, shape(64, 8)) == 64 * 280
    f = dp.parallel(dp.linear(4), dp.linear(4)) >> dp.add >> jnp.tanh
    assert cost(dp.fixed_point(f), shape(2, 4)) == 2 * (2 * (2 * 4 * 4 + 4) + 4)
    assert cost(dp.repeat(3, dp.fixed_point(dp.remat(f))), shape(2, 4)) == 3 * 152
    # A cell that carries something, and hands x on as it is.
    passing = dp.Layer(lambda key, x: ({}, {}), lambda params, state, x, **_: (x, state),
                       lambda params, state, x, *, length: {"none": jnp.zeros(x.shape[:1])})
    recurrent = dp.recurrent(dp.fixed_point(f) >> passing)
    assert cost(recurrent, shape(2, 5, 4)) == 5 * 152


def test_subtotals_by_kind_add_up():
    net = dp.serial(dp.conv(4, 3), dp.batch_norm(), jax.nn.relu, dp.repeat(3, dp.residual(
        dp.conv(4, 3) >> dp.batch_norm() >> jax.nn.relu)), dp.flatten(), dp.linear(3))
    seen = dp.summary(net, shape(2, 6, 6, 1))
    assert sum(kind.flops for kind in seen.kinds.values()) == seen.flops
    assert sum(kind.parameters for kind in seen.kinds.values()) == seen.parameters
    assert seen.kinds["conv"].calls == seen.kinds["batch_norm"].calls == 2
    assert seen.kinds["conv"].parameters == 9 * 4 + 4 + 3 * (9 * 16 + 4)
    assert seen.kinds["residual"].flops == 3 * 2 * 6 * 6 * 4  # its sums
    assert "flatten" not in seen.kinds


@pytest.mark.slow
def test_resnet_50_costs_what_is_published():
    """4.09 billion multiply-adds, as torchvision says of its ResNet-50; XLA leaves out those with
    padding, and so does the count by hand."""
    copies = {"stage_1/rest": 2, "stage_2/rest": 3, "stage_3/rest": 5, "stage_4/rest": 2}
    seen = dp.summary(dp.models.resnet(50), shape(1, 224, 224, 3))
    whole = real = 0
    for row in seen.rows:
        if row.layer.name == "conv":
            size, stride, pad = (row.layer.settings[n] for n in ("size", "stride", "padding"))
            (_, side, _, inputs), (_, after, _, features) = row.input.shape, row.output.shape
            inside = sum(0 <= p * stride + q - pad < side
                         for p in range(after) for q in range(size))
            times = copies.get("/".join(row.path.split("/")[:2]), 1) * inputs * features
            real += times * inside**2
            whole += times * (after * size) ** 2
    assert seen.kinds["conv"].flops == 2 * real
    assert round((whole + 2048 * 1000) / 1e9, 2) == 4.09


def test_nothing_is_compiled(monkeypatch):
    from jax._src import compiler

    def refuse(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(compiler, "backend_compile_and_load", refuse)
    with pytest.raises(AssertionError, match="compiled"):
        jax.jit(lambda x: x * 3)(jnp.ones(3)).block_until_ready()
    seen = dp.summary(dp.repeat(2, dp.linear(4) >> jnp.tanh), shape(2, 4))
    assert seen.flops > 0
