"""Absolute position embeddings: formulas in NumPy, and positions in a stream."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, drawn, same

import diffprog as dp
from diffprog.layers.positions.absolute import follow


def sinusoids(time, features, base=10000.0, first=0, begin=0):
    """The table p (time, features), entry by entry."""
    table = np.zeros((time, features))
    for t in range(time):
        for i in range(features // 2):
            angle = (begin + t) / base ** (2 * (i + first) / features)
            table[t, 2 * i : 2 * i + 2] = np.sin(angle), np.cos(angle)
    return table


@pytest.mark.parametrize("options", [{}, {"first": 1}, {"base": 50.0, "first": 1}])
@pytest.mark.parametrize("leading", [(), (2,), (3, 1)])
def test_sinusoids_equal_the_paper(options, leading):
    x = drawn(*leading, 7, 6)
    with jax.enable_x64(True):
        y = dp.sinusoidal_positions(**options)({}, jnp.asarray(x))
        np.testing.assert_allclose(y, x + sinusoids(7, 6, **options), rtol=0, atol=1e-12)


def table(net, first, time, features=16, dtype=jnp.float32):
    """The vectors that the layer adds at the positions from `first` on."""
    at = first + jnp.arange(time, dtype=jnp.int32)
    return net({}, jnp.zeros((time, features), dtype), positions=at)


@pytest.mark.parametrize("far", [0, 50, 10_000, 1_000_000])
def test_products_of_sinusoids_depend_on_the_distance_alone(far):
    net = dp.sinusoidal_positions()
    wanted = [sum(np.cos(k / 10000.0 ** (2 * i / 16)) for i in range(8)) for k in range(9)]
    p = np.asarray(table(net, far, 9))
    for k in range(9):
        products = (p[: 9 - k] * p[k:]).sum(-1) / 8
        np.testing.assert_allclose(products, wanted[k] / 8, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("far", "error"), [(0, 4e-7), (100_000, 1e-4)])
def test_sinusoids_in_float32_are_accurate_at_large_positions(far, error):
    p = table(dp.sinusoidal_positions(), far, 3, 4)
    np.testing.assert_allclose(p, sinusoids(3, 4, begin=far), rtol=0, atol=error)


def test_sinusoids_in_float64_are_accurate_at_large_positions():
    with jax.enable_x64(True):
        p = table(dp.sinusoidal_positions(), 100_000, 3, 4, jnp.float64)
        np.testing.assert_allclose(p, sinusoids(3, 4, begin=100_000), rtol=0, atol=1e-9)


def test_learned_vectors_are_added_by_index_or_by_position():
    net, x = dp.learned_positions(6), jnp.asarray(drawn(2, 4, 3), jnp.float32)
    params, state = net.init(KEY, x)
    assert state == {} and params["embedding"].shape == (6, 3)
    rows = np.asarray(params["embedding"])
    close(net(params, x), np.asarray(x) + rows[:4])
    at = np.array([[5, 0, 0, 3], [2, 1, 4, 4]])
    close(net(params, x, positions=jnp.asarray(at)), np.asarray(x) + rows[at])
    used = jax.grad(lambda p: jnp.sum(net(p, x, positions=jnp.asarray(at))))(params)["embedding"]
    np.testing.assert_array_equal(used, [[2] * 3, [1] * 3, [1] * 3, [1] * 3, [2] * 3, [1] * 3])


@pytest.mark.parametrize("net", [dp.sinusoidal_positions(), dp.learned_positions(9)], ids=repr)
def test_sums_are_float32_and_returned_in_the_dtype_of_x(net):
    x = jnp.asarray(drawn(2, 5, 4), jnp.bfloat16)
    params, _ = net.init(KEY, x)
    y = net(params, x)
    assert y.dtype == jnp.bfloat16
    same(y, net(params, x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_learned_positions_out_of_range_return_NaN_and_have_no_gradient():
    net, x = dp.learned_positions(4), jnp.ones((1, 5, 2))
    at = jnp.array([[0, -1, 3, 4, 2**31 - 1]])
    params, _ = net.init(KEY, x[:, :4])
    y = net(params, x, positions=at)
    np.testing.assert_array_equal(np.isnan(y[0, :, 0]), [False, True, False, True, True])
    grads = jax.grad(lambda p: jnp.nansum(net(p, x, positions=at)))(params)["embedding"]
    np.testing.assert_array_equal(grads[:, 0], [1, 0, 0, 1])


def test_default_positions_need_no_gather():
    def primitives(net, x):
        params, _ = net.init(KEY, x)
        return [e.primitive.name for e in jax.make_jaxpr(net)(params, x).eqns]

    x = jnp.ones((2, 5, 4))
    assert primitives(dp.learned_positions(7), x) == ["slice", "broadcast_in_dim", "add"]
    found = primitives(dp.sinusoidal_positions(), x)
    assert found.count("sin") == 1 and not {"gather", "cos"} & set(found) and len(found) == 9


# Positions in a stream.

def ints(*rows):
    return jnp.array(rows, jnp.int32)


def after(state, positions=None, mask=None, time=3):
    mask = None if mask is None else jnp.array(mask, bool)
    steps, state = follow({"next": ints(*state)}, positions, mask, (len(state), time))
    assert steps.dtype == state["next"].dtype == jnp.int32
    assert not steps.weak_type and not state["next"].weak_type
    return steps.tolist(), state["next"].tolist()


def test_follow_keeps_no_state_outside_a_stream():
    at = ints([4, 4, 0])
    assert follow({}, None, None, (1, 3)) == (None, {})
    steps, state = follow({}, at, None, (1, 3))
    assert steps is at and state == {}


@pytest.mark.slow
def test_default_positions_count_the_valid_steps():
    assert after([0, 5]) == ([[0, 1, 2], [5, 6, 7]], [3, 8])
    mask = [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert after([0, 5, 9], mask=mask) == ([[0, 0, 1], [0, 5, 0], [0, 0, 0]], [2, 6, 9])
    steps, state = follow({}, None, jnp.array(mask, bool), (3, 3))
    assert steps.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]] and state == {}


def test_positions_continue_after_the_last_valid_step():
    at = ints([0, 1, 2], [0, 0, 1], [7, 7, 7])
    assert after([0, 5, 9], at)[1] == [3, 2, 8]
    mask = [[1, 1, 0], [0, 1, 1], [0, 0, 0]]  # padded on the right, on the left, everywhere
    assert after([0, 5, 9], at, mask) == (at.tolist(), [2, 2, 9])
    assert after([4], ints([0, 2, 1]))[1] == [2]  # the last position, not the largest
    assert after([4], ints([]), time=0)[1] == [4]


def test_int64_positions_become_int32():
    with jax.enable_x64(True):
        at = jnp.array([[0, 1, 2]])
        assert at.dtype == jnp.int64 and after([0], at)[1] == [3]
        state = follow({"next": ints(0)}, None, None, (1, 2))[1]
        assert state["next"].dtype == jnp.int32


NETS = {"sinusoidal": dp.sinusoidal_positions(), "learned": dp.learned_positions(12),
        "in a net": dp.serial(dp.linear(4), dp.sinusoidal_positions(), jnp.tanh,
                              dp.learned_positions(12), dp.linear(2))}


@pytest.mark.parametrize("name", NETS)
def test_a_ragged_prompt_and_single_steps_equal_one_sequence(name):
    net, lengths = NETS[name], (2, 4, 3)
    x = drawn(3, 9, 4).astype(np.float32)  # row r: a prompt of lengths[r], then 5 steps
    params, _ = net.init(KEY, x)
    apply = jax.jit(net.apply)
    wanted = np.asarray(apply(params, {}, x)[0])
    steps = np.stack([x[r, n : n + 5] for r, n in enumerate(lengths)], 1)
    for left in (False, True):  # padding on the right, on the left
        valid = np.arange(4) < np.array(lengths)[:, None]
        valid = valid[:, ::-1] if left else valid
        prompt, at = np.full((3, 4, 4), np.nan, np.float32), np.zeros((3, 4), int)
        for r, n in enumerate(lengths):
            prompt[r, valid[r]], at[r, valid[r]] = x[r, :n], np.arange(n)
        state = net.start(params, {}, prompt, length=9)
        y, state = apply(params, state, prompt, positions=at, mask=valid)
        y = np.asarray(y)
        for r, n in enumerate(lengths):
            close(y[r, valid[r]], wanted[r, :n])

        def step(state, chunk):
            y, state = net.apply(params, state, chunk[:, None])
            return state, y[:, 0]

        _, ys = jax.lax.scan(step, state, steps)  # a carry of scan: its types must not change
        ys = np.asarray(ys)
        for r, n in enumerate(lengths):
            close(ys[:, r], wanted[r, n : n + 5])


def test_chunks_of_one_size_compile_once():
    net, x = NETS["in a net"], jnp.ones((2, 1, 4))
    params, _ = net.init(KEY, x)
    state = net.start(params, {}, x, length=5)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def step(state, x):
        return net.apply(params, state, x)

    for _ in range(3):
        _, state = step(state, x)


def test_a_stream_past_its_length_returns_NaN():
    net, x = dp.learned_positions(3), jnp.ones((1, 2, 2))
    params, _ = net.init(KEY, x)
    state = net.start(params, {}, x, length=3)
    assert state["next"].shape == (1,)
    y, state = net.apply(params, state, x)
    assert bool(jnp.isfinite(y).all())
    y, state = net.apply(params, state, x)
    np.testing.assert_array_equal(np.isnan(y[0, :, 0]), [False, True])
