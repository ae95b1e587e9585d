"""One program draws for all initializers that do the same, and none is kept for ever."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog.core import parameters
from diffprog.core.parameters import parameter

KEY = jax.random.key(0)
SPREAD = 1.0


def drawn(initializer, shape=(2, 3)):
    return parameter(KEY, "kernel", initializer, shape, jnp.ones(1))


def compiled(caplog, *initializers):
    """How many programs are compiled to draw from some initializers, one after the other."""
    drawn("ones")
    caplog.clear()
    with jax.log_compiles():
        for initializer in initializers:
            drawn(initializer)
    return sum("Compiling jit(draw)" in record.getMessage() for record in caplog.records)


def scaled(by):
    return lambda key, shape, dtype: by * jax.random.uniform(key, shape, dtype)


def by_global(key, shape, dtype):
    return SPREAD * jnp.ones(shape, dtype)


class Drawing:
    def __init__(self, by):
        self.by = by

    def draw(self, key, shape, dtype):
        return self.by * jnp.ones(shape, dtype)


@pytest.mark.parametrize("make", [
    lambda: jax.nn.initializers.normal(0.37), lambda: jax.nn.initializers.he_uniform(),
    lambda: scaled(0.37), lambda: functools.partial(scaled(0.38), dtype=jnp.float32),
    lambda: scaled(np.arange(3.0)), lambda: scaled(jnp.arange(3.0)),
], ids=["normal", "he_uniform", "closure", "partial", "NumPy array", "array"])
def test_initializers_made_by_equal_calls_share_a_program(make, caplog):
    one, *others = (make() for _ in range(4))
    if isinstance(one, functools.partial):
        assert parameters._contents(one) == parameters._contents(others[0])
        return
    drawn(one)
    assert compiled(caplog, *others) == 0


@pytest.mark.slow
def test_initializers_that_differ_draw_differently(caplog):
    normal = jax.nn.initializers.normal
    assert (25 * drawn(normal(0.02)) != drawn(normal(0.5))).sum() < 3  # the same but for the scale
    different = [
        normal(0.02), normal(0.5), scaled(1), scaled(2.0), scaled(-0.0), scaled(0.0),
        scaled(np.array([1.0, 2.0, 3.0])), scaled(np.array([1.0, 2.0, 4.0])),
        scaled(np.array([1, 2, 3])), Drawing(1.0).draw, Drawing(2.0).draw, jnp.ones, jnp.zeros,
    ]
    contents = [parameters._contents(f) for f in different]
    assert len(set(contents)) == len(different)
    assert drawn(Drawing(3.0).draw)[0, 0] == 3 and drawn(Drawing(4.0).draw)[0, 0] == 4
    assert (drawn(scaled(np.array([1.0, 2.0, 3.0]))) != drawn(scaled(np.ones(3)))).any()


def test_a_global_value_is_part_of_an_initializer(monkeypatch):
    assert drawn(by_global)[0, 0] == 1
    monkeypatch.setitem(globals(), "SPREAD", 2.0)
    assert drawn(by_global)[0, 0] == 2


def test_an_initializer_that_holds_itself_is_drawn_from():
    def falling(key, shape, dtype, times=2):
        return falling(key, shape, dtype, times - 1) / 2 if times else jnp.ones(shape, dtype)

    assert drawn(falling)[0, 0] == 0.25


@pytest.mark.slow
def test_an_initializer_may_hold_what_is_traced():
    net = lambda by: dp.linear(2, kernel_init=scaled(by))  # noqa: E731
    total = lambda by: net(by).init(KEY, jnp.ones((1, 3)))[0]["kernel"].sum()  # noqa: E731
    wanted = net(2.0).init(KEY, jnp.ones((1, 3)))[0]["kernel"].sum()
    assert jnp.allclose(jax.jit(total)(2.0), wanted)
    assert jnp.allclose(jax.grad(total)(2.0), wanted / 2)


def live():
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


@pytest.mark.slow
def test_draws_keep_no_programs():
    drawn(jax.nn.initializers.normal(0.02))
    begin = live()
    for _ in range(1000):
        drawn(jax.nn.initializers.normal(0.02))
    assert live() == begin


@pytest.mark.slow
def test_inits_keep_no_programs():
    init = lambda scale: dp.linear(  # noqa: E731
        2, kernel_init=jax.nn.initializers.normal(scale)).init(KEY, jnp.ones((1, 2)))
    init(0.02)
    begin = live()
    for _ in range(1000):
        init(0.02)
    assert live() == begin
    limit = parameters._drawing.cache_parameters()["maxsize"]
    for number in range(limit):
        init(1.0 + number)
    full = live()
    for number in range(20):
        init(-1.0 - number)
    assert live() <= full
