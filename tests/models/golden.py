"""Golden files: the path, shape and dtype of every parameter and statistic of the models.

They keep checkpoints loadable: a renamed parameter breaks the test that reads them. Write them
anew, and say so in the changelog, by

    python tests/models/golden.py
"""

import json
import pathlib

import jax
import jax.numpy as jnp

import diffprog as dp
from diffprog.notation import show

FOLDER = pathlib.Path(__file__).parent / "golden"
IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
MODELS = {
    "mlp": (dp.mlp((64, 32), 10), jax.ShapeDtypeStruct((1, 16), jnp.float32)),
    "alexnet": (dp.alexnet(), jax.ShapeDtypeStruct((1, 227, 227, 3), jnp.float32)),
    **{f"resnet_{depth}": (dp.resnet(depth), IMAGE) for depth in (18, 34, 50, 101, 152)},
}


def structure(name):
    net, x = MODELS[name]
    plan = net.plan(x)
    return {kind: {path: show(leaf) for path, leaf in dp.tree.paths(trees).items()}
            for kind, trees in (("params", plan.params), ("state", plan.state))}


if __name__ == "__main__":
    for name in MODELS:
        text = json.dumps(structure(name), indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n")
