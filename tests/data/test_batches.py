"""`batches`: every example comes once per epoch, in an order that the seed determines."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffprog as dp


def first(batches, count):
    return list(itertools.islice(batches, count))


def test_without_a_seed_batches_are_one_epoch_in_order():
    x = np.arange(14).reshape(7, 2)
    got = list(dp.batches(x, 3))
    assert [batch.tolist() for batch in got] == [
        [[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]], [[12, 13]]]


@pytest.mark.parametrize("seed", [None, 3])
def test_iterating_again_yields_the_same_batches(seed):
    data = dp.batches(np.arange(7), 3, seed=seed)
    again = [first(data, 3), first(data, 3)]
    assert [b.tolist() for b in again[0]] == [b.tolist() for b in again[1]]


@pytest.mark.parametrize("size", [1, 3, 7, 10, 16])
def test_with_a_seed_every_example_comes_once_an_epoch(size):
    count, epochs = 7, 5
    got = first(dp.batches(np.arange(count), size, seed=0), -(-count * epochs // size))
    assert {len(batch) for batch in got} == {size}
    stream = np.concatenate(got)[: count * epochs].reshape(epochs, count)
    assert (np.sort(stream, 1) == np.arange(count)).all()
    assert len({tuple(epoch) for epoch in stream}) == epochs  # each in an order of its own


def test_the_seed_decides_the_order():
    orders = {seed: [b.tolist() for b in first(dp.batches(np.arange(20), 5, seed=seed), 8)]
              for seed in (0, 1)}
    again = [b.tolist() for b in first(dp.batches(np.arange(20), 5, seed=1), 8)]
    assert orders[0] != orders[1] == again
    assert orders[0][0] != [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", [None, 0])
def test_leaves_of_a_pytree_stay_together(seed):
    x = np.arange(6)
    data = {"x": (x, np.stack([x, -x], 1)), "y": jnp.asarray(10 * x)}
    for batch in first(dp.batches(data, 4, seed=seed), 5):
        rows, pairs = batch["x"]
        assert len(rows) and set(batch) == {"x", "y"}
        np.testing.assert_array_equal(pairs, np.stack([rows, -rows], 1))
        np.testing.assert_array_equal(batch["y"], 10 * rows)
    pair = next(iter(dp.batches((x, x), 4, seed=seed)))
    assert isinstance(pair, tuple) and len(pair) == 2


@pytest.mark.parametrize("seed", [None, 0])
def test_dtypes_are_kept(seed):
    data = (np.ones((4, 2), np.uint8), jnp.ones(4, jnp.bfloat16))
    a, b = next(iter(dp.batches(data, 2, seed=seed)))
    assert (a.dtype, b.dtype) == (np.uint8, jnp.bfloat16)


@pytest.mark.parametrize("data", [
    (np.ones(3), np.ones(4)), np.ones(0), np.float32(1), (np.ones(3), np.ones(())), {},
    {"x": np.ones((0, 3))},
], ids=["two lengths", "no entries", "a scalar", "one scalar", "no arrays", "no entries, by name"])
def test_arrays_of_different_lengths_are_refused(data):
    with pytest.raises(dp.LayerError, match="one length"):
        dp.batches(data, 2)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_batch_size_is_a_positive_int(size):
    with pytest.raises(dp.LayerError, match="batch_size"):
        dp.batches(np.ones(3), size)


def test_nested_lists_are_refused():
    with pytest.raises(dp.LayerError, match="arrays with a batch axis"):
        dp.batches([[1.0, 2.0], [3.0, 4.0]], 1)


def test_the_repr_of_batches_shows_their_data():
    data = dp.batches((np.ones((1000, 30)), np.ones(1000)), 10, seed=0)
    assert repr(data) == ("batches((float64[1000,30], float64[1000]), 10, seed=0, epochs=None, "
                          "remainder='keep')")


@pytest.mark.parametrize("data", [None, len, 3, (np.ones((4, 3)), np.ones(4)), {"x": np.ones(3)}])
def test_a_single_batch_is_refused(data):
    step = dp.make_step(dp.linear(2), dp.regression(), optax.sgd(0.1))
    with pytest.raises(dp.LayerError, match="data as an iterable of batches"):
        dp.fit(step, data, steps=1, key=jax.random.key(0), progress=False)
