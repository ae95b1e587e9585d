"""Losses against NumPy: values, gradients, and masks, labels and shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from support.refusing import expect, refused

import diffprog as dp

REDUCTIONS = ("none", "sum", "mean")
ELEMENTWISE = {
    "squared_error": (dp.losses.squared_error, lambda p, t: (p - t) ** 2),
    "absolute_error": (dp.losses.absolute_error, lambda p, t: abs(p - t)),
    "huber": (functools.partial(dp.losses.huber, delta=0.7),
              lambda p, t: np.where(abs(p - t) < 0.7, (p - t) ** 2 / 2, 0.7 * abs(p - t) - 0.245)),
    "binary_cross_entropy": (
        dp.losses.binary_cross_entropy,
        lambda x, t: -t * np.log(1 / (1 + np.exp(-x))) - (1 - t) * np.log(1 / (1 + np.exp(x)))),
}
elementwise = pytest.mark.parametrize("name", ELEMENTWISE)


def drawn(*shape, seed=0, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, size=shape)


def probabilities(*shape, seed=1):
    """Probabilities on the last axis."""
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reductions(loss, *given, **options):
    """All three reductions of a loss in one compiled program."""
    return jax.jit(lambda *given: [
        loss(*given, reduction=name, **options) for name in REDUCTIONS])(*given)


@pytest.mark.parametrize("axes", [None, 1, 2])
def test_more_entries_than_int32_holds_have_a_mean(axes):
    """Traced by shapes alone: no sum is in int32."""
    shape = (2**16, 2**16)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    valid = axes and jax.ShapeDtypeStruct(shape[:axes], jnp.bool_)
    found = jax.make_jaxpr(lambda x, valid: dp.losses.squared_error(x, x, mask=valid))(x, valid)
    counts = [e.outvars[0].aval.dtype for e in found.jaxpr.eqns if e.primitive.name == "reduce_sum"]
    assert set(map(str, counts)) == {"float32"}


def assert_padding_is_nothing(loss, prediction, target, mask, *broken):
    """A masked loss is that of the valid entries, whatever the others hold.

    `broken` are prediction and target with arbitrary values where the mask is False.
    """
    mask = np.asarray(mask)
    each, total, mean = reductions(loss, *broken, mask=jnp.asarray(mask))
    wanted = reductions(loss, prediction[mask], target[mask])
    np.testing.assert_allclose(np.asarray(each)[mask], wanted[0], rtol=1e-5)
    assert not np.asarray(each)[~mask].any()
    np.testing.assert_allclose([total, mean], wanted[1:], rtol=1e-5)
    moved = (0, 1) if np.issubdtype(target.dtype, np.floating) else (0,)
    slopes = jax.jit(jax.grad(lambda *given: loss(*given, mask=jnp.asarray(mask)), moved))(*broken)
    alone = jax.jit(jax.grad(loss, moved))(prediction[mask], target[mask])
    for grads, wanted in zip(map(np.asarray, slopes), alone, strict=True):
        assert not grads[~mask].any() and np.abs(wanted).max() > 0
        np.testing.assert_allclose(grads[mask], wanted, rtol=1e-5, atol=1e-7)


# cross entropy


def weighed(logits, labels, smoothing, weights, soft):
    """Each loss and its weight in the mean, as PyTorch defines them, entry by entry in float64."""
    logs, classes = log_softmax(logits), logits.shape[-1]
    losses, each = np.zeros(logits.shape[:-1]), np.ones(logits.shape[:-1])
    for at in np.ndindex(*losses.shape):
        target = labels[at] if soft else np.eye(classes)[labels[at]]
        if not soft:
            each[at] = weights[labels[at]]
        for c in range(classes):
            share = (1 - smoothing) * target[c] + smoothing / classes
            weight = weights[c]
            losses[at] -= weight * share * logs[at][c]
    return losses, each


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_is_the_negative_log_likelihood(leading, smoothing, weighted, soft):
    logits = drawn(*leading, 5)
    rng = np.random.default_rng(1)
    labels = probabilities(*leading, 5) if soft else rng.integers(0, 5, leading)
    weights = np.array([0.5, 1.0, 2.0, 0.1, 3.0]) if weighted else None
    wanted, each = weighed(
        logits, labels, smoothing, np.ones(5) if weights is None else weights, soft)
    with jax.enable_x64(True):
        found = reductions(
            dp.losses.cross_entropy, logits, labels, label_smoothing=smoothing,
            class_weights=weights)
        assert found[0].shape == leading and found[0].dtype == jnp.float64
        for got, want in zip(found, (wanted, wanted.sum(), wanted.sum() / each.sum()), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-13)
    dp.gradients.check_gradients(lambda logits: dp.losses.cross_entropy(
        logits, jnp.asarray(labels), label_smoothing=smoothing, class_weights=weights),
        jnp.asarray(logits))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_one_hot_soft_targets_equal_labels(smoothing):
    logits, labels = drawn(4, 3), np.array([0, 2, 1, 2])
    loss = jax.jit(functools.partial(dp.losses.cross_entropy, label_smoothing=smoothing))
    hard, soft = (loss(logits, target) for target in (labels, np.eye(3)[labels]))
    np.testing.assert_allclose(hard, soft, rtol=1e-6)


@pytest.mark.slow
def test_soft_targets_have_a_gradient():
    logits, targets = drawn(4, 3), probabilities(4, 3)
    grads = jax.grad(lambda t: dp.losses.cross_entropy(logits, t, reduction="sum"))(
        jnp.asarray(targets))
    np.testing.assert_allclose(grads, -log_softmax(logits), rtol=1e-5)


def test_the_gradient_of_cross_entropy_is_softmax_minus_the_label():
    logits, labels = drawn(4, 3), np.array([0, 2, 1, 2])
    wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted[np.arange(4), labels] -= 1
    grads = jax.jit(jax.grad(dp.losses.cross_entropy))(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(grads, wanted / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_large_logits_do_not_overflow():
    logits = jnp.array([[1e4, -1e4], [3e38, 0.0], [-jnp.inf, 0.0]])
    losses = dp.losses.cross_entropy(logits, jnp.array([1, 0, 1]), reduction="none")
    assert losses.tolist() == [2e4, 0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("labels", [
    np.arange(8), probabilities(8, 50).astype(jnp.bfloat16),
], ids=["labels", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bfloat16_logits_are_reduced_in_float32(labels, smoothing):
    logits = jnp.asarray(drawn(8, 50), jnp.bfloat16)
    loss = functools.partial(dp.losses.cross_entropy, label_smoothing=smoothing)
    each, _, mean = reductions(loss, logits, labels)
    assert each.dtype == mean.dtype == jnp.float32
    wide = labels if labels.ndim == 1 else labels.astype(jnp.float32)
    wanted, _, _ = reductions(loss, logits.astype(jnp.float32), wide)
    np.testing.assert_allclose(each, wanted, rtol=1e-6)


@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.1}, {"class_weights": np.array([0.5, 1.0, 2.0])}], ids=str)
def test_masked_labels_have_no_effect(options):
    logits, labels = drawn(4, 3), np.array([0, 2, 1, 2])
    mask = np.array([True, False, True, False])
    loss = functools.partial(dp.losses.cross_entropy, **options)
    assert_padding_is_nothing(
        loss, logits, labels, mask, np.where(mask[:, None], logits, np.nan),
        np.where(mask, labels, [0, -100, 0, 3]))
    soft = probabilities(4, 3)
    assert_padding_is_nothing(loss, logits, soft, mask,
                              *(np.where(mask[:, None], a, np.nan) for a in (logits, soft)))


@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.1}, {"class_weights": np.array([0.5, 1.0, 2.0])}], ids=str)
@pytest.mark.parametrize("ignore", [-100, 1, 255])
def test_ignored_labels_are_masked(options, ignore):
    logits, labels = drawn(2, 3, 3), np.array([[0, ignore, 1], [2, 0, ignore]])
    mask = np.array([[True, True, True], [True, False, True]])
    if ignore != -100:
        labels = labels.astype(np.uint8)
    found = reductions(dp.losses.cross_entropy, logits, labels, ignore_index=ignore, mask=mask,
        **options)
    wanted = reductions(
        dp.losses.cross_entropy, logits, labels, mask=mask & (labels != ignore), **options)
    assert np.count_nonzero(wanted[0]) == (2 if ignore == 1 else 3)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_narrow_label_is_not_mistaken_for_the_ignored_one():
    labels = np.array([156], np.uint8)  # the bits of -100
    assert float(
        reductions(dp.losses.cross_entropy, np.zeros((1, 200)), labels, ignore_index=-100)[2]) > 0


def test_a_mask_may_have_only_leading_axes():
    logits, labels = drawn(2, 3, 4), np.random.default_rng(1).integers(0, 4, (2, 3))
    loss = jax.jit(dp.losses.cross_entropy)
    found = loss(logits, labels, mask=np.array([False, True]))
    np.testing.assert_allclose(found, loss(logits[1], labels[1]), rtol=1e-6)


@pytest.mark.parametrize("labels", [
    np.array([0, 1]), np.full((2, 3), np.nan, np.float32),
], ids=["labels", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_without_valid_entries_is_zero(labels, reduction):
    logits, mask = jnp.full((2, 3), jnp.nan), jnp.zeros(2, bool)
    loss = lambda x: dp.losses.cross_entropy(  # noqa: E731
        x, labels, mask=mask, reduction=reduction)
    value, grads = jax.jit(jax.value_and_grad(loss))(logits)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grads, np.zeros((2, 3)))


def test_a_loss_without_weight_or_examples_is_zero():
    labels, free = jnp.array([0, 1]), jnp.array([0.0, 0.0, 1.0])
    assert float(dp.losses.cross_entropy(jnp.zeros((2, 3)), labels, class_weights=free)) == 0.0
    assert float(
        jax.jit(dp.losses.cross_entropy)(jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32))) == 0.0


@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.1}, {"class_weights": np.ones(3)}, {"ignore_index": -100}], ids=str)
def test_labels_out_of_range_give_nan(options):
    labels = jnp.array([-1, 0, 2, 3, 1000, -3])
    each, _, mean = reductions(dp.losses.cross_entropy, jnp.zeros((6, 3)), labels, **options)
    assert np.isnan(each).tolist() == [True, False, False, True, True, True]
    assert np.isnan(mean)


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [("uint8", 10), ("uint8", 256), ("int8", 128), ("int8", 1000), ("uint8", 300), ("int64", 5)])
@pytest.mark.parametrize("library", [np, jnp])
def test_labels_of_any_integer_dtype(dtype, classes, library):
    labels = np.array([0, 1, min(classes, 128) - 1]).astype(dtype)
    logits = drawn(3, classes)
    wanted = -log_softmax(logits)[range(3), labels.astype(int)]
    losses = dp.losses.cross_entropy(
        jnp.asarray(logits), library.asarray(labels), reduction="none")
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


def primitives(jaxpr, shape):
    """Names of the equations of a jaxpr, also of those inside it, that yield this shape."""
    found = set()
    for equation in jaxpr.eqns:
        if any(getattr(out.aval, "shape", None) == shape for out in equation.outvars):
            found.add(equation.primitive.name)
        for inner in jaxprs_in_params(equation.params):
            found |= primitives(inner, shape)
    return found


def test_no_one_hot_vector_is_made():
    logits, labels = jnp.asarray(drawn(4, 1000)), jnp.arange(4)

    def made(loss):
        return primitives(jax.make_jaxpr(loss)(labels).jaxpr, (4, 1000))

    naive = made(lambda labels: optax.softmax_cross_entropy(
        logits, jax.nn.one_hot(labels, 1000)).mean())
    assert "eq" in naive  # the search finds one where there is one
    assert not made(lambda labels: dp.losses.cross_entropy(logits, labels)) & {"eq", "iota"}


SCORES, CHOSEN = np.zeros((2, 3), np.float32), np.array([0, 1])


@pytest.mark.parametrize("shape", [(2,), (3, 3), (2, 1)], ids=str)
def test_probabilities_of_another_shape_are_refused(shape):
    error = refused(dp.losses.cross_entropy, SCORES, np.zeros(shape, np.float32))
    assert error.wants == "integer labels, or probabilities as float32[2,3] without ignore_index"
    assert "integers" in error.remedy


@pytest.mark.parametrize("shape", [(3,), (2, 1), ()], ids=str)
def test_labels_of_another_shape_are_refused(shape):
    error = refused(dp.losses.cross_entropy, SCORES, np.zeros(shape, np.int32))
    assert error.wants == "labels of the logits' leading shape (2,)" and error.remedy


@pytest.mark.parametrize("mask", [
    np.ones(2), np.ones(2, np.int32), np.ones(3, bool), np.ones((2, 1), bool),
], ids=["floats", "ints", "too long", "two axes"])
def test_wrong_masks_are_refused(mask):
    error = refused(dp.losses.cross_entropy, SCORES, CHOSEN, mask=mask)
    kind = "booleans" if mask.dtype != bool else "the leading axes of (2,)"
    assert error.wants == f"a mask of {kind}" and error.remedy


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 10, None])
def test_label_smoothing_is_a_fraction(smoothing):
    error = refused(dp.losses.cross_entropy, SCORES, CHOSEN, label_smoothing=smoothing)
    assert "label_smoothing in [0, 1)" in error.wants


@pytest.mark.parametrize("target", [CHOSEN, SCORES], ids=["labels", "soft"])
@pytest.mark.parametrize("weights", [np.ones(2), np.ones((1, 3)), 2.0],
                         ids=["too few", "two axes", "a number"])
def test_class_weights_are_one_for_each_class(target, weights):
    error = refused(dp.losses.cross_entropy, SCORES, target, class_weights=weights)
    assert error.wants == "one weight for each of 3 classes" and error.remedy


def test_cross_entropy_refuses_other_shapes_and_dtypes():
    logits, labels = jnp.zeros((2, 3)), jnp.array([0, 1])
    loss = dp.losses.cross_entropy
    error = refused(loss, logits, jnp.zeros((2, 3)), ignore_index=-100)
    assert "ignore_index=-100" in error.got and "mask" in error.remedy
    expect("", "wants labels as ints, got bool[2]", loss, logits, jnp.zeros(2, bool))
    assert refused(loss, jnp.zeros(()), jnp.zeros((), jnp.int32)).remedy == "add the missing axes"
    assert refused(loss, jnp.zeros((2, 3), jnp.int32), labels).wants == "floating-point input"


# losses of elements


@elementwise
def test_a_loss_of_elements_is_its_formula(name):
    loss, formula = ELEMENTWISE[name]
    prediction, target = drawn(3, 4, spread=1), probabilities(3, 4)
    wanted = formula(prediction, target)
    with jax.enable_x64(True):
        found = reductions(loss, prediction, target)
        assert found[0].shape == (3, 4) and found[0].dtype == jnp.float64
        for got, want in zip(found, (wanted, wanted.sum(), wanted.mean()), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12)
    dp.gradients.check_gradients(loss, jnp.asarray(prediction), jnp.asarray(target))


@elementwise
@pytest.mark.parametrize("mask", [
    [True, False, True], [[True, False], [False, False], [True, True]]], ids=["rows", "elements"])
def test_padding_of_elements_has_no_effect(name, mask):
    loss, _ = ELEMENTWISE[name]
    prediction, target, mask = drawn(3, 2, spread=1), probabilities(3, 2), np.array(mask)
    whole = mask if mask.ndim == 2 else mask[:, None]
    assert_padding_is_nothing(loss, prediction, target, mask,
                              *(np.where(whole, a, np.nan) for a in (prediction, target)))


@elementwise
def test_elementwise_losses_share_dtype_and_shape_rules(name):
    loss, _ = ELEMENTWISE[name]
    half = jnp.asarray(drawn(3, 2, spread=1), jnp.bfloat16)
    ones = np.ones((3, 2), np.int32)
    wide = loss(half.astype(jnp.float32), ones, reduction="none")
    assert wide.dtype == jnp.float32
    for target in (ones, ones.astype(bool), ones.astype(float), jnp.ones((3, 2), jnp.bfloat16)):
        np.testing.assert_array_equal(loss(half, target, reduction="none"), wide)
    assert float(loss(half, ones, mask=np.zeros(3, bool))) == 0.0
    assert float(loss(half[:0], ones[:0])) == 0.0
    expect("", "wants a target of the prediction's shape (3, 1), got float32[3]; drop the "
           "prediction's last axis: y[..., 0]", loss, jnp.ones((3, 1)), jnp.ones(3))
    for shape in ((3, 1), (2,), (), (2, 3)):
        error = refused(loss, jnp.ones((3, 2)), jnp.ones(shape))
        assert error.wants == "a target of the prediction's shape (3, 2)" and error.remedy
    for mask in (np.ones(2, bool), np.ones((3, 2, 1), bool), np.ones(3)):
        error = refused(loss, half, ones, mask=mask)
        kind = "booleans" if mask.dtype != bool else "the leading axes of (3, 2)"
        assert error.wants == f"a mask of {kind}" and error.remedy
    assert refused(loss, ones, ones).wants == "floating-point input"
    assert refused(loss, (half, half), ones).wants == "one array"
    assert refused(loss, half, ones, reduction="average").remedy == "choose one of them"


@pytest.mark.slow
@pytest.mark.parametrize("loss", [
    dp.losses.squared_error, dp.losses.absolute_error, dp.losses.huber,
])
def test_gradients_at_no_error_are_zero(loss):
    zeros = jnp.zeros(3)
    assert jax.grad(loss)(zeros, zeros).tolist() == [0.0] * 3


@pytest.mark.parametrize("delta", [0, -1.0, float("nan")])
def test_huber_wants_a_positive_delta(delta):
    error = refused(dp.losses.huber, jnp.ones(2), jnp.ones(2), delta=delta)
    assert error.wants == "delta as a positive number" and error.remedy


def test_large_log_odds_do_not_overflow():
    logits, targets = jnp.array([1e4, -1e4, 1e4]), jnp.array([1, 1, 0])
    assert dp.losses.binary_cross_entropy(logits, targets, reduction="none").tolist() == [0.0, 1e4,
        1e4]


def test_targets_outside_0_and_1_give_nan():
    losses = dp.losses.binary_cross_entropy(jnp.zeros(5), jnp.array([-1.0, 0.0, 0.5, 1.0, 2.0]),
                                     reduction="none")
    assert np.isnan(losses).tolist() == [True, False, False, False, True]


# divergence


def test_kl_divergence_is_its_formula():
    prediction, target = log_softmax(drawn(2, 3, 4)), probabilities(2, 3, 4)
    wanted = (target * np.log(target / np.exp(prediction))).sum(-1)
    with jax.enable_x64(True):
        found = reductions(dp.losses.kl_divergence, prediction, target)
        for got, want in zip(found, (wanted, wanted.sum(), wanted.mean()), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12)
        assert float(jnp.abs(dp.losses.kl_divergence(jnp.log(target), target))) < 1e-15
    dp.gradients.check_gradients(dp.losses.kl_divergence, jnp.asarray(prediction),
        jnp.asarray(target))
    half = dp.losses.kl_divergence(jnp.asarray(prediction, jnp.bfloat16),
        target.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, wanted.mean(), rtol=0.02)


def test_zero_targets_cost_nothing():
    target = jnp.array([0.0, 0.25, 0.75])
    prediction = jnp.array([-jnp.inf, np.log(0.5), np.log(0.5)])
    value, grads = jax.value_and_grad(dp.losses.kl_divergence, (0, 1))(prediction, target)
    np.testing.assert_allclose(value, 0.25 * np.log(0.5) + 0.75 * np.log(1.5), rtol=1e-6)
    np.testing.assert_allclose(grads[0], -target, rtol=1e-6)
    assert np.isfinite(grads[1]).all()
    assert np.isnan(dp.losses.kl_divergence(prediction, -target))


def test_padding_of_distributions_has_no_effect():
    prediction, target = log_softmax(drawn(3, 4)), probabilities(3, 4)
    mask = np.array([True, False, True])
    broken = (np.where(mask[:, None], a, np.nan) for a in (prediction, target))
    assert_padding_is_nothing(dp.losses.kl_divergence, prediction, target, mask, *broken)
    assert "(3,)" in refused(dp.losses.kl_divergence, prediction, target,
        mask=np.ones((3, 4), bool)).wants
    assert refused(dp.losses.kl_divergence, prediction, target[0]).remedy
    assert refused(dp.losses.kl_divergence, jnp.ones(()),
        jnp.ones(())).remedy == "add the missing axes"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [
    jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunk", [4, 6, 4096])
def test_the_gradient_of_linear_cross_entropy_is_summed_over_chunks_in_float32(dtype, chunk):
    """Each of 4096 equal logits contributes 1 / 4096; a sum in bfloat16 would stagnate."""
    x, labels = jnp.zeros((2, 3), dtype), jnp.zeros(2, jnp.int32)
    kernel = jnp.ones((3, 4096)).at[:, 0].set(0)
    total = lambda x, chunk: dp.losses.linear_cross_entropy(  # noqa: E731
        x, kernel, labels, chunk=chunk, reduction="sum")[0]
    grads = jax.grad(total)(x, chunk)
    assert grads.dtype == dtype
    np.testing.assert_allclose(grads.astype(jnp.float32), 4095 / 4096, rtol=4e-3)
