"""Any iterable of pytrees trains: generators, loaders of PyTorch, data sets of Hugging Face.

Neither package is needed: without them, classes stand in that iterate and answer as theirs do.
"""

import importlib.util

import numpy as np
import pytest
from support.tensors import Tensor
from support.training_nets import KEY, assert_same, examples, sgd, train

import diffprog as dp

X, Y = examples()
SIZE = 5
WANTED = [(X[i : i + SIZE], Y[i : i + SIZE]) for i in range(0, 12, SIZE)]


class Loader:
    """As ``DataLoader(TensorDataset(x, y), batch_size)``: lists of tensors, and a length."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def __iter__(self):
        for i in range(0, 12, SIZE):
            yield [Tensor(array[i : i + SIZE]) for array in self.arrays]

    def __len__(self):
        return 3


class Dataset:
    """As ``datasets.Dataset.from_dict(...).with_format("numpy")``: columns by name."""

    def __init__(self, columns):
        self.columns = columns

    def iter(self, batch_size):
        for i in range(0, 12, batch_size):
            yield {name: column[i : i + batch_size] for name, column in self.columns.items()}

    def __getitem__(self, name):
        return self.columns[name]


def torch_loader():
    if importlib.util.find_spec("torch") is None:
        return Loader(X, Y)
    import torch

    data = torch.utils.data.TensorDataset(torch.asarray(X), torch.asarray(Y))
    return torch.utils.data.DataLoader(data, batch_size=SIZE)


def hugging_face():
    columns = {"x": X, "y": Y}
    if importlib.util.find_spec("datasets") is None:
        return Dataset(columns)
    import datasets

    data = datasets.Dataset.from_dict({name: list(a) for name, a in columns.items()})
    return data.with_format("numpy")


def forever():
    while True:
        yield from WANTED


class Again:
    """The batches of a data set, which iterates once, again and again."""

    def __iter__(self):
        return hugging_face().iter(batch_size=SIZE)


SOURCES = {"generator": forever, "loader": torch_loader, "data set": Again}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("ahead", [False, True], ids=["as it is", "transferred ahead"])
def test_training_is_the_same_from_any_source(name, ahead):
    source = SOURCES[name]()
    steps = 3 if ahead else 7  # an iterator is iterated once
    result = train(sgd(), dp.data.prefetch(source) if ahead else source, steps)
    assert_same(result.state, train(sgd(), WANTED, steps).state, rtol=1e-6)


@pytest.mark.parametrize("name", ["loader", "data set"])
def test_evaluation_is_the_same_from_any_source(name):
    state = sgd().init(KEY, X)
    assert dp.evaluate(sgd(), state, SOURCES[name]()) == pytest.approx(
        dp.evaluate(sgd(), state, WANTED), rel=1e-6)


def test_a_generator_is_not_read_further_than_needed():
    taken = []

    def source():
        for batch in forever():
            taken.append(batch)
            yield batch

    train(sgd(), source(), 4)
    assert len(taken) == 4


def test_columns_of_a_data_set_are_arrays_for_batches_and_pipelines():
    data = hugging_face()
    columns = {name: np.asarray(data[name][:]) for name in ("x", "y")}
    for make in (dp.batches, dp.data.pipeline):
        result = train(sgd(), make(columns, SIZE), 7)
        assert_same(result.state, train(sgd(), WANTED, 7).state, rtol=1e-6)
