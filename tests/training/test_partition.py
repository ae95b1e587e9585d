"""Which parameters `muon` orthogonalizes, of each kind of layer and each form of output."""

import jax
import jax.numpy as jnp
import pytest
from golden import MODELS
from support.refusing import refused

import diffprog as dp
from diffprog.training import muon_partition

X = jnp.ones((2, 4))
IDS = jnp.ones((2, 5), int)
STEPS = jnp.ones((2, 5, 8))
IMAGE = jnp.ones((1, 6, 6, 4))


def reasons(net, x, **options):
    """path -> optimizer and reason, of the leaves that are no biases and scales."""
    rules = muon_partition(net, x, **options).rules
    return {path: f"{rule.optimizer}: {rule.reason}" for path, rule in rules.items()
            if rule.reason not in ("bias", "scale")}


def last(net, x, **options):
    """The paths of the last maps."""
    return {path for path, why in reasons(net, x, **options).items() if why == "adamw: last map"}


@pytest.mark.parametrize(("net", "x", "path", "reason"), [
    (dp.self_attention(2), STEPS, "query/kernel", "muon: matrix (8, 8)"),
    (dp.heads(3, dp.attention_head(4)), STEPS, "key/kernel", "muon: 3 matrices (8, 4)"),
    (dp.repeat(2, dp.heads(2, dp.linear(2))), X, "kernel", "muon: 4 matrices (4, 2)"),
    (dp.ensemble(5, dp.linear(3)) >> (lambda y: y.mean(0)), X, "ensemble_0/kernel",
     "muon: 5 matrices (4, 3)"),
    (dp.recurrent(dp.lstm(3)), STEPS, "hidden/kernel", "muon: matrix (3, 12)"),
    (dp.conv(5, 3), IMAGE, "kernel", "muon: matrix (36, 5)"),
    (dp.repeat(2, dp.conv(4, (3, 1))), IMAGE, "kernel", "muon: 2 matrices (12, 4)"),
    (dp.conv_transpose(5, 2), IMAGE, "kernel", "muon: matrix (16, 5)"),
    (dp.conv(6, 3, groups=2), IMAGE, "kernel", "adamw: groups of channels"),
    (dp.remat(dp.depthwise_conv(3)), IMAGE, "kernel", "adamw: groups of channels"),
    (dp.bilinear(3), (X, X), "kernel", "muon: matrix (16, 3)"),
    (dp.linear(1), STEPS, "kernel", "adamw: vector"),
    (dp.collapse("attention"), STEPS, "kernel", "adamw: vector"),
    (dp.mixed(dp.spectral_norm(dp.linear(3)), jnp.bfloat16), X, "kernel", "muon: matrix (4, 3)"),
    (dp.embedding(7, 4), IDS, "embedding", "adamw: embedding"),
    (dp.learned_positions(5), STEPS, "embedding", "adamw: embedding"),
    (dp.lora(dp.linear(3), 2), X, "kernel/down", "adamw: down"),
    (dp.lora(dp.linear(3), 2), X, "kernel/base", "frozen: "),
    (dp.weight_norm(dp.linear(3)), X, "kernel/direction", "adamw: direction"),
    (dp.stateless(lambda key, x: {"table": jnp.ones((4, 4))}, lambda params, x: x @ params[
        "table"]), X, "table", "adamw: table"),
], ids=str)
def test_the_rule_of_each_kind_of_kernel(net, x, path, reason):
    """In front of a head, so that the layer is hidden."""
    net = dp.serial(it=net, flat=dp.flatten(), head=dp.linear(2))
    found = reasons(net, x)
    assert found[f"it/{path}"] == reason
    assert found["head/kernel"] == "adamw: last map"


def test_maps_of_a_hypernetwork_are_no_hidden_kernels():
    net = dp.hyper(dp.linear(3), dp.linear(6))
    rules = reasons(net, X, condition=jnp.ones(4))  # its output ends in no map of one kernel
    assert rules["target/kernel/kernel"] == "adamw: map to parameters"


def test_kernels_of_another_library_with_unknown_axes_are_no_matrices():
    linen = pytest.importorskip("flax.linen")

    class Both(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.DenseGeneral(5, axis=(-2, -1))(linen.DenseGeneral((2, 3))(x))

    net = dp.serial(theirs=dp.interop.from_linen(Both()), head=dp.linear(4))
    found = reasons(net, X)
    assert {path.rpartition("/")[0]: why for path, why in found.items()} == {
        "theirs/DenseGeneral_0": "adamw: axes of another library",
        "theirs/DenseGeneral_1": "adamw: axes of another library", "head": "adamw: last map"}


# The last map.


MODEL_HEADS = {
    "mlp": {"head/kernel"}, "llama": {"head/kernel"}, "vit": {"head/kernel"},
    "alexnet": {"linear_2/kernel"}, "resnet_18": {"head/linear_0/kernel"},
    "dcgan_generator": {"image/conv_transpose_0/kernel"}, "dit": {"head/linear/kernel"},
    "gpt": set(), "transformer": set(), "seq2seq": set(),  # tied to the embedding
    "bert_pretraining": {"follows/kernel"}, "unet": {"head/conv/kernel"},
    "vae": {"decoder/head/kernel", "encoder/latent/mean/kernel",
            "encoder/latent/log_variance/kernel"},
    "sequence_classifier": {"head/kernel"},
}


@pytest.mark.parametrize("name", [
    name if name in ("gpt", "dit", "bert_pretraining") else pytest.param(
        name, marks=pytest.mark.slow) for name in MODEL_HEADS])
def test_the_last_maps_of_the_models(name):
    model = MODELS[name]
    assert last(model.net, model.x, **model.side or {}) == MODEL_HEADS[name]


@dp.program(body=dp.linear(4), mean=dp.linear(3), scale=dp.linear(3))
def two(layers, x):
    y = jnp.tanh(layers.body(x))
    return layers.mean(y), jax.nn.softplus(layers.scale(y))


@dp.program(body=dp.linear(4), one=dp.linear(3), other=dp.linear(3))
def summed(layers, x):
    y = jnp.tanh(layers.body(x))
    return layers.one(y) + layers.other(y)


def test_each_output_has_a_last_map():
    assert last(two, X) == {"mean/kernel", "scale/kernel"}


@pytest.mark.parametrize("around", [
    lambda net: net, dp.remat, lambda net: dp.mixed(net, jnp.bfloat16), dp.freeze,
    lambda net: dp.ensemble(2, net), lambda net: net >> jax.jit(jnp.exp),
    lambda net: net >> (lambda y: jax.lax.cond(y.sum() > 0, jnp.sin, jnp.cos, y)),
    lambda net: net >> (lambda y: y / jnp.linalg.norm(y, axis=-1, keepdims=True)),
], ids=["bare", "remat", "mixed", "freeze", "ensemble", "jit", "cond", "norm"])
def test_what_is_around_a_map_hides_it_not(around):
    net = around(dp.models.mlp((6, 5), 3))
    found = reasons(net, X)
    kinds = [why.partition(" ")[0] for path, why in found.items() if "kernel" in path]
    heads = [path for path, why in found.items() if why == "adamw: last map"]
    if around is dp.freeze:
        assert kinds == ["frozen:"] * 3 and not heads
    else:
        assert kinds.count("muon:") == 2 and len(heads) == 1 and heads[0].endswith("head/kernel")


@pytest.mark.parametrize(("net", "x", "kernels"), [
    (summed, X, {"one/kernel", "other/kernel"}),
    (dp.repeat(2, dp.linear(4)), X, {"kernel"}),
    (dp.residual(dp.linear(4)) >> dp.residual(dp.linear(4)), X,
     {"residual_0/body/kernel", "residual_1/body/kernel"}),
    (dp.recurrent(dp.gru(3)), STEPS, {"hidden/kernel", "input/kernel"}),
], ids=["sum", "repeat", "residuals", "loop"])
def test_an_ambiguous_last_map_is_asked_for(net, x, kernels):
    error = refused(muon_partition, net, x)
    assert all(path in error.got for path in kernels) and "adam=" in error.remedy
    path = min(kernels)
    assert reasons(net, x, adam=path)[path] == "adamw: adam="
    hidden = reasons(net, x, adam=())
    assert all(hidden[path].startswith("muon") for path in kernels)


def test_adam_names_further_leaves():
    found = reasons(dp.models.mlp((6, 5), 3), X, adam=("body/linear_0/*", "**/bias"))
    assert found["body/linear_0/kernel"] == "adamw: adam="
    assert found["body/linear_1/kernel"] == "muon: matrix (6, 5)"
    assert found["head/kernel"] == "adamw: last map"
