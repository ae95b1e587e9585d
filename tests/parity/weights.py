"""Published weights and what the original implementations made of them, read as ours.

The folders hold weights, inputs, outputs and gradients of Hugging Face transformers 5.23.0; they
are read where the environment variable DIFFPROG_PARITY names the folder that they are in.
"""

import json
import os
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

ROOT = os.environ.get("DIFFPROG_PARITY")
AGAINST_ORIGINALS = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(ROOT is None, reason="DIFFPROG_PARITY names no folder")]


def folder(name):
    return pathlib.Path(ROOT or ".") / name


def described(name, file="config"):
    return json.loads((folder(name) / f"{file}.json").read_text())


def tensors(name, file="model"):
    """The arrays of a safetensors file: a length, a header in JSON, and the bytes."""
    data = (folder(name) / f"{file}.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    kinds = {"F32": np.float32, "I64": np.int64}
    return {name: np.frombuffer(data[8 + size :][slice(*entry["data_offsets"])],
                                kinds[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()}


def nested(leaves):
    """A tree of a dict from paths to arrays."""
    result = {}
    for path, value in leaves.items():
        *folders, leaf = path.split("/")
        at = result
        for name in folders:
            at = at.setdefault(name, {})
        at[leaf] = jnp.asarray(value)
    return result


def close(ours, wanted, tolerance):
    """Assert that all that is wanted is there, each array but for a share of its largest number.

    Biases of keys change no attention: their gradients are zero but for rounding, and are
    measured by the largest of all.
    """
    ours, wanted = dp.tree.paths(ours), dp.tree.paths(wanted)
    largest = max(np.abs(leaf).max() for leaf in wanted.values())
    for path, leaf in wanted.items():
        other = np.asarray(ours[path])
        assert other.shape == leaf.shape, path
        atol = 1e-6 * largest if path.endswith("key/bias") else tolerance * np.abs(leaf).max()
        assert np.abs(other - leaf).max() <= atol, path
