"""A profile of some steps."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp

COUNT = 8


def steps(profile):
    """A run of 8 steps, each a program of its own name, observed after each."""
    state = jnp.ones(3)
    programs = []
    for number in range(1, COUNT + 1):
        def step(x):
            return 2 * x

        step.__name__ = f"step_{number}"
        programs.append(jax.jit(step))
        programs[-1].lower(state).compile()
    for number, program in enumerate(programs, 1):
        state = program(state)
        profile(number, state, {})


def traced(folder):
    """The numbers of the steps in the only trace of a folder."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = " ".join(str(event.get("name")) for event in events)
    return [number for number in range(1, COUNT + 1) if f"step_{number}" in names]


@pytest.mark.parametrize(("after", "count", "seen"), [(2, 3, [3, 4, 5]), (1, 1, [2])])
def test_a_trace_has_the_steps_that_it_was_asked_for(after, count, seen, tmp_path):
    steps(dp.runtime.trace(tmp_path, after=after, steps=count))
    assert traced(tmp_path) == seen


def test_a_run_that_stops_earlier_keeps_its_trace(tmp_path):
    with dp.runtime.trace(tmp_path, after=6, steps=100) as profile:
        steps(profile)
    assert traced(tmp_path) == [7, 8]


def test_a_run_that_stops_before_has_no_trace(tmp_path):
    with dp.runtime.trace(tmp_path, after=100, steps=1) as profile:
        steps(profile)
    assert not list(tmp_path.iterdir())


def test_steps_that_were_not_called_for_are_waited_for(tmp_path):
    """A loop that calls at readings only has a trace from one reading to another."""
    profile = dp.runtime.trace(tmp_path, after=3, steps=3)
    steps(lambda number, state, metrics: number % 2 or profile(number, state, metrics))
    assert traced(tmp_path) == [5, 6, 7, 8]


@pytest.mark.parametrize("wrong", [{"after": 0, "steps": 1}, {"after": 1, "steps": 0}], ids=str)
def test_counts_are_positive(wrong):
    with pytest.raises(dp.LayerError, match="as an int of at least 1"):
        dp.runtime.trace("folder", **wrong)
