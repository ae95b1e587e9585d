"""Residual networks against the published implementation, where its outputs are at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import AGAINST_ORIGINALS, close, described, folder, nested, tensors

import diffprog as dp
from diffprog.models.resnet import basic, bottleneck, image_stem, stages

pytestmark = AGAINST_ORIGINALS
BLOCKS = {"resnet_basic": (basic, 1), "resnet_bottleneck": (bottleneck, 4)}
# original name of a leaf -> the tree, our name, and how its axes are arranged
LEAVES = {
    "convolution.weight": ("params", "conv_{}/kernel", (2, 3, 1, 0)),
    "normalization.weight": ("params", "batch_norm_{}/scale", (0,)),
    "normalization.bias": ("params", "batch_norm_{}/bias", (0,)),
    "normalization.running_mean": ("state", "batch_norm_{}/mean", (0,)),
    "normalization.running_var": ("state", "batch_norm_{}/var", (0,)),
}


def place(name, firsts):
    """Our tree, path, copy and arrangement of an original tensor."""
    *parts, module, leaf = name.split(".")
    if module not in ("convolution", "normalization"):
        return "params", f"head/linear_0/{'kernel' if leaf == 'weight' else 'bias'}", None, (
            (1, 0) if leaf == "weight" else (0,))
    tree, ours, axes = LEAVES[f"{module}.{leaf}"]
    if parts[1] == "embedder":
        return tree, f"stem/{ours.format(0)}", None, axes
    stage, layer = int(parts[3]), int(parts[5])
    where = "shortcut" if parts[6] == "shortcut" else "body"
    number = 0 if where == "shortcut" else int(parts[7])
    first = firsts[stage] and layer == 0
    copy = None if first else layer - firsts[stage]
    return tree, (f"stage_{stage + 1}/{'first' if first else 'rest'}/residual_0/{where}/"
                  f"{ours.format(number)}"), copy, axes


def trees(found, firsts):
    """Tensors as {"params": tree, "state": tree}, copies stacked."""
    leaves = {}
    for name, value in sorted(found.items()):
        if not name.endswith("num_batches_tracked"):
            tree, path, copy, axes = place(name, firsts)
            leaves.setdefault((tree, path), {})[copy] = value.transpose(axes)
    result = {"params": {}, "state": {}}
    for (tree, path), copies in leaves.items():
        result[tree][path] = copies[None] if None in copies else np.stack(
            [copies[i] for i in range(len(copies))])
    return {tree: nested(found) for tree, found in result.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_resnet_agrees_with_the_original(name):
    (block, wider), config = BLOCKS[name], described(name)
    widths = [size // wider for size in config["hidden_sizes"]]
    net = dp.serial(
        stem=image_stem(config["embedding_size"]), **stages(block, config["depths"], widths),
        head=dp.global_avg_pool() >> dp.linear(len(config["id2label"])))
    firsts = ["first" in net.children[f"stage_{i + 1}"].children for i in range(len(widths))]
    read = lambda file: trees(tensors(name, file), firsts)  # noqa: E731
    weights, io = read("model"), np.load(folder(name) / "io.npz")
    params, state = weights["params"], weights["state"]
    x = jnp.asarray(io["eval/in/pixel_values"].transpose(0, 2, 3, 1))
    labels = jnp.asarray(io["eval/in/labels"])
    dp.tree.verify(net, params, x, state=state)

    for case, train, tolerance in (("eval", False, 2e-5), ("train", True, 1e-4)):
        def loss(params, train=train):
            logits, new = net.apply(params, state, x, train=train)
            return dp.losses.cross_entropy(logits, labels), (logits, new)

        (value, (logits, new)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        close(logits, io[f"{case}/out64/logits"], 1e-5)
        close(value, io[f"{case}/out64/loss"], 1e-5)
        close(grads, read("grads_train" if train else "grads")["params"], tolerance)
        if train:
            close(new, read("buffers_after_train_step")["state"], 2e-6)
