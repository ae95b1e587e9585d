"""The examples that fill no batch: kept, dropped or padded, and the length of what there is."""

import itertools
import operator

import jax
import numpy as np
import optax
import pytest
from support.training_nets import KEY, NOISY, assert_same, examples, sgd

import diffprog as dp

X, Y = examples()
MAKERS = pytest.mark.parametrize("make", [dp.batches, dp.data.pipeline],
                                 ids=["batches", "pipeline"])


def rows(batch):
    """The examples of a batch without its padding."""
    return batch["x"][batch["mask"]].tolist() if isinstance(batch, dict) else batch.tolist()


@pytest.mark.parametrize(("make", "size"), [
    *[(dp.batches, size) for size in (1, 3, 7, 10)], (dp.data.pipeline, 3),
    *[pytest.param(dp.data.pipeline, size, marks=pytest.mark.slow) for size in (1, 7, 10)]],
    ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("remainder", ["keep", "drop", "pad"])
def test_each_example_comes_as_often_as_said(make, seed, epochs, size, remainder):
    if remainder == "drop" and size > 7 * (1 if seed is None else epochs):
        return  # refused, below
    data = make(np.arange(7), size, seed=seed, epochs=epochs, remainder=remainder)
    found = list(data)
    assert len(found) == len(data) == data.count
    kept = list(make(np.arange(7), size, seed=seed, epochs=epochs))
    wanted = [b.tolist() for b in kept if remainder != "drop" or len(b) == size]
    assert list(map(rows, found)) == wanted
    if remainder == "pad":
        assert {len(batch["x"]) for batch in found} == {size}
        assert {len(batch["mask"]) for batch in found} == {size}
    if remainder != "drop":
        assert sorted(itertools.chain(*map(rows, found))) == sorted([*range(7)] * epochs)


def test_endless_batches_have_no_length():
    data = dp.batches(np.arange(7), 3, seed=0)
    with pytest.raises(TypeError, match="has no length"):
        len(data)
    assert data and operator.length_hint(data, 5) == 5
    assert len(dp.batches(np.arange(7), 3, seed=0, epochs=2)) == 5


@MAKERS
@pytest.mark.parametrize("remainder", ["drop", "pad"])
@pytest.mark.parametrize("seed", [None, 0])
def test_batches_may_begin_at_any_number(make, remainder, seed):
    data = make(np.arange(7), 3, seed=seed, epochs=2, remainder=remainder)
    first = list(map(rows, data))
    for number in range(len(data)):
        assert list(map(rows, data.begun(number))) == first[number:]


@pytest.mark.parametrize(("data", "names"), [
    (X, {"x"}), ((X, Y), {"x", "y"}), ([X, Y], {"x", "y"}), ({"a": X, "mask": None}, {"a"}),
], ids=["array", "pair", "list", "dict"])
def test_padded_batches_are_dicts(data, names):
    first, last = dp.batches(data, 8, remainder="pad")
    assert first.keys() == last.keys() == names | {"mask"}
    assert first["mask"].all() and last["mask"].tolist() == [True] * 4 + [False] * 4
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(), first,
                 last)


def test_a_mask_of_the_data_is_cleared_in_the_padding():
    mask = np.arange(12).reshape(3, 4) % 3 > 0
    data = {"x": np.ones((3, 4, 2)), "mask": mask}
    first, last = dp.batches(data, 2, remainder="pad")
    assert (first["mask"] == mask[:2]).all() and (last["mask"][0] == mask[2]).all()
    assert not last["mask"][1].any()
    assert (data["mask"] == mask).all()  # the data is left as it is


SEQUENCES = np.random.default_rng(0).normal(size=(11, 5, 4)).astype(np.float32)
TIMES = np.arange(55).reshape(11, 5) % 4 > 0
IDS = np.random.default_rng(0).integers(0, 9, (11, 6))
LABELS = IDS[:, 0] % 3
GPT = dp.models.gpt(9, length=8, width=8, depth=1, heads=2)
EVALUATED = {
    "classification": (NOISY, dp.classification(), (X[:11], Y[:11])),
    "regression": (dp.linear(3), dp.regression(), (X[:11], X[:11, :3])),
    "weights": (dp.linear(3), dp.classification(),
                {"x": X[:11], "y": Y[:11], "sample_weight": np.arange(11.0)}),
    "draws": (dp.models.vae(dp.branch(dp.linear(2), dp.linear(2)), dp.linear(4)),
              dp.training.elbo(), (abs(X[:11]) % 1, abs(X[:11]) % 1)),
    "tokens": (dp.embedding(9, 4) >> dp.linear(9), dp.text.next_token(), IDS),
    "masked tokens": (GPT, dp.text.next_token(),
                      {"x": IDS, "mask": np.arange(66).reshape(11, 6) % 5 > 0}),
    "sequences": (dp.serial(dp.self_attention(2), dp.linear(3)), dp.classification(),
                  {"x": SEQUENCES, "y": IDS[:, :5] % 3, "mask": TIMES}),
}


FAST = {("classification", dp.batches), ("regression", dp.data.pipeline),
        ("tokens", dp.batches)}


@pytest.mark.parametrize(("name", "make"), [
    pytest.param(name, make, id=f"{name}-{make.__name__}",
                 marks=[] if (name, make) in FAST else pytest.mark.slow)
    for name in EVALUATED for make in (dp.batches, dp.data.pipeline)])
def test_metrics_of_padded_batches_are_those_of_the_data(name, make):
    net, objective, data = EVALUATED[name]
    step = dp.make_step(net, objective, optax.sgd(0.1))
    batch = jax.tree.map(lambda a: a[:4], data)
    state = step.init(KEY, step.inputs(batch)[0])
    found = dp.evaluate(step, state, make(data, 4, remainder="pad"))
    assert found == pytest.approx(dp.evaluate(step, state, [data]), rel=1e-5)
    kept = dp.evaluate(step, state, make(data, 4))
    assert found == pytest.approx(kept, rel=1e-5)
    if make is dp.batches:  # it matters that the padding is masked
        repeated = [{**b, "mask": np.ones_like(b["mask"])} for b in dp.batches(
            data, 4, remainder="pad")]
        assert dp.evaluate(step, state, repeated) != pytest.approx(kept, rel=1e-5)


def test_a_step_on_a_padded_batch_is_that_on_its_examples():
    """Statistics of batch norm too, for the net takes the mask."""
    step = sgd(dp.serial(dp.batch_norm(), dp.linear(3)))
    (padded,) = dp.batches((X[:5], Y[:5]), 8, remainder="pad")
    state, metrics = step.apply(step.init(KEY, X), padded)
    wanted, others = step.apply(step.init(KEY, X), (X[:5], Y[:5]))
    assert_same(state, wanted, rtol=1e-5, atol=1e-6)
    assert int(metrics["count"]) == int(others["count"]) == 5


def test_the_padding_needs_no_second_program():
    traced = []

    def objective(net, params, state, batch, *, key, train):
        traced.append(batch["x"].shape)
        return dp.regression()(net, params, state, batch, key=key, train=train)

    step = dp.make_step(dp.linear(3), objective, optax.sgd(0.1))
    state = step.init(KEY, X)
    for batch in dp.batches((X, X[:, :3]), 5, remainder="pad"):
        step.evaluate(state, batch, 0)
    assert set(traced) == {(5, 4)}
