"""Pipelines read by grain: shuffled, changed, ahead, and resumed bit by bit."""

import itertools
import json
import sys
import threading

import jax
import numpy as np
import pytest
from support.training_nets import assert_same, examples, noisy, train

import diffprog as dp

X, Y = examples()


@pytest.fixture
def data(tmp_path):
    """Arrays on disk."""
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    return {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x", "y")}


@jax.jit
def noise(key, batch):
    return {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape)}


def bits(batch):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(batch)]


def first(iterator, count):
    return [bits(batch) for batch in itertools.islice(iterator, count)]


def test_arrays_on_disk_are_not_read_at_once(data):
    pipeline = dp.data.pipeline(data, 5)
    base = pipeline.data["x"]
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)


def test_without_a_seed_it_yields_what_batches_yields(data):
    for options in ({}, {"epochs": 2}, {"remainder": "pad"}, {"remainder": "drop", "epochs": 3}):
        found, wanted = (list(make(data, 5, **options)) for make in (dp.data.pipeline, dp.batches))
        assert list(map(bits, found)) == list(map(bits, wanted))
        assert [jax.tree.map(np.shape, b) for b in found] == [
            jax.tree.map(np.shape, b) for b in wanted]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_with_a_seed_every_example_comes_once_an_epoch(size):
    count, epochs = 7, 5
    data = dp.data.pipeline(np.arange(count), size, seed=0)
    got = list(itertools.islice(data, -(-count * epochs // size)))
    assert {len(batch) for batch in got} == {size}
    stream = np.concatenate(got)[: count * epochs].reshape(epochs, count)
    assert (np.sort(stream, 1) == np.arange(count)).all()
    assert len({tuple(epoch) for epoch in stream}) > 1
    other = itertools.islice(dp.data.pipeline(np.arange(count), size, seed=9), len(got))
    assert np.concatenate(got).tolist() != np.concatenate(list(other)).tolist()


@pytest.mark.parametrize("options", [
    {"seed": 3, "transform": noise}, {"seed": 3, "epochs": 4, "remainder": "pad"}, {"epochs": 4}],
    ids=["changed", "padded", "in order"])
@pytest.mark.parametrize("taken", [0, 1, 6])
def test_a_fresh_iterator_goes_on_from_a_state(data, options, taken):
    """By JSON, as a checkpoint keeps it; what is read ahead does not count."""
    begun = iter(dp.data.pipeline(data, 5, **options))
    for _ in range(taken):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))
    wanted = first(begun, 3)
    again = iter(dp.data.pipeline(data, 5, **options))
    again.set_state(state)
    assert first(again, 3) == wanted
    assert first(dp.data.pipeline(data, 5, **options).begun(taken), 3) == wanted
    assert len({str(batch) for batch in wanted}) == 3


def test_a_prefetched_pipeline_goes_on_from_a_state(data):
    options = {"seed": 3, "transform": noise}
    begun = dp.data.prefetch(dp.data.pipeline(data, 5, **options))
    for _ in range(4):
        next(begun)
    again = dp.data.prefetch(dp.data.pipeline(data, 5, **options))
    again.set_state(begun.get_state())
    assert first(again, 3) == first(begun, 3)


def test_the_key_is_that_of_the_number_of_the_batch(data):
    keys = dp.data.pipeline(data, 5, seed=3, transform=lambda key, batch: key)
    for number, key in enumerate(itertools.islice(keys, 6)):
        assert key == jax.random.fold_in(jax.random.key(3), number)
    assert list(dp.data.pipeline(data, 12, transform=lambda key, batch: {"key": key})) == [
        {"key": None}]


def test_a_transform_sees_the_padding():
    seen = dp.data.pipeline(X, 8, remainder="pad", transform=lambda key, batch: batch["mask"].sum())
    assert list(seen) == [8, 4]


def test_batches_are_prepared_ahead_by_other_threads():
    threads, four = set(), threading.Barrier(4, timeout=20)

    def meet(key, batch):
        threads.add(threading.get_ident())
        four.wait()  # four batches at a time, or it breaks
        return batch

    assert next(iter(dp.data.pipeline(np.arange(16), 2, transform=meet))).tolist() == [0, 1]
    assert len(threads) == 4 and threading.get_ident() not in threads


def test_errors_of_a_transform_are_passed_on():
    def fail(key, batch):
        if 4 in batch:
            raise OSError("disk")
        return batch

    iterator = iter(dp.data.pipeline(np.arange(16), 2, transform=fail))
    assert next(iterator).tolist() == [0, 1] and next(iterator).tolist() == [2, 3]
    with pytest.raises(OSError, match="disk"):
        next(iterator)


def test_fit_goes_on_where_it_was(data):
    def pipeline():
        return dp.data.pipeline(data, 5, seed=0, transform=noise)

    straight = train(noisy(), pipeline(), 7).state
    half = train(noisy(), pipeline(), 3)
    assert_same(train(noisy(), pipeline(), 4, state=half).state, straight)


def test_endless_pipelines_cannot_be_evaluated(data):
    with pytest.raises(dp.LayerError, match="that ends"):
        dp.evaluate(noisy(), noisy().init(jax.random.key(0), X), dp.data.pipeline(data, 5, seed=0))


def test_the_repr_shows_the_call(data):
    assert repr(dp.data.pipeline(data, 5, seed=0)) == (
        "pipeline({x: float32[12,4], y: int32[12]}, 5, seed=0, epochs=None, remainder='keep')")


def test_without_grain_an_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'diffprog\[data\]'"):
        dp.data.pipeline(X, 5)
