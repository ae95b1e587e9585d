"""Losses and metrics against numpy, and what a mask, a label or a batch may be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import diffprog as dp


def drawn(*shape, seed=0, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, size=shape)


def surprise(logits, labels):
    """``-log softmax(logits)[label]`` in float64, one entry at a time."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    losses = np.zeros(labels.shape)
    for at in np.ndindex(*labels.shape):
        row = logits[at]
        losses[at] = np.log(np.exp(row - row.max()).sum()) + row.max() - row[labels[at]]
    return losses


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
def test_cross_entropy_is_the_surprise(leading):
    logits, labels = drawn(*leading, 5), np.random.default_rng(1).integers(0, 5, leading)
    wanted = surprise(logits, labels)
    with jax.enable_x64(True):
        each, total, mean = jax.jit(lambda *given: (
            dp.cross_entropy(*given, reduction="none"), dp.cross_entropy(*given, reduction="sum"),
            dp.cross_entropy(*given)))(logits, labels)
        assert each.shape == leading and each.dtype == jnp.float64
        np.testing.assert_allclose(each, wanted, rtol=0, atol=1e-13)
        np.testing.assert_allclose(total, wanted.sum(), rtol=0, atol=1e-13)
        np.testing.assert_allclose(mean, wanted.mean(), rtol=0, atol=1e-13)


def test_its_gradient_is_softmax_minus_the_label():
    logits, labels = drawn(4, 3), np.array([0, 2, 1, 2])
    wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted[np.arange(4), labels] -= 1
    grads = jax.jit(jax.grad(dp.cross_entropy))(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(grads, wanted / 4, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow():
    logits = jnp.array([[1e4, -1e4], [3e38, 0.0], [-jnp.inf, 0.0]])
    losses = dp.cross_entropy(logits, jnp.array([1, 0, 1]), reduction="none")
    assert losses.tolist() == [2e4, 0.0, 0.0]


def test_bfloat16_logits_are_reduced_in_float32():
    logits = jnp.asarray(drawn(8, 50), jnp.bfloat16)
    labels = np.arange(8)
    losses = jax.jit(lambda *given: dp.cross_entropy(*given, reduction="none"))(logits, labels)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, surprise(logits, labels), rtol=1e-5)


def test_masked_entries_count_nothing_whatever_they_hold():
    logits, labels = drawn(4, 3), np.array([0, 2, 1, 2])
    mask = np.array([True, False, True, False])
    wanted = surprise(logits, labels)
    broken = np.where(mask[:, None], logits, np.nan)

    @jax.jit
    def measured(logits):
        def loss(logits, reduction="mean"):
            return dp.cross_entropy(logits, jnp.asarray(labels), mask=jnp.asarray(mask),
                                    reduction=reduction)

        return loss(logits, "none"), loss(logits, "sum"), loss(logits), jax.grad(loss)(logits)

    each, total, mean, grads = map(np.asarray, measured(jnp.asarray(broken)))
    np.testing.assert_allclose(each, np.where(mask, wanted, 0), rtol=1e-5)
    np.testing.assert_allclose(total, wanted[mask].sum(), rtol=1e-5)
    np.testing.assert_allclose(mean, wanted[mask].mean(), rtol=1e-5)
    np.testing.assert_array_equal(grads[~mask], 0.0)
    alone = jax.jit(jax.grad(dp.cross_entropy))(jnp.asarray(logits[mask]), labels[mask])
    assert np.abs(grads[mask]).min() > 0
    np.testing.assert_allclose(grads[mask], alone, rtol=1e-5, atol=1e-7)


def test_masked_labels_may_be_anything():
    logits, mask = jnp.asarray(drawn(2, 3)), jnp.array([True, False])
    loss = lambda logits: dp.cross_entropy(logits, jnp.array([1, -100]), mask=mask)  # noqa: E731
    value, grads = map(np.asarray, jax.jit(jax.value_and_grad(loss))(logits))
    np.testing.assert_allclose(value, surprise(logits, [1, 0])[0], rtol=1e-5)
    assert np.isfinite(grads).all() and not grads[1].any() and grads[0].any()


def test_nothing_real_gives_zero():
    logits, labels, mask = jnp.full((2, 3), jnp.nan), jnp.array([0, 1]), jnp.zeros(2, bool)
    for reduction in ("mean", "sum"):
        loss = lambda x, r=reduction: dp.cross_entropy(x, labels, mask=mask, reduction=r)  # noqa: E731
        value, grads = jax.jit(jax.value_and_grad(loss))(logits)
        assert float(value) == 0.0
        np.testing.assert_array_equal(grads, np.zeros((2, 3)))
    assert float(dp.accuracy(logits, labels, mask=mask)) == 0.0


def test_an_empty_batch_has_nothing_real_either():
    assert float(dp.cross_entropy(jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32))) == 0.0


def test_labels_out_of_range_give_nan():
    labels = jnp.array([-1, 0, 2, 3, 1000, -3])
    loss = lambda labels: dp.cross_entropy(jnp.zeros((6, 3)), labels, reduction="none")  # noqa: E731
    for losses in (loss(labels), jax.jit(loss)(labels)):
        assert np.isnan(losses).tolist() == [True, False, False, True, True, True]
    assert np.isnan(dp.cross_entropy(jnp.zeros((6, 3)), labels))


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [("uint8", 10), ("uint8", 256), ("int8", 128), ("int8", 1000), ("uint8", 300), ("int64", 5)])
def test_labels_of_any_integer_dtype(dtype, classes):
    labels = np.array([0, 1, min(classes, 128) - 1]).astype(dtype)
    logits = drawn(3, classes)
    wanted = surprise(logits, labels)
    for given in (labels, jnp.asarray(labels)):
        losses = dp.cross_entropy(jnp.asarray(logits), given, reduction="none")
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
    assert not made(lambda labels: dp.cross_entropy(logits, labels)) & {"eq", "iota"}


@pytest.mark.parametrize("measure", [dp.cross_entropy, dp.accuracy])
def test_what_does_not_fit_is_refused(measure):
    logits, labels = jnp.zeros((2, 3)), jnp.array([0, 1])
    for wrong in (jnp.zeros(2), jnp.zeros(2, bool)):
        with pytest.raises(dp.LayerError, match="integer labels"):
            measure(logits, wrong)
    for shapes in (((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3), ()), ((), ())):
        with pytest.raises(dp.LayerError, match="leading shape"):
            measure(jnp.zeros(shapes[0]), jnp.zeros(shapes[1], jnp.int32))
    for mask in (jnp.ones(2), jnp.ones(2, jnp.int32), jnp.ones(3, bool), jnp.ones((2, 1), bool)):
        with pytest.raises(dp.LayerError, match="mask of booleans"):
            measure(logits, labels, mask=mask)
    with pytest.raises(dp.LayerError, match="reduction"):
        measure(logits, labels, reduction="average")


def test_accuracy_is_the_share_of_hits():
    logits, labels = drawn(2, 20, 3), np.random.default_rng(1).integers(0, 3, (2, 20))
    mask = np.random.default_rng(2).random((2, 20)) < 0.5
    hits = np.array([[max(range(3), key=lambda c, row=row: row[c]) for row in part]
                     for part in logits]) == labels
    given = jnp.asarray(logits), jnp.asarray(labels)
    assert 0 < hits[mask].mean() != hits.mean()
    np.testing.assert_allclose(dp.accuracy(*given), hits.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        dp.accuracy(*given, mask=jnp.asarray(mask)), hits[mask].mean(), rtol=1e-6)
    np.testing.assert_array_equal(dp.accuracy(*given, reduction="none"), hits)
    assert float(dp.accuracy(*given, reduction="sum")) == hits.sum()


def classifier():
    net, x, y = dp.linear(3), drawn(4, 5), np.array([0, 2, 1, 2])
    params, state = net.init(jax.random.key(0), jnp.asarray(x, jnp.float32))
    logits = x @ np.asarray(params["kernel"], np.float64)
    return net, params, state, jnp.asarray(x), jnp.asarray(y), logits


def test_classification_of_a_pair_and_of_a_dict():
    net, params, state, x, y, logits = classifier()
    objective = dp.classification()
    for batch in ((x, y), [x, y], {"x": x, "y": y}):
        loss, (new, metrics) = objective(net, params, state, batch, key=None, train=True)
        assert new == {} and set(metrics) == {"loss", "accuracy", "count"}
        np.testing.assert_allclose(loss, surprise(logits, y).mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], loss)
        np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == y).mean())
        assert float(metrics["count"]) == 4


def test_classification_with_a_mask():
    net, params, state, x, y, logits = classifier()
    mask = np.array([True, True, False, True])
    batch = {"x": x.at[2].set(jnp.nan), "y": y, "mask": jnp.asarray(mask)}
    loss, (_, metrics) = dp.classification()(net, params, state, batch, key=None, train=True)
    np.testing.assert_allclose(loss, surprise(logits, y)[mask].mean(), rtol=1e-5)
    hits = (logits.argmax(-1) == np.asarray(y))[mask]
    np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)
    assert float(metrics["count"]) == 3
    loss, _ = dp.classification(reduction="sum")(net, params, state, batch, key=None, train=True)
    np.testing.assert_allclose(loss, surprise(logits, y)[mask].sum(), rtol=1e-5)


def test_the_sum_is_the_loss_but_metrics_stay_means():
    net, params, state, x, y, logits = classifier()
    loss, (_, metrics) = dp.classification(reduction="sum")(
        net, params, state, (x, y), key=None, train=True)
    np.testing.assert_allclose(loss, surprise(logits, y).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], surprise(logits, y).mean(), rtol=1e-5)


def pooled(layers, x, *, mask):
    weights = mask[..., None].astype(x.dtype)
    return layers.head((x * weights).sum(1) / weights.sum(1))


def test_a_mask_of_positions_goes_to_the_net_alone():
    net = dp.program(head=dp.linear(3))(pooled)
    x, y = jnp.asarray(drawn(2, 4, 5)), jnp.array([0, 2])
    mask = jnp.array([[True, True, False, False], [True, True, True, False]])
    params, state = net.init(jax.random.key(0), x, mask=mask)
    batch = {"x": x, "y": y, "mask": mask}
    loss, (_, metrics) = dp.classification()(net, params, state, batch, key=None, train=True)
    means = np.stack([np.asarray(x[0, :2]).mean(0), np.asarray(x[1, :3]).mean(0)])
    wanted = surprise(means @ np.asarray(params["head"]["kernel"]), y)
    np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-5)
    assert float(metrics["count"]) == 2


def test_a_mask_that_nobody_understands_is_refused():
    net, params, state, x, y, _ = classifier()
    batch = {"x": x, "y": y, "mask": jnp.ones((4, 5), bool)}
    with pytest.raises(dp.LayerError, match="mask of the labels' shape"):
        dp.classification()(net, params, state, batch, key=None, train=True)


def test_side_inputs_stand_in_the_batch_under_their_names():
    @dp.program(head=dp.linear(3))
    def net(layers, x, *, shift):
        return layers.head(x + shift)

    x, y, shift = jnp.asarray(drawn(4, 5)), jnp.array([0, 2, 1, 2]), jnp.asarray(drawn(5, seed=3))
    params, state = net.init(jax.random.key(0), x, shift=shift)
    batch = {"x": x, "y": y, "shift": shift}
    loss, _ = dp.classification()(net, params, state, batch, key=None, train=True)
    logits = np.asarray(x + shift) @ np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(loss, surprise(logits, y).mean(), rtol=1e-5)


def test_batches_of_another_form_are_refused():
    net, params, state, x, y, _ = classifier()
    for batch in ({"x": x, "y": y, "weight": y}, {"x": x}, {"inputs": x, "y": y}, x, (x,),
                  (x, y, y)):
        with pytest.raises(dp.LayerError, match="a batch"):
            dp.classification()(net, params, state, batch, key=None, train=True)
    with pytest.raises(dp.LayerError, match="reduction"):
        dp.classification(reduction="none")


def test_state_key_and_flag_reach_the_net():
    net = dp.serial(dp.batch_norm(), dp.dropout(0.5), dp.linear(3))
    x, y = jnp.asarray(drawn(4, 5)), jnp.array([0, 2, 1, 2])
    params, state = net.init(jax.random.key(0), x)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(seed, train):
        key = None if seed is None else jax.random.key(seed)
        return dp.classification()(net, params, state, (x, y), key=key, train=train)

    one, (moved, _) = run(1, True)
    other, _ = run(2, True)
    rest, (same, _) = run(None, False)
    assert float(one) != float(other) != float(rest)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    mean = moved["batch_norm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * np.asarray(x).mean(0), rtol=1e-5)
