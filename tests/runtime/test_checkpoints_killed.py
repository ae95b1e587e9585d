"""Runs that are killed at any moment, and checkpoints of which any bit flips."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import pytest

from diffprog.runtime import Checkpoints, manifests

CHILD = pathlib.Path(__file__).with_name("training_child.py")
ROOT = CHILD.parents[2]
KILLS, TRIES, STEPS = 20, 20, 1000


def drawn(name):
    """Random numbers of a new seed, which is printed; SEED=... repeats one."""
    seed = int(os.environ.get("SEED", random.randrange(2**32)))
    print(f"{name}: SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def start(tmp_path):
    """A function that starts the child, which finds its programs in a cache."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
             "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

    def start(folder, save_every, steps=STEPS):
        return subprocess.Popen(
            [sys.executable, str(CHILD), str(folder), str(save_every), str(steps)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **cache, "PYTHONPATH": str(ROOT)})

    return start


def incomplete(folder):
    """What an interrupted save left: a partial folder, or one without a manifest."""
    return {path for path in folder.iterdir() if path.is_dir() and (
        not path.name.isdigit() or not (path / manifests.NAME).exists())}


def killed(process, saves, delay):
    """The number and the hash from which a child went on, before it was killed.

    The moment is `delay` seconds after it began so many saves: the machine may be slow.
    """
    _, number, digest = process.stdout.readline().split()
    for _ in range(saves):
        process.stdout.readline()
    time.sleep(delay)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    return int(number), digest, process.communicate()[1]


@pytest.mark.slow
def test_a_run_killed_20_times_ends_as_if_it_were_not(start, tmp_path):
    undisturbed = start(tmp_path / "other", 0)
    draw, folder, during = drawn("kills"), tmp_path / "run", 0
    before, left = [], set()
    out, errors = undisturbed.communicate()
    assert undisturbed.returncode == 0 and not errors
    digests = dict(line.split()[-2:] for line in out.splitlines() if not line.startswith("at"))
    for kill in range(KILLS):
        number, digest, errors = killed(start(folder, 5), draw.randrange(6),
                                        draw.uniform(0, 0.15))
        assert digest == digests[str(number)]
        assert (not errors) if before or not kill else ("begin at step 0" in errors), errors
        with Checkpoints(folder) as checkpoints:
            before = checkpoints.steps
        assert number <= (before[-1] if before else 0) < STEPS
        now = incomplete(folder)
        during += bool(now - left)
        left = now
    print(f"{KILLS} kills, {during} during a save, the last at step {before[-1]}")
    assert during >= 5 and before[-1] > 50
    last = start(folder, 100)
    out, errors = last.communicate()
    assert last.returncode == 0 and not errors
    assert out.splitlines()[0].split()[1] == str(before[-1])
    assert out.splitlines()[-1] == f"done {STEPS} {digests[str(STEPS)]}"
    assert not incomplete(folder)


@pytest.mark.slow
def test_no_flipped_bit_is_loaded_silently(tmp_path):
    """Anywhere in the newest checkpoint, each file as likely as its size."""
    tree = {"kernel": jax.random.normal(jax.random.key(0), (200, 200)),
            "scale": jnp.ones(50, jnp.bfloat16), "key": jax.random.key(1)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree | {"step": jnp.int32(step)}, data={"next": step})
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file())
    draw, touched = drawn("flips"), set()
    for i in range(TRIES):
        # Half of the tries choose a file first, as nearly all bits are those of arrays.
        sizes = [1 if i % 2 else path.stat().st_size for path in files]
        path, = draw.choices(files, [size * bool(path.stat().st_size) for size, path
                                     in zip(sizes, files, strict=True)])
        whole = path.read_bytes()
        bit = draw.randrange(8 * len(whole))
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8])
                         + whole[bit // 8 + 1 :])
        with warnings.catch_warnings(record=True) as said, Checkpoints(tmp_path) as checkpoints:
            warnings.simplefilter("always")
            number, found, data = checkpoints.restore(tree | {"step": jnp.int32(0)})
        assert str(path) in str(said[0].message) and "step 1 is used" in str(said[0].message)
        assert number == int(found["step"]) == data["next"] == 1
        path.write_bytes(whole)
        touched.add(path.name)
    assert len(touched) > 3
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(tree | {"step": jnp.int32(0)})[0] == 2
