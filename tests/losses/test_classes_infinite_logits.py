"""Infinite logits: the loss and its gradient are those of the limit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

INF = np.inf
LOGITS = np.array([[1.0, 2.0, -INF, 0.0], [-INF, 0.5, -INF, -1.0]])
FAR = np.where(LOGITS == -INF, -700.0, LOGITS)  # exp(-700) is nothing in float64


def value_and_slope(loss, *given):
    """The loss in float32, and its gradient with respect to the first argument."""
    given = [jnp.asarray(a, jnp.float32 if np.asarray(a).dtype.kind == "f" else None)
             for a in given]
    return jax.jit(jax.value_and_grad(loss))(*given)


def like_the_limit(loss, at_infinity, far, *given):
    """Infinite logits agree with large ones in float64, where the limit is reached."""
    value, slope = value_and_slope(loss, at_infinity, *given)
    with jax.enable_x64(True):
        wanted, wanted_slope = jax.value_and_grad(loss)(jnp.asarray(far), *given)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, wanted_slope, rtol=1e-4, atol=1e-6)
    assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize(("logit", "target", "loss", "slope"), [
    (-INF, 0.0, 0.0, 0.0), (INF, 1.0, 0.0, 0.0), (-INF, 1.0, INF, -1.0), (INF, 0.0, INF, 1.0),
    (-INF, 0.25, INF, -0.25), (INF, 0.25, INF, 0.75)])
def test_binary_cross_entropy_of_infinite_logits(logit, target, loss, slope):
    found = value_and_slope(dp.losses.binary_cross_entropy, np.array([logit]), np.array([target]))
    assert [float(found[0]), float(found[1][0])] == [loss, slope]
    tangent = jax.jvp(lambda x: dp.losses.binary_cross_entropy(x, jnp.array([target])),
                      (jnp.array([logit]),), (jnp.ones(1),))[1]
    assert float(tangent) == slope


LABELS = np.array([1, 3])
SOFT = np.array([[0.25, 0.75, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]])
WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5])
NARROW = np.where(LOGITS[:1].repeat(2, 0) == -INF, -INF, LOGITS[:1])  # class 2 alone is impossible


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels", "soft", "weighted", "smoothed", "divergence"])
def test_an_impossible_class_costs_nothing_where_the_target_is_zero(name):
    smoothed = functools.partial(dp.losses.cross_entropy, label_smoothing=0.2,
        class_weights=WEIGHTS)
    loss, logits, given = {
        "labels": (dp.losses.cross_entropy, LOGITS, LABELS),
        "soft": (dp.losses.cross_entropy, LOGITS, SOFT),
        "weighted": (functools.partial(dp.losses.cross_entropy, class_weights=WEIGHTS), LOGITS,
            LABELS),
        "smoothed": (smoothed, NARROW, LABELS),
        "divergence": (lambda x, t: dp.losses.kl_divergence(jax.nn.log_softmax(x), t), LOGITS,
            SOFT),
    }[name]
    like_the_limit(loss, logits, np.where(logits == -INF, -700.0, logits), given)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_an_impossible_label_has_infinite_loss(smoothing):
    loss = functools.partial(dp.losses.cross_entropy, label_smoothing=smoothing)
    value, slope = value_and_slope(loss, LOGITS[:1], np.array([2]))
    assert float(value) == INF and np.isfinite(slope).all()
    value, slope = value_and_slope(loss, LOGITS[:1], np.array([[0.0, 0.5, 0.5, 0.0]]))
    assert float(value) == INF and np.isfinite(slope).all()


@pytest.mark.slow
def test_an_impossible_class_of_weight_zero_costs_nothing():
    weighted = functools.partial(dp.losses.cross_entropy, class_weights=WEIGHTS, reduction="none")
    assert weighted(jnp.asarray(LOGITS[:1]), jnp.array([2])).tolist() == [0.0]


@pytest.mark.parametrize("impossible", [slice(0, 3), slice(2, 8), slice(0, 7), slice(3, 6)])
def test_the_chunks_of_linear_cross_entropy_may_be_impossible(impossible):
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(2, 3)), rng.normal(size=(3, 9)), rng.normal(size=9)
    bias[impossible] = -INF
    labels = np.array([8, 8])

    def chunked(bias, x, kernel):
        return dp.losses.linear_cross_entropy(x, kernel, labels, bias=bias, chunk=3)[0]

    def whole(bias, x, kernel):
        return dp.losses.cross_entropy(x @ kernel + bias, labels)

    given = [jnp.asarray(a, jnp.float32) for a in (bias, x, kernel)]
    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*given) for f in (chunked, whole))
    chex.assert_tree_all_finite(wanted)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_first_classes_may_be_impossible():
    scores = jnp.array([-INF, -INF, -INF, 0.0, 1.0, 2.0, 3.0])
    loss, best = dp.losses.linear_cross_entropy(
        jnp.zeros((1, 2)), jnp.zeros((2, 7)), jnp.array([3]), bias=scores, chunk=3)
    np.testing.assert_allclose(loss, np.log(np.exp([0.0, 1, 2, 3]).sum()), rtol=1e-6)
    assert best.tolist() == [6]


@pytest.mark.slow
@pytest.mark.parametrize("labels", [[[1]], [[1, 3]], [[3, 1]], [[1, 1]]])
def test_ctc_with_impossible_classes(labels):
    logits = np.random.default_rng(0).normal(size=(1, 4, 4))
    logits[0, 1, 2] = logits[0, 2, 1] = logits[0, 0, 3] = -INF
    like_the_limit(lambda x, y: dp.losses.ctc(x, y), logits,
        np.where(logits == -INF, -700.0, logits),
                   np.array(labels))


@pytest.mark.slow
def test_ctc_is_never_negative():
    logits = jnp.array([[[0.0, 17.0], [0.0, 17.0]]])
    loss, slope = jax.value_and_grad(dp.losses.ctc)(logits, jnp.array([[1]]))
    assert 0 <= float(loss) < 1e-6
    with jax.enable_x64(True):  # one path of four spells nothing
        wide = jnp.asarray(np.asarray(logits), float)
        wanted = jax.grad(lambda x: -jnp.log1p(-jnp.exp(jax.nn.log_softmax(x)[0, :, 0].sum())))(
            wide)
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=1e-7)
