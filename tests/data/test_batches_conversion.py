"""Batches from other sources: tensors and tables of other libraries, lists of labels, loaders."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.refusing import expect, refused
from support.tensors import Tensor
from support.training_nets import KEY, assert_same, examples, sgd, train

import diffprog as dp

X, Y = examples()


class Table:
    """Like a pandas table: iterating yields column names, and there is no common dtype."""

    def __init__(self, columns):
        self.columns = columns

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __array__(self, dtype=None, copy=None):
        return np.stack(list(self.columns.values()), 1)


STRUCTURED = np.zeros(12, [("x", np.float32, (4,)), ("y", np.int64)])
STRUCTURED["x"], STRUCTURED["y"] = X, Y
TABLE = Table({f"feature_{i}": X[:, i] for i in range(4)})
BROUGHT = {
    "tensors": (Tensor(X), Tensor(Y.astype(np.int64))),
    "dict": {"x": Tensor(X), "y": Tensor(Y.astype(np.int64))},
    "collated": [Tensor(X), Tensor(Y)],
    "table": (TABLE, Tensor(Y)),
    "structured": STRUCTURED,
    "labels": (X, Y.tolist()),
    "labels of NumPy": {"x": X, "y": list(Y)},
    "wide": (X.astype(np.float64), Y.astype(np.int64)),
}


@pytest.mark.parametrize("name", BROUGHT)
def test_lists_tables_and_tensors_are_converted(name):
    batch = BROUGHT[name]
    wanted = train(sgd(), [(X, Y)], 2, validation=[(X, Y)])
    for data in ([batch], dp.batches(batch, 12)):
        result = train(sgd(), data, 2, validation=data)
        assert_same(result.state, wanted.state)
        assert result.history == wanted.history


def test_a_step_converts_its_batch():
    x = Tensor(X)
    state, _ = sgd().apply(sgd().init(KEY, x), (x, Y.tolist()))
    assert_same(state, train(sgd(), [(X, Y)], 1).state)
    assert sgd().evaluate(state, (x, Tensor(Y))) == sgd().evaluate(state, (X, Y))


@pytest.mark.parametrize("x", [Tensor(X), TABLE], ids=["tensor", "table"])
def test_predict_converts_its_input(x):
    params = sgd().init(KEY, X).params
    np.testing.assert_array_equal(dp.predict(sgd().net, params, x, batch_size=5),
                                  dp.predict(sgd().net, params, X, batch_size=5))


def test_an_error_shows_a_tensor():
    assert refused(sgd().inputs, (Tensor(X), 1, 2)).got == "(torch.float32[12,4], 1, 2)"


@pytest.mark.parametrize("y", [
    ["cat"] * 12, np.array(["cat"] * 12), np.array([None] * 12), [[0, 1], [1]],
    [[0], [1]], "cat", np.array(["2020-01-01"] * 12, "datetime64[D]")], ids=repr)
@pytest.mark.parametrize("use", [
    lambda data: train(sgd(), data, 1),
    lambda data: dp.evaluate(sgd(), sgd().init(KEY, X), data),
], ids=["fit", "evaluate"])
def test_arrays_of_strings_are_refused(y, use):
    assert "arrays of numbers" in refused(use, [(X, y)]).wants


@pytest.mark.parametrize("call", [
    lambda x: sgd().net.init(KEY, x), lambda x: sgd().net(sgd().init(KEY, X).params, x),
    lambda x: dp.losses.cross_entropy(x, jnp.asarray(Y)), lambda x: dp.losses.cross_entropy(X, x),
    lambda x: dp.metrics.accuracy(x, jnp.asarray(Y))], ids=range(5))
def test_a_single_tensor_must_be_converted(call):
    error = refused(call, Tensor(X))
    assert error.got == "torch.float32[12,4]" and "jnp.asarray" in error.remedy


@pytest.mark.slow
def test_per_example_gradients_convert_their_batch():
    params = sgd().init(KEY, X).params
    ask = lambda batch: dp.gradients.per_example_gradients(  # noqa: E731
        sgd().net, dp.classification(), params, {}, batch)
    wanted = ask((X, Y))
    for batch in ((Tensor(X), Tensor(Y)), (TABLE, Y.tolist()), STRUCTURED):
        jax.tree.map(np.testing.assert_array_equal, ask(batch), wanted)
    kernel = dp.gradients.tangent_kernel(sgd().net, params, Tensor(X), TABLE)
    np.testing.assert_array_equal(kernel, dp.gradients.tangent_kernel(sgd().net, params, X, X))


def test_a_batch_may_hold_keys_and_scalars():
    batch = {"x": X, "y": Y, "key": jax.random.key(0), "scale": 0.5, "flag": True, "none": None}

    def objective(net, params, state, batch, *, key, train):
        loss = batch["scale"] * net(params, batch["x"]).sum() * batch["flag"]
        return loss, (state, {"loss": loss})

    objective.inputs = lambda net, batch: (batch["x"], {})
    step = dp.make_step(sgd().net, objective, optax.sgd(0.1))
    assert int(train(step, [batch], 1).state.step) == 1


class Again:
    """A loader that is its own iterator, and restarts in ``__iter__``."""

    def __iter__(self):
        self.left = iter([(X[:6], Y[:6]), (X[6:], Y[6:])])
        return self

    def __next__(self):
        return next(self.left)


def test_a_loader_may_be_its_own_iterator():
    wanted = train(sgd(), [(X[:6], Y[:6]), (X[6:], Y[6:])], 5, log_every=2, validation=[(X, Y)])
    result = train(sgd(), Again(), 5, log_every=2, validation=Again())
    assert_same(result.state, wanted.state)
    assert [row["validation/loss"] for row in result.history] == pytest.approx(
        [row["validation/loss"] for row in wanted.history], rel=1e-6)


def test_endless_batches_cannot_be_evaluated():
    data = dp.batches((X, Y), 5, seed=0)
    state = sgd().init(KEY, X)
    end = "that ends, got endless batches(..., seed=...); write batches(..., epochs=1)"
    expect("", f"wants data {end}", dp.evaluate, sgd(), state, data)
    expect("", f"wants validation data {end}", train, sgd(), data, 1, validation=data)
    once = dp.batches((X, Y), 5, seed=0, epochs=1)
    assert dp.evaluate(sgd(), state, once) == pytest.approx(
        dp.evaluate(sgd(), state, [(X, Y)]), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3, 7, 10, 16])
@pytest.mark.parametrize("seed", [None, 0])
def test_each_example_comes_once_per_epoch(size, seed):
    data = dp.batches(np.arange(7), size, seed=seed, epochs=3)
    found = [batch.tolist() for batch in data]
    assert sorted(itertools.chain(*found)) == sorted([*range(7)] * 3)
    assert len(found) == data.count
    if seed is None:
        assert found == [batch.tolist() for batch in dp.batches(np.arange(7), size)] * 3
    else:
        endless = itertools.islice(dp.batches(np.arange(7), size, seed=seed), 21 // size)
        assert found[: 21 // size] == [batch.tolist() for batch in endless]
        assert {len(batch) for batch in found[:-1]} <= {size}


@pytest.mark.parametrize("options", [{}, {"seed": 0}, {"epochs": 2}, {"seed": 1, "epochs": 2}],
                         ids=str)
def test_batches_may_begin_at_any_number(options):
    data = dp.batches(jnp.arange(7), 3, **options)
    count = data.count or 9
    first = [batch.tolist() for batch in itertools.islice(data, count)]
    for number in range(count):
        found = itertools.islice(data.begun(number), count - number)
        assert [batch.tolist() for batch in found] == first[number:]
    if data.count:
        assert next(data.begun(count + 1)).tolist() == first[1]
