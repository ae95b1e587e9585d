"""One program in two processes gives the same bits; docs/reproducibility.md says what else does."""

import os
import subprocess
import sys

import pytest

TRAIN = """
import hashlib, jax, numpy as np, optax, os, diffprog as dp
if hasattr(os, "sched_setaffinity") and {cores}:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
draw = np.random.default_rng(0)
images, y = draw.normal(size=(64, 8, 8, 1)).astype(np.float32), draw.integers(0, 3, 64)
net = dp.serial(dp.conv(8, 3), dp.batch_norm(), jax.nn.relu, dp.flatten(), dp.dropout(0.1),
                dp.linear(64), dp.layer_norm(), jax.nn.gelu, dp.linear(3))
step = dp.make_step(net, dp.classification(), optax.adam(1e-2))
state = dp.fit(step, dp.batches((images, y), 16, seed=0), key=jax.random.key({seed}), steps=10,
               progress=False).state
print(hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(
    (state.params, state.state, state.opt_state)))).hexdigest())
"""


def trained(seed=0, cores=0, hashing="1"):
    """The hash of the trained parameters, statistics and averages."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.format(seed=seed, cores=cores)], capture_output=True,
        text=True, check=True, timeout=300, env=os.environ | {"PYTHONHASHSEED": hashing})
    return done.stdout


@pytest.mark.slow
def test_a_run_has_the_same_bits_in_another_process():
    """With other hashes of Python, and on one core."""
    once = trained()
    assert trained(hashing="2") == once
    assert trained(cores=1) == once
    assert trained(seed=1) != once
