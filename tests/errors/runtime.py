"""What checkpoints and files of weights refuse."""

import contextlib
import pathlib
import tempfile
import unittest.mock
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog.runtime import Checkpoints, load_weights, manifests, save_weights

TREE = {"kernel": jnp.ones((2, 3))}
NET, X = dp.linear(3, bias=False), jnp.ones((2, 2))


def folder(*files):
    """A new folder with these files."""
    path = pathlib.Path(tempfile.mkdtemp())
    for name in files:
        (path / name).write_text("something")
    return path


def using(call, **options):
    """A call of checkpoints in a folder with a checkpoint of step 2."""
    def run():
        with Checkpoints(folder(), **options) as checkpoints, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoints.save(2, TREE)
            checkpoints.wait()
            call(checkpoints)

    return run


def changed(checkpoints):
    next((checkpoints.folder / "2" / "default").glob("_METADATA")).write_text("")
    checkpoints.restore(TREE)


def full(checkpoints):
    failing = OSError(28, "No space left on device")
    with unittest.mock.patch.object(manifests, "write", side_effect=failing):
        checkpoints.save(3, TREE)
        checkpoints.wait()


def shut():
    with unittest.mock.patch.object(pathlib.Path, "mkdir", side_effect=PermissionError(13, "No")):
        Checkpoints(folder() / "new")


def weights(call, params=None):
    """A call of the file with weights of the net."""
    def run():
        file = folder() / "net.safetensors"
        with contextlib.ExitStack() as stack:
            if params is not None:
                stack.enter_context(jax.enable_x64(True))
            save_weights(file, NET, params or TREE)
        call(file)

    return run


EXAMPLES = {
    "wants a folder for checkpoints, got the file ...":
        lambda: Checkpoints(folder("file") / "file"),
    "wants a folder of checkpoints, or an empty one, got ...":
        lambda: Checkpoints(folder("photo.png")),
    "wants a folder that can be written, got ...":
        shut,
    "wants a step after 2, the last in ...":
        using(lambda checkpoints: checkpoints.save(1, TREE)),
    "wants leaves that are arrays or numbers, got 'adam' at name; leave it out: data= takes what "
    "JSON can hold":
        using(lambda checkpoints: checkpoints.save(3, TREE | {"name": "adam"})),
    "wants the position in the data as bytes, or as dicts, lists, strings and numbers of Python, "
    "got {next: (1, 2)}; convert it: JSON has no other types":
        using(lambda checkpoints: checkpoints.save(3, TREE, data={"next": (1, 2)})),
    "wants the metric validation/loss, which selects the best, got loss; pass validation data, or "
    "metric=":
        using(lambda checkpoints: checkpoints.save(3, TREE, metrics={"loss": 1.0}), best=1),
    "wants checkpoint 3 written into ...":
        using(full),
    "wants a step out of 2, got 1; choose one of them":
        using(lambda checkpoints: checkpoints.restore(TREE, step=1)),
    "wants a checkpoint whose files are as they were saved, got ...":
        using(changed),
    "wants checkpoint 2 with the leaves of this net, got 1 that differ; compose the net that was "
    "saved, or rename what differs:\n  kernel: bfloat16[2,3], saved as float32[2,3]":
        using(lambda checkpoints: checkpoints.restore(
            {"kernel": TREE["kernel"].astype(jnp.bfloat16)})),
    "wants weights with the leaves of this net, got 1 that differ in weights of linear(3, "
    "bias=False); compose the net that was saved, or rename what differs:\n"
    "  params/bias: float32[3], not saved":
        weights(lambda file: load_weights(file, dp.linear(3), X)),
    "wants x with net, got none; pass an input: the shapes of parameters depend on it":
        weights(lambda file: load_weights(file, NET)),
    "wants a whole file of safetensors, got ...":
        lambda: load_weights(folder("net.safetensors") / "net.safetensors"),
    "wants arrays of a dtype that safetensors has, got int4[2,3] at params/kernel; cast it: "
    "leaf.astype(jnp.int8)":
        lambda: save_weights(folder() / "net", NET, {"kernel": jnp.ones((2, 3), jnp.int4)}),
    "wants leaves of at most 32 bits, got float64[2,3] at params/kernel; call "
    "jax.config.update('jax_enable_x64', True) before":
        weights(load_weights, {"kernel": np.ones((2, 3))}),
}
