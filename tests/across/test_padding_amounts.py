"""How much padding there is changes nothing that is real, or the mask is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, drawn, params_of
from support.refusing import refused

import diffprog as dp

LENGTHS = (4, 3)
# Layer -> how many outputs there are for n real steps; None gives one vector.
LAYERS = {
    "avg_pool, four wide": (dp.avg_pool(4, dims=1, stride=2, padding="SAME"),
                            lambda n: -(-n // 2)),
    "adaptive_avg_pool": (dp.adaptive_avg_pool(3, dims=1), lambda n: 3),
    "adaptive_max_pool": (dp.adaptive_max_pool(2, dims=1), lambda n: 2),
    "conv": (dp.conv(3, 4, dims=1, dilation=2), lambda n: n),
    "conv, stride": (dp.conv(3, 3, dims=1, stride=2, padding=1), lambda n: (n + 1) // 2),
    "conv, half the steps": (dp.conv(3, 2, dims=1, stride=2), lambda n: -(-n // 2)),
    "conv, causal": (dp.conv(3, 2, dims=1, padding="CAUSAL", stride=3), lambda n: -(-n // 3)),
    "conv_transpose": (dp.conv_transpose(3, 3, dims=1, stride=2), lambda n: 2 * n),
    "max_pool": (dp.max_pool(2, dims=1, padding="SAME"), lambda n: -(-n // 2)),
    "avg_pool": (dp.avg_pool(3, dims=1, stride=1, padding="SAME"), lambda n: n),
    "avg_pool, all counted": (dp.avg_pool(3, dims=1, stride=2, padding=1, count_padding=True),
                              lambda n: (n + 1) // 2),
    "upsample": (dp.upsample(3, dims=1), lambda n: 3 * n),
    "upsample, linear": (dp.upsample(2, dims=1, method="linear"), lambda n: 2 * n),
    "upsample, cubic": (dp.upsample(3, dims=1, method="cubic"), lambda n: 3 * n),
    "group_norm": (dp.group_norm(2, dims=1), lambda n: n),
    "global_max_pool": (dp.global_max_pool(dims=1), None),
    "collapse": (dp.collapse("attention"), None),
    "recurrent": (dp.recurrent(dp.gru(3), bidirectional=True), lambda n: n),
    "learned_positions": (dp.learned_positions(4), lambda n: n),
    "self_attention": (dp.self_attention(2), lambda n: n),
}
REFUSED = {
    "conv": dp.conv(3, 3, dims=1, stride=2), "depthwise": dp.depthwise_conv(4, dims=1, stride=3),
    "max_pool": dp.max_pool(3, dims=1, padding="SAME"),
    "avg_pool": dp.avg_pool(3, dims=1, stride=2, padding="SAME"),
    "max_pool, dilated": dp.max_pool(2, dims=1, stride=2, dilation=2, padding="SAME"),
    "reflect": dp.conv(3, 3, dims=1, padding_mode="reflect"),
    "replicate": dp.conv(3, 2, dims=1, padding=1, padding_mode="replicate"),
    "circular": dp.depthwise_conv(3, dims=1, padding_mode="circular"),
    "upsample": dp.upsample(size=8, dims=1),
    "upsample, linear": dp.upsample(size=9, dims=1, method="linear"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_as_without_any_padding(name):
    net, count = LAYERS[name]
    x = jnp.asarray(drawn(2, 4, 4), jnp.float32)
    params = params_of(net, x)
    run = jax.jit(net)
    alone = [run(params, x[row : row + 1, :n])[0] for row, n in enumerate(LENGTHS)]
    for more in (0, 1, 2, 5):
        steps = jnp.arange(4 + more)
        mask = steps < np.array(LENGTHS)[:, None]
        padded = jnp.where(mask[..., None], jnp.pad(x, ((0, 0), (0, more), (0, 0))), jnp.nan)
        y = run(params, padded, mask=mask)
        close([part if count is None else part[: count(n)]
               for part, n in zip(y, LENGTHS, strict=True)], alone)


@pytest.mark.parametrize("name", ["adaptive_avg_pool", "adaptive_max_pool", "collapse", "recurrent",
                                  "global_max_pool", "learned_positions", "self_attention"])
def test_padding_may_stand_anywhere(name):
    net, count = LAYERS[name]
    x = jnp.asarray(drawn(1, 4, 4), jnp.float32)
    params = params_of(net, x)
    run = jax.jit(net)
    for real in ([2, 3, 4, 5], [0, 1, 4, 6]):
        mask = np.zeros((1, 7), bool)
        mask[:, real] = True
        padded = jnp.full((1, 7, 4), jnp.nan).at[:, jnp.array(real)].set(x)
        y = run(params, padded, mask=jnp.asarray(mask))
        close(y if count is None or len(y[0]) != 7 else y[:, jnp.array(real)], run(params, x))


@pytest.mark.parametrize("dtype", [
    "float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["adaptive_avg_pool", "adaptive_max_pool"])
def test_adaptive_pools_have_the_gradient_of_the_valid_steps(name, dtype):
    net, _ = LAYERS[name]
    real, mask = jnp.array([1, 2, 4, 5]), np.zeros((1, 7), bool)
    mask[:, real] = True
    # Windows of two small numbers: no dtype rounds their means.
    x = jnp.asarray(np.random.default_rng(0).permutation(16).reshape(1, 4, 4), dtype)
    padded = jnp.full((1, 7, 4), jnp.nan, dtype).at[:, real].set(x)

    def run(x, mask=None):
        y, back = jax.vjp(lambda x: net({}, x, mask=mask), x)
        assert y.dtype == x.dtype
        return y, back(jnp.arange(1, 1 + y.size, dtype=dtype).reshape(y.shape))[0]

    y, slope = run(padded, jnp.asarray(mask))
    wanted = run(x)
    assert wanted[1].any()
    close((y, slope[:, real]), wanted)
    assert not slope[~mask].any()
    whole = jnp.array([True])  # a mask of whole examples leaves all steps
    close(run(x, whole), wanted)


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_of_steps_is_refused_where_padding_would_count(name):
    net, x = REFUSED[name], jnp.asarray(drawn(2, 6, 4), jnp.float32)
    assert "mask" in refused(dp.serial(at=net).plan, x, mask=jnp.ones((2, 6), bool)).wants
    params, _ = net.init(KEY, x)
    some = jnp.array([True, False])  # one of whole examples has nothing to do with length
    close(net(params, x, mask=some)[0], net(params, x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("net", [
    dp.adaptive_avg_pool(2, dims=1), dp.adaptive_max_pool(2, dims=1),
    dp.upsample(2, dims=1, method="linear"), dp.upsample(2, dims=1, method="cubic"),
], ids=repr)
def test_a_row_without_valid_steps_returns_zeros_and_has_no_gradient(net):
    x, mask = jnp.full((1, 5, 2), jnp.nan), jnp.zeros((1, 5), bool)
    y, slope = jax.value_and_grad(lambda x: jnp.sum(net({}, x, mask=mask)))(x)
    assert y == 0 and not slope.any()
