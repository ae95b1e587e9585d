"""A `TrainState` saved and loaded by other libraries is the same bit for bit."""

import io
import pickle

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
from support.comparing import KEY, same

import diffprog as dp

BATCH = (np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), np.arange(6) % 3)
NET = dp.serial(dp.batch_norm(), dp.linear(4), dp.dropout(0.5), dp.linear(3))
STEP = dp.make_step(NET, dp.classification(), optax.adam(1e-2))


def in_numbers(state):
    return state._replace(key=jax.random.key_data(state.key))


def with_key(state):
    return state._replace(key=jax.random.wrap_key_data(jnp.asarray(state.key)))


def by_pickle(state, like, path):
    return pickle.loads(pickle.dumps(state))


def by_orbax(state, like, path):
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", like)


def by_flax(state, like, path):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def by_equinox(state, like, path):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)


def by_names(state, like, path):
    """Named arrays in a file of NumPy, as in safetensors."""
    np.savez(path / "state.npz", **dp.tree.paths(state))
    with np.load(path / "state.npz") as loaded:
        return jax.tree.unflatten(jax.tree.structure(like), [
            loaded[name] for name in dp.tree.paths(like)])


WHOLE = [by_pickle, by_orbax]
NUMBERS = [by_flax, by_equinox, by_names]


@pytest.fixture(scope="module")
def trained():
    """States after one and two steps; made anew because a step donates its state."""
    fresh = lambda: STEP.init(KEY, BATCH[0])  # noqa: E731
    first = lambda: STEP.apply(fresh(), BATCH)[0]  # noqa: E731
    return first(), STEP.apply(first(), BATCH)[0], STEP.init(jax.random.key(7), BATCH[0])


def goes_on(loaded, trained):
    first, second, _ = trained
    assert jax.random.key_impl(loaded.key) == jax.random.key_impl(first.key)
    same(in_numbers(loaded), in_numbers(first))
    same(in_numbers(STEP.apply(jax.tree.map(jnp.array, loaded), BATCH)[0]), in_numbers(second))


@pytest.mark.parametrize("saved", WHOLE)
def test_a_state_is_saved_as_it_is(saved, trained, tmp_path):
    goes_on(saved(trained[0], trained[2], tmp_path), trained)


@pytest.mark.parametrize("saved", NUMBERS)
def test_a_state_is_saved_with_its_key_data(saved, trained, tmp_path):
    goes_on(with_key(saved(in_numbers(trained[0]), in_numbers(trained[2]), tmp_path)), trained)


@pytest.mark.parametrize("saved", NUMBERS)
def test_these_formats_do_not_save_keys(saved, trained, tmp_path):
    """As the README says; if this fails, remove it from the README."""
    with pytest.raises((TypeError, RuntimeError), match="key"):
        saved(trained[0], trained[2], tmp_path)
