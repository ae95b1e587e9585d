"""Why a layer of one's own failed: draws without a key, an init that computes with x."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import KEY, X, refused

import diffprog as dp


def always(params, state, x, *, key=None, train=False):
    return x + jax.random.normal(jax.random.split(key)[0], x.shape), state


def in_training(params, state, x, *, key=None, train=False):
    return (x * jax.random.bernoulli(key, 0.5, x.shape) if train else x), state


def rightly(params, state, x, *, key=None, train=False):
    return (x if key is None else x + jax.random.normal(key, x.shape)), state


def drawing(apply, **record):
    return dp.Layer(lambda key, x: ({}, {}), apply, name="own", **record)


AROUND = [lambda f: f, lambda f: dp.serial(at=f), lambda f: dp.serial(at=dp.repeat(2, f)),
          lambda f: dp.serial(at=dp.mixed(f, jnp.bfloat16))]


@pytest.mark.parametrize("wrap", AROUND, ids=range(4))
@pytest.mark.parametrize("apply", [always, in_training])
def test_a_layer_that_draws_without_random_raises(apply, wrap):
    net = wrap(drawing(apply))
    error = refused(net.apply, {}, {}, X, key=KEY, train=True)
    assert "random=True" in error.remedy
    assert error.path == ("at" if net.name == "serial" else "")
    wrap(drawing(in_training, random=True)).apply({}, {}, X, key=KEY, train=True)


@pytest.mark.parametrize("wrap", AROUND, ids=range(4))
def test_a_layer_that_needs_a_key_in_inference_raises(wrap):
    net = wrap(drawing(always, random=True))
    for call in (lambda: net.init(KEY, X), lambda: net({}, X), lambda: net.plan(X),
                 lambda: jax.jit(net)({}, X)):
        error = refused(call)
        assert error.wants == "a layer that needs no key at inference"
        assert "key is None" in error.remedy
    right = wrap(drawing(rightly, random=True))
    np.testing.assert_array_equal(right({}, X), X)
    assert (right({}, X, key=KEY) != X).any()


@pytest.mark.parametrize("wrap", [
    lambda cell: cell, lambda cell: dp.serial(at=cell), dp.recurrent,
], ids=["alone", "serial", "recurrent"])
def test_a_cell_runs_without_its_carry_too(wrap):
    def apply(params, state, x, **side):
        h = state["h"] + x
        return h, {"h": h}

    def start(params, state, x, **side):
        return {"h": jnp.zeros(x.shape)}

    cell = dp.Layer(lambda key, x, **side: ({}, {}), apply, start, name="own")
    error = refused(wrap(cell).init, KEY, jnp.ones((2, 3, 4)))
    assert error.wants == "an apply that also runs without a carry"
    assert "carry = state or start(" in error.remedy


def test_a_start_that_returns_no_dict_raises():
    cell = dp.Layer(lambda key, x, **side: ({}, {}), lambda params, state, x, **side: (x, state),
                    lambda params, state, x, **side: jnp.zeros_like(x), name="own")
    error = refused(dp.recurrent(cell).init, KEY, jnp.ones((2, 3, 4)))
    assert error.wants == "a start that returns a dict" and "{'carry': h}" in error.remedy


@pytest.mark.parametrize("random", [False, True])
def test_an_error_of_apply_is_raised_as_it_is(random):
    def wrong(params, state, x, *, key=None, train=False):
        return x + undefined, state  # noqa: F821

    with pytest.raises(NameError, match="undefined"):
        drawing(wrong, random=random).apply({}, {}, X, key=KEY, train=True)


def test_an_error_of_init_is_raised_as_it_is():
    def broken(key, x):
        return {"w": 1 / 0}

    with pytest.raises(ZeroDivisionError):
        dp.stateless(broken, lambda params, x: x).init(KEY, X)


@pytest.mark.parametrize("init", [
    lambda key, x: {"w": x.mean(0)}, lambda key, x: {"w": jnp.std(x, axis=0)},
    lambda key, x: {"w": x[0]}, lambda key, x: {"w": jnp.ones(x.shape[-1]) + x.sum()},
    lambda key, x: {"w": np.asarray(x).mean(0)}, lambda key, x: {"w": jax.nn.softmax(x)[0]},
    lambda key, x: {"w": jnp.linalg.norm(x, axis=0)},  # which fails outside of a trace alone
], ids=range(7))
@pytest.mark.parametrize("wrap", AROUND, ids=range(4))
def test_an_init_computes_with_shapes(init, wrap):
    net = wrap(dp.stateless(init, lambda params, x: params["w"] * x, name="own"))
    error = refused(net.init, KEY, X)
    assert error.wants == "an init that reads shapes and dtypes of x alone"
    assert error.path == ("at" if net.name == "serial" else "")


def test_data_may_decide_after_init():
    """As the message says: whitening by what reaches a layer."""
    scale = dp.stateless(lambda key, x: {"scale": jnp.ones(x.shape[-1])},
                         lambda params, x: params["scale"] * x)
    net = dp.serial(first=dp.linear(3), scale=scale)
    x = jax.random.normal(KEY, (50, 4))
    params, _ = net.init(KEY, x)
    _, seen = dp.tap(net, "first")(params, x)
    params = params | {"scale": {"scale": 1 / seen["first"].std(0)}}
    np.testing.assert_allclose(net(params, x).std(0), 1, rtol=1e-5)


def test_mixed_hides_no_exception():
    """An init that goes by the dtype of x is no reason why a call in another one fails."""
    def forward(params, x):
        return jnp.linalg.inv(x) * params["w"]  # which has no bfloat16

    own = dp.stateless(lambda key, x: {"w": jnp.ones((4, 4), x.dtype)}, forward)
    x = jnp.eye(4)
    for net, params in ((dp.mixed(own, jnp.bfloat16), {"w": x}),
                        (dp.mixed(dp.serial(own=own), jnp.bfloat16), {"own": {"w": x}})):
        with pytest.raises((NotImplementedError, TypeError), match="bfloat16"):
            net(params, x)
    assert "w as float32[4,4]" in refused(dp.stateless(
        lambda key, x: {"w": jnp.ones(x.shape)}, lambda params, x: x @ params["w"]),
        {"w": jnp.ones((3, 3))}, x).wants
