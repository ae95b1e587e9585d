"""Golden files: the path, shape and dtype of every parameter and statistic of the models.

They keep checkpoints loadable: a renamed parameter fails the test that reads them. To update them,
with an entry in the changelog, run

    python tests/models/golden.py
"""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

import diffprog as dp
from diffprog.core.notation import show

FOLDER = pathlib.Path(__file__).parent / "golden"
IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
LATENT = dp.branch(mean=dp.linear(2), log_variance=dp.linear(2))
STEP = {"time": jax.ShapeDtypeStruct((1,), jnp.int32)}
READER = dp.recurrent(dp.gru(64), bidirectional=True)


class Model(NamedTuple):
    """A net, its input, and its required side inputs."""

    net: dp.Layer
    x: jax.ShapeDtypeStruct
    side: dict[str, jax.ShapeDtypeStruct] | None = None

    def plan(self):
        return self.net.plan(self.x, **self.side or {})


MODELS = {
    "mlp": Model(dp.models.mlp((64, 32), 10), jax.ShapeDtypeStruct((1, 16), jnp.float32)),
    "alexnet": Model(dp.models.alexnet(), jax.ShapeDtypeStruct((1, 227, 227, 3), jnp.float32)),
    **{f"resnet_{depth}": Model(dp.models.resnet(depth), IMAGE)
        for depth in (18, 34, 50, 101, 152)},
    "dcgan_generator": Model(dp.models.dcgan_generator(),
        jax.ShapeDtypeStruct((1, 100), jnp.float32)),
    "dcgan_discriminator": Model(dp.models.dcgan_discriminator(), jax.ShapeDtypeStruct(
        (1, 64, 64, 3), jnp.float32)),
    "gpt": Model(dp.models.gpt(), IDS),
    "bert": Model(dp.models.bert(), IDS),
    "bert_pretraining": Model(dp.models.bert_pretraining(), IDS),
    "llama": Model(dp.models.llama(), IDS),
    "vit": Model(dp.models.vit(), IMAGE),
    "unet": Model(dp.models.unet(classes=10), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
        STEP),
    "dit": Model(dp.models.dit(8, classes=1000), jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32),
        STEP),
    "transformer": Model(dp.models.transformer(37000, 37000), IDS, {"source": IDS}),
    "seq2seq": Model(dp.models.seq2seq(50, 60, width=16), IDS, {"source": IDS}),
    "vae": Model(dp.models.vae(dp.serial(body=dp.linear(32) >> jnp.tanh, latent=LATENT),
                        dp.models.mlp((32,), 64)), jax.ShapeDtypeStruct((1, 64), jnp.float32)),
    "sequence_classifier": Model(dp.models.sequence_classifier(50, 3, READER, method="attention"),
        IDS),
}


def structure(name):
    plan = MODELS[name].plan()
    return {kind: {path: show(leaf) for path, leaf in dp.tree.paths(trees).items()}
            for kind, trees in (("params", plan.params), ("state", plan.state))}


if __name__ == "__main__":
    for name in MODELS:
        text = json.dumps(structure(name), indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n")
