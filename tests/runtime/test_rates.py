"""Rates: seconds per step, entries per second, utilization."""

import types
import typing

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("time.perf_counter", lambda: now.seconds)
    return now


def called(rates, clock, *calls, state=None):
    """What each call adds, at (step, seconds)."""
    for step, clock.seconds in calls:
        metrics = {}
        rates(step, state, metrics)
        yield metrics


def test_rates_are_those_between_two_calls(clock):
    rates = dp.runtime.rates(examples=64, tokens=1024)
    first, second, third = called(rates, clock, (50, 100.0), (100, 110.0), (101, 110.5))
    assert first == {}
    assert second == pytest.approx({"seconds_per_step": 0.2, "examples_per_second": 320,
                                    "tokens_per_second": 5120})
    assert third["seconds_per_step"] == 0.5


def test_another_run_begins_the_clock_again(clock):
    found = [*called(dp.runtime.rates(), clock, (50, 1.0), (50, 2.0), (10, 3.0), (20, 8.0))]
    assert found == [{}, {}, {}, {"seconds_per_step": 0.5}]


def test_utilization_is_operations_over_the_peak_of_all_devices(clock):
    """A product of (64, 32) and (32, 16) has 2 * 64 * 32 * 16 operations, in three passes."""
    net = dp.linear(16, bias=False)
    flops = 3 * dp.summary(net, jax.ShapeDtypeStruct((64, 32), jnp.float32)).flops
    rates = dp.runtime.rates(flops=flops, peak=1e9)
    _, found = called(rates, clock, (1, 0.0), (11, 0.01), state={"a": jnp.ones(2), "b": 1})
    assert found["flops_per_second"] == pytest.approx(6 * 64 * 32 * 16 * 1000)
    assert found["utilization"] == pytest.approx(6 * 64 * 32 * 16 * 1000 / 1e9)


def test_a_cpu_has_no_utilization_unless_its_peak_is_given(clock):
    _, found = called(dp.runtime.rates(flops=1e9), clock, (1, 0.0), (2, 1.0), state=jnp.ones(2))
    assert found == {"seconds_per_step": 1, "flops_per_second": 1e9}


def placed(kind, count):
    """What stands for an array on several devices of a kind."""
    devices = frozenset(Device(kind, i) for i in range(count))
    return types.SimpleNamespace(sharding=types.SimpleNamespace(device_set=devices))


class Device(typing.NamedTuple):
    device_kind: str
    id: int


@pytest.mark.parametrize(("kind", "peak", "wanted"), [
    ("NVIDIA H200", None, 1e15 / (4 * 989e12)), ("TPU v5 lite", None, 1e15 / (4 * 197e12)),
    ("NVIDIA H200", 500e12, 0.5), ("novel", 250e12, 1.0), ("TPU v4 lite", None, None),
])
def test_the_peak_is_that_of_the_kind_or_the_given_one(clock, kind, peak, wanted):
    """A counter of steps may be on one device only."""
    state = {"step": placed(kind, 1), "params": placed(kind, 4)}
    rates = dp.runtime.rates(flops=1e15, peak=peak)
    _, found = called(rates, clock, (1, 0.0), (2, 1.0), state=state)
    assert found.get("utilization") == (wanted and pytest.approx(wanted))


@pytest.mark.parametrize("wrong", [
    {"flops": 0}, {"peak": -1e12}, {"examples": "64"}, {"tokens": float("nan")}], ids=str)
def test_what_is_not_positive_raises(wrong):
    with pytest.raises(dp.LayerError, match=f"wants {next(iter(wrong))} as a positive number"):
        dp.runtime.rates(**wrong)
