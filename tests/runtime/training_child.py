"""A training run that may be killed: ``python training_child.py FOLDER SAVE_EVERY STEPS``.

It prints the step from which it goes on with the hash of the parameters there, a line when it
begins, and the hash at the end. Without saves (SAVE_EVERY 0) it prints the hash of every step.
"""

import hashlib
import sys

import jax
import numpy as np
import optax

import diffprog as dp

X = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
DATA = dp.batches((X, np.arange(64) % 10), 8, seed=0)
NET = dp.serial(dp.linear(512), jax.nn.relu, dp.dropout(0.1), dp.linear(512), dp.linear(10))


def digest(state):
    """The hash of the parameters."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state.params):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def endless(first):
    stream = DATA.begun(first)
    while True:
        yield from stream
        stream = iter(DATA)


def main(folder, save_every, steps):
    """Train from the last checkpoint in the folder to the last step."""
    step = dp.make_step(NET, dp.classification(), optax.adam(1e-3))
    key = jax.random.key(0)
    begin, state = 0, step.init(key, X[:8])
    with dp.runtime.Checkpoints(folder, save_every=max(save_every, 1), last=2) as checkpoints:
        if found := checkpoints.restore(state):
            begin, state, data = found
            assert data is None and int(state.step) == begin
        print("resumed", begin, digest(state), flush=True)
        stream = endless(begin)
        for number in range(begin + 1, steps + 1):
            state, metrics = step.apply(state, next(stream))
            if save_every:
                checkpoints(number, state, metrics)
            else:
                print(number, digest(state))
            if number % 5 == 0:
                print("at", number, flush=True)
    print("done", steps, digest(state), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
