"""Mean and deviation over seeds."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

NUMBERS = [0.9, 0.75, 0.8, 0.95]


def test_mean_and_deviation_are_those_of_statistics():
    found = dp.training.over_seeds(NUMBERS)
    assert found.mean == pytest.approx(statistics.mean(NUMBERS), rel=1e-14)
    assert found.deviation == pytest.approx(statistics.stdev(NUMBERS), rel=1e-14)


@pytest.mark.parametrize("results", [
    [{"loss": x, "accuracy": 1 - x} for x in NUMBERS],
    tuple({"loss": jnp.float32(x), "accuracy": np.float64(1 - x)} for x in NUMBERS),
    {"loss": np.array(NUMBERS), "accuracy": 1 - jnp.array(NUMBERS)},
], ids=["list", "tuple of arrays", "stacked"])
def test_results_are_a_list_or_have_an_axis_of_seeds(results):
    mean, deviation = dp.training.over_seeds(results)
    for name, sign in (("loss", 1), ("accuracy", -1)):
        values = [x if sign == 1 else 1 - x for x in NUMBERS]
        assert mean[name] == pytest.approx(statistics.mean(values), rel=1e-6)
        assert deviation[name] == pytest.approx(statistics.stdev(values), rel=1e-6)


def test_histories_keep_their_rows():
    histories = [[{"step": 50, "loss": x}, {"step": 100, "loss": x / 2}] for x in NUMBERS]
    mean, deviation = dp.training.over_seeds(histories)
    assert [row["step"] for row in mean] == [50, 100] and deviation[1]["step"] == 0
    assert mean[1]["loss"] == pytest.approx(mean[0]["loss"] / 2)
    assert deviation[1]["loss"] == pytest.approx(statistics.stdev(NUMBERS) / 2)


def test_sums_are_in_float64():
    """In bfloat16 the mean of 300 ones and twos would be off in the third digit."""
    x = jnp.asarray([1.0, 2.0] * 150, jnp.bfloat16)
    found = dp.training.over_seeds(x)
    assert found.mean == 1.5 and found.deviation == pytest.approx(statistics.stdev([1, 2] * 150))
    assert found.mean.dtype == float


def test_runs_of_vmap_are_results():
    losses = jax.vmap(lambda seed: {"curve": jnp.arange(3.0) * seed})(jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(dp.training.over_seeds(losses).mean["curve"], [0, 2, 4])


@pytest.mark.parametrize("results", [
    [], [0.5], [{"loss": 0.5}], {"loss": jnp.ones((1, 3))}, jnp.float32(3), {},
    {"loss": jnp.ones(3), "accuracy": jnp.ones(2)},
], ids=str)
def test_one_seed_has_no_deviation(results):
    with pytest.raises(dp.LayerError, match="wants results of at least 2 seeds"):
        dp.training.over_seeds(results)


@pytest.mark.parametrize("other", [
    {"accuracy": 0.5}, {"loss": np.ones(2)}, {"loss": 0.5, "accuracy": 0.5}, 0.5], ids=str)
def test_results_of_different_forms_raise(other):
    with pytest.raises(dp.LayerError, match="wants results of one form"):
        dp.training.over_seeds([{"loss": 0.5}, other])
