"""The feed-forward net and residual blocks, against NumPy and against compositions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, computes, drawn, gradient, names, same

import diffprog as dp

X = drawn(2, 3, 4)
ROWS = jnp.float32(X)


def affine(params, x):
    return x @ params["kernel"] + params["bias"]


def fed(params, x, bend=lambda a: np.maximum(a, 0)):
    return affine(params["down"], bend(affine(params["up"], x)))


def normed(params, x, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return params["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) + (
        params["bias"])


FED = {"up": {"kernel": drawn(4, 7, seed=1), "bias": drawn(7, seed=2)},
       "down": {"kernel": drawn(7, 4, seed=3), "bias": drawn(4, seed=4)}}
NORMED = {"scale": drawn(4, seed=5), "bias": drawn(4, seed=6)}
BOTH = {"body": FED, "norm": NORMED}


def test_ffn_equals_its_formula():
    computes(dp.ffn(7), FED, X, fed(FED, X))
    computes(dp.ffn(7), FED, X[0, 0], fed(FED, X[0, 0]))
    phi = np.vectorize(lambda a: (1 + math.erf(a / math.sqrt(2))) / 2)
    computes(dp.ffn(7, dp.gelu), FED, X, fed(FED, X, lambda a: a * phi(a)))
    plain = {name: {"kernel": part["kernel"]} for name, part in FED.items()}
    without = np.maximum(X @ FED["up"]["kernel"], 0) @ FED["down"]["kernel"]
    computes(dp.ffn(7, bias=False), plain, X, without)


def test_residual_blocks_equal_their_formulas():
    computes(dp.add_norm(dp.ffn(7)), BOTH, X, normed(NORMED, X + fed(FED, X)))
    computes(dp.pre_norm(dp.ffn(7)), BOTH, X, X + fed(FED, normed(NORMED, X)))


def test_another_norm_and_another_body():
    scale = {"scale": NORMED["scale"]}
    size = np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5)
    computes(dp.pre_norm(jnp.negative, dp.rms_norm()), {"norm": scale}, X,
             X - scale["scale"] * X / size)
    computes(dp.add_norm(jnp.sin, jnp.tanh), {}, X, np.tanh(X + np.sin(X)))


def test_ffn_and_residual_blocks_equal_compositions():
    """`ffn` as two linear maps, a block as `residual` with a norm: value and gradient."""
    params, _ = dp.ffn(7, jnp.tanh).init(KEY, ROWS)
    two = dp.serial(up=dp.linear(7), bend=jnp.tanh, down=dp.linear(4))
    same(two.init(KEY, ROWS)[0], params)  # each kernel is drawn as that of `linear`
    close(gradient(dp.ffn(7, jnp.tanh), params, ROWS), gradient(two, params, ROWS))
    body = dp.ffn(7, jnp.tanh)
    post, pre = dp.add_norm(body), dp.pre_norm(body)
    params = jax.tree.map(jnp.float32, BOTH)
    after = dp.serial(sum=dp.residual(body), norm=dp.layer_norm())
    slopes = gradient(post, params, ROWS)
    close({"sum": {"body": slopes["body"]}, "norm": slopes["norm"]}, gradient(
        after, {"sum": {"body": params["body"]}, "norm": params["norm"]}, ROWS))
    before = dp.residual(dp.serial(norm=dp.layer_norm(), body=body))
    close({"body": gradient(pre, params, ROWS)}, gradient(before, {"body": params}, ROWS))


def test_children_are_the_body_and_the_norm():
    block = dp.pre_norm(dp.self_attention(2)) >> dp.pre_norm(dp.ffn(8))
    params, state = block.init(KEY, ROWS)
    assert state == {} and names(block) == ["pre_norm_0", "pre_norm_1"]
    assert {path: leaf.shape for path, leaf in dp.tree.paths(params["pre_norm_1"]).items()} == {
        "body/up/kernel": (4, 8), "body/up/bias": (8,), "body/down/kernel": (8, 4),
        "body/down/bias": (4,), "norm/scale": (4,), "norm/bias": (4,)}
    assert names(dp.add_norm(dp.ffn(8), dropout=0.1)) == ["body", "norm", "drop"]
    bare = dp.add_norm(jnp.sin, jnp.tanh, dropout=0.1)
    assert bare.bare and bare.random and not dp.add_norm(dp.ffn(8)).random


@pytest.mark.slow
def test_residual_blocks_pass_on_state_side_inputs_and_streams():
    net = dp.add_norm(dp.self_attention(2, causal=True), dp.batch_norm())
    params, state = net.init(KEY, ROWS)
    assert set(state) == {"norm"} and {"mask", "segments"} <= net.side
    mask = np.array([[1, 1, 0], [0, 0, 1]], bool)
    apply = jax.jit(net.apply, static_argnames="train")
    _, after = apply(params, state, ROWS, mask=mask, train=True)
    assert not np.array_equal(after["norm"]["mean"], state["norm"]["mean"])
    whole, _ = apply(params, after, ROWS, mask=mask)
    carried = net.start(params, after, ROWS, length=3)
    assert set(carried) == {"body", "norm"}
    first, carried = apply(params, carried, ROWS[:, :2], mask=mask[:, :2])
    last, _ = apply(params, carried, ROWS[:, 2:], mask=mask[:, 2:])
    close(jnp.concatenate([first, last], 1), whole)


def test_repr_is_the_call():
    net = dp.add_norm(dp.ffn(8, dp.gelu, dropout=0.2), dropout=0.1)
    text = "add_norm(ffn(8, activation=gelu, dropout=0.2), dropout=0.1)"
    assert repr(net) == repr(net.rebuild(net.children)) == text
    assert repr(dp.replace(net, "norm", lambda norm: dp.rms_norm())) == (
        "add_norm(ffn(8, activation=gelu, dropout=0.2), norm=rms_norm(), dropout=0.1)")
    assert repr(dp.replace(net, "body", lambda body: jnp.sin)) == "add_norm(jnp.sin, dropout=0.1)"
    assert repr(dp.pre_norm(jnp.sin, dp.layer_norm())) == "pre_norm(jnp.sin, norm=layer_norm())"


# Dropout.

def ones(x):
    return jnp.ones_like(x)


def trained(net, params, key=KEY):
    return np.asarray(net.apply(params, {}, ROWS, key=key, train=True)[0])


@pytest.mark.slow
def test_ffn_drops_hidden_features():
    """With biases and kernels of ones each y counts the hidden features that are kept."""
    net = dp.ffn(100, dropout=0.2)
    params = jax.tree.map(jnp.zeros_like, net.init(KEY, ROWS)[0])
    params["up"]["bias"], params["down"]["kernel"] = jnp.ones(100), jnp.ones((100, 4))
    same(net(params, ROWS), jnp.full(X.shape, 100.0))
    y = trained(net, params)
    kept = y * 0.8
    np.testing.assert_allclose(kept, kept.round(), atol=1e-4)
    assert (y == y[..., :1]).all()  # the same hidden features in all of a row
    assert len(np.unique(y)) > 3 and abs(kept.mean() - 80) < 5 * 4 / math.sqrt(6)


@pytest.mark.parametrize("rate", [0.25, 0.5])
@pytest.mark.parametrize(("make", "wanted"), [
    (lambda rate: dp.add_norm(ones, jnp.negative, dropout=rate), lambda y: -y - ROWS),
    (lambda rate: dp.pre_norm(jnp.cosh, jnp.zeros_like, dropout=rate), lambda y: y - ROWS),
], ids=["add_norm", "pre_norm"])
def test_residual_blocks_drop_the_output_of_the_body_alone(rate, make, wanted):
    net = make(rate)
    close(wanted(net({}, ROWS)), np.ones_like(ROWS))
    dropped = wanted(trained(net, {}))
    np.testing.assert_allclose(
        np.where(dropped > 0.5, dropped - 1 / (1 - rate), dropped), 0, atol=1e-5)
    assert 0 < (dropped > 0.5).sum() < dropped.size
    assert not np.array_equal(trained(net, {}), trained(net, {}, jax.random.key(1)))


@pytest.mark.parametrize("net", [
    dp.ffn(7), dp.add_norm(dp.ffn(7)), dp.pre_norm(dp.ffn(7)),
], ids=repr)
def test_a_rate_of_zero_needs_no_key(net):
    params, _ = net.init(KEY, ROWS)
    same(net.apply(params, {}, ROWS, train=True)[0], net(params, ROWS))


# Errors.

@pytest.mark.parametrize(("net", "path"), [
    (dp.ffn(4, dropout=0.1), ""), (dp.add_norm(dp.ffn(4), dropout=0.1), "drop"),
], ids=["ffn", "add_norm"])
def test_training_with_dropout_and_without_a_key_raises(net, path):
    params, _ = net.init(KEY, ROWS)
    with pytest.raises(dp.LayerError, match="wants a key when train=True, got none") as caught:
        net.apply(params, {}, ROWS, train=True)
    assert caught.value.path == path
