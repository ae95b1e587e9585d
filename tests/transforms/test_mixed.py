"""`mixed`: what is computed narrow, what stays wide, and that it nests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import KEY, X, gradient, params_of, same, spy

import diffprog as dp

BF16 = jnp.bfloat16
BODY = dp.residual(dp.serial(dp.linear(6), jnp.tanh, dp.linear(4)))


def rounded(tree):
    return jax.tree.map(lambda a: a.astype(BF16), tree)


def test_it_computes_as_the_layer_does_on_rounded_numbers():
    net = dp.mixed(BODY, BF16)
    params = params_of(net)
    same(params, params_of(BODY))
    wanted = BODY(rounded(params), X.astype(BF16))
    same(net(params, X), wanted.astype(jnp.float32))
    # Layers are handed float32 and cast it themselves, so that gradients are summed in float32.
    same(gradient(net, params), gradient(
        lambda p, x: BODY(p, x.astype(BF16)).astype(jnp.float32), params))


def test_everything_inside_is_narrow():
    seen = []
    net = dp.mixed(dp.serial(dp.linear(3), spy(seen)), BF16)
    params = params_of(net)  # which plans in the dtype of x: so are parameters stored
    seen.clear()
    y = net(params, X)
    assert {x.dtype for x in seen} == {jnp.dtype(BF16)} and y.dtype == jnp.float32
    text = str(jax.make_jaxpr(net)(params_of(net), X))
    assert "dot_general" in text and "bf16[3,3] = dot_general" in text


def test_gradients_arrive_in_the_dtype_of_the_parameters():
    net = dp.mixed(BODY, BF16)
    grads = gradient(net, params_of(net))
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_small_updates_are_not_lost():
    """bfloat16 parameters would not move by a 1000th of their size; stored in float32 they do."""
    net = dp.mixed(dp.linear(1, bias=False, kernel_init="ones"), BF16)
    params = params_of(net)
    moved = optax.apply_updates(params, jax.tree.map(lambda a: 1e-3 * jnp.ones_like(a), params))
    assert np.all(np.asarray(moved["kernel"]) > 1.0009)


def test_statistics_keep_their_dtype():
    net = dp.mixed(dp.linear(4) >> dp.batch_norm(), BF16)
    params, state = net.init(KEY, X)
    _, after = net.apply(params, state, X, train=True)
    assert {a.dtype for a in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
    # The mean moves by less than bfloat16 could tell, so it was not rounded on the way.
    plain = (dp.linear(4) >> dp.batch_norm()).apply(rounded(params), state, X.astype(BF16),
                                                    train=True)
    same(after, plain[1])


def test_caches_are_made_narrow_and_statistics_kept():
    net = dp.mixed(dp.serial(dp.batch_norm(), dp.conv(3, 2, dims=1, padding="CAUSAL")), BF16)
    x = jax.random.normal(KEY, (2, 4, 3))
    params, state = net.init(KEY, x)
    state = net.start(params, state, x[:, :1], length=4)
    dtypes = {path: leaf.dtype for path, leaf in dp.tree.paths(state).items()}
    assert dtypes == {"batch_norm_0/mean": jnp.float32, "batch_norm_0/var": jnp.float32,
                      "conv_0/past": BF16}
    _, after = net.apply(params, state, x[:, :1])
    assert {path: leaf.dtype for path, leaf in dp.tree.paths(after).items()} == dtypes


def test_it_nests_with_repeat_in_any_order():
    plain = dp.repeat(3, BODY)
    inside, outside = dp.repeat(3, dp.mixed(BODY, BF16)), dp.mixed(plain, BF16)
    params = params_of(plain)
    same(params_of(inside), params)
    same(params_of(outside), params)
    unrolled = X
    for i in range(3):
        own = rounded(jax.tree.map(lambda a, i=i: a[i], params))
        unrolled = BODY(own, unrolled.astype(BF16)).astype(jnp.float32)
    # XLA rounds between operations or not, as it likes: equal up to one unit in the last place.
    unit = float(jnp.finfo(BF16).eps)
    for net in (inside, outside):
        np.testing.assert_allclose(net(params, X), unrolled, rtol=unit, atol=unit)


@pytest.mark.parametrize("x", [
    jnp.arange(6).reshape(3, 2), (jnp.arange(3), jnp.ones((3, 2), jnp.float16)),
], ids=["ints", "pair"])
def test_outputs_come_back_in_the_dtype_of_x(x):
    def last(x):
        return jax.tree.leaves(x)[-1].astype(BF16) * 2

    floats = [a.dtype for a in jax.tree.leaves(x) if a.dtype == jnp.float16]
    wanted = floats[0] if floats else jnp.dtype(jnp.float32)
    net = dp.mixed(last, BF16)
    assert net({}, x).dtype == net.plan(x).y.dtype == wanted


def test_integers_pass_and_float_side_inputs_are_cast():
    seen = {}

    def forward(params, x, *, positions=None, condition=None):
        seen.update(positions=positions.dtype, condition=condition.dtype)
        return x, positions

    net = dp.mixed(dp.stateless(None, forward), BF16)
    y, positions = net({}, X, positions=jnp.arange(3), condition=jnp.ones(3))
    assert seen == {"positions": jnp.int32, "condition": BF16}
    assert (y.dtype, positions.dtype) == (jnp.float32, jnp.int32)


def test_it_keeps_the_kind_and_the_children():
    net = dp.serial(dp.linear(4), dp.mixed(dp.linear(4), BF16), dp.mixed(BODY, "bfloat16"))
    assert list(net.children) == ["linear_0", "linear_1", "residual_0"]
    assert repr(dp.mixed(dp.linear(4), BF16)) == "mixed(linear(4), jnp.bfloat16)"
