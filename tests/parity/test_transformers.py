"""Transformers against the published implementations, where their outputs are at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import AGAINST_ORIGINALS, close, described, folder, nested, tensors

import diffprog as dp

pytestmark = [*AGAINST_ORIGINALS, pytest.mark.slow]

# A row of a table: an original name, ours, and what makes one array of the other. Where the
# original has {} there is one array for each block, and ours are stacked.


def as_is(a):
    return a


def first(a):
    return a[0]


def third(i):
    return lambda a: np.split(a, 3, axis=-1)[i]


def linear(theirs, ours, arrange=np.transpose, bias=True):
    rows = [(f"{theirs}.weight", f"{ours}/kernel", arrange)]
    return rows + [(f"{theirs}.bias", f"{ours}/bias", arrange)] * bias


def norm(theirs, ours):
    return [(f"{theirs}.weight", f"{ours}/scale", as_is), (f"{theirs}.bias", f"{ours}/bias", as_is)]


def gpt2():
    theirs, attend, feed = "transformer.h.{}", "trunk/blocks/attend", "trunk/blocks/feed"
    return [
        ("transformer.wte.weight", "embed/embedding", as_is),
        ("transformer.wpe.weight", "positions/embedding", as_is),
        *norm(f"{theirs}.ln_1", f"{attend}/norm"),
        *(row for i, part in enumerate(("query", "key", "value")) for row in linear(
            f"{theirs}.attn.c_attn", f"{attend}/body/{part}", third(i))),
        *linear(f"{theirs}.attn.c_proj", f"{attend}/body/out", as_is),
        *norm(f"{theirs}.ln_2", f"{feed}/norm"),
        *linear(f"{theirs}.mlp.c_fc", f"{feed}/body/up", as_is),
        *linear(f"{theirs}.mlp.c_proj", f"{feed}/body/down", as_is),
        *norm("transformer.ln_f", "trunk/norm"),
    ]


def llama():
    theirs, attend, feed = "model.layers.{}", "trunk/blocks/attend", "trunk/blocks/feed"
    maps = {
        **{f"self_attn.{name[0]}_proj": f"{attend}/body/{name}"
           for name in ("query", "key", "value", "out")},
        "mlp.gate_proj": f"{feed}/body/up/gate", "mlp.up_proj": f"{feed}/body/up/up",
        "mlp.down_proj": f"{feed}/body/down",
    }
    return [
        ("model.embed_tokens.weight", "embed/embedding", as_is),
        (f"{theirs}.input_layernorm.weight", f"{attend}/norm/scale", as_is),
        (f"{theirs}.post_attention_layernorm.weight", f"{feed}/norm/scale", as_is),
        *(row for name, ours in maps.items() for row in linear(
            f"{theirs}.{name}", ours, bias=False)),
        ("model.norm.weight", "trunk/norm/scale", as_is),
        *linear("lm_head", "head", bias=False),
    ]


def blocks(theirs, ours, attention):
    """What the blocks of BERT and of the vision transformer have in common."""
    return [
        *(row for part in ("query", "key", "value") for row in linear(
            f"{theirs}.{attention}.{part}", f"{ours}/attend/body/{part}")),
        *linear(f"{theirs}.attention.output.dense", f"{ours}/attend/body/out"),
        *linear(f"{theirs}.intermediate.dense", f"{ours}/feed/body/up"),
        *linear(f"{theirs}.output.dense", f"{ours}/feed/body/down"),
    ]


def bert_mlm():
    theirs, ours = "bert.encoder.layer.{}", "encoder/body/blocks"
    return [
        *((f"bert.embeddings.{name}_embeddings.weight", f"encoder/{path}/embedding", as_is)
          for name, path in (("word", "embed"), ("token_type", "types"),
                             ("position", "positions"))),
        *norm("bert.embeddings.LayerNorm", "encoder/norm"),
        *blocks(theirs, ours, "attention.self"),
        *norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attend/norm"),
        *norm(f"{theirs}.output.LayerNorm", f"{ours}/feed/norm"),
        *linear("cls.predictions.transform.dense", "transform/linear"),
        *norm("cls.predictions.transform.LayerNorm", "transform/norm"),
        ("cls.predictions.bias", "bias/bias", as_is),
    ]


def bert_pretraining():
    return [*bert_mlm(), *linear("bert.pooler.dense", "encoder/pool/linear"),
            *linear("cls.seq_relationship", "follows")]


def vit():
    theirs, ours = "vit.encoder.layer.{}", "body/blocks"
    patches = "vit.embeddings.patch_embeddings.projection"
    return [
        (f"{patches}.weight", "patches/kernel", lambda a: a.transpose(2, 3, 1, 0)),
        (f"{patches}.bias", "patches/bias", as_is),
        ("vit.embeddings.cls_token", "token/embedding", first),
        ("vit.embeddings.position_embeddings", "positions/embedding", first),
        *norm(f"{theirs}.layernorm_before", f"{ours}/attend/norm"),
        *blocks(theirs, ours, "attention.attention"),
        *norm(f"{theirs}.layernorm_after", f"{ours}/feed/norm"),
        *norm("vit.layernorm", "body/norm"),
        *linear("classifier", "head"),
    ]


def read(table, name, depth, file="model"):
    """Tensors as a tree of ours; every one of them has to be in the table."""
    found, leaves, seen = tensors(name, file), {}, set()
    for theirs, ours, arrange in table:
        names = [theirs.format(i) for i in range(depth)] if "{}" in theirs else [theirs]
        arrays = [arrange(found[name]) for name in names]
        leaves[ours] = np.stack(arrays) if "{}" in theirs else arrays[0]
        seen |= set(names)
    assert seen == found.keys()
    return nested(leaves)


def sizes(config):
    return {"width": config["hidden_size"], "depth": config["num_hidden_layers"],
            "heads": config["num_attention_heads"], "hidden": config["intermediate_size"]}


def gpt2_net(config):
    return dp.models.gpt(config["vocab_size"], length=config["n_positions"], width=config["n_embd"],
                  depth=config["n_layer"], heads=config["n_head"],
                  eps=config["layer_norm_epsilon"])


def llama_net(config):
    return dp.models.llama(
        config["vocab_size"], **sizes(config), kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"], eps=config["rms_norm_eps"],
        rotary=dp.rotary(config["rope_parameters"]["rope_theta"]))


def bert_net(config):
    return dp.models.bert_pretraining(
        config["vocab_size"], **sizes(config), length=config["max_position_embeddings"],
        types=config["type_vocab_size"], eps=config["layer_norm_eps"])


def vit_net(config):
    return dp.models.vit(len(config["id2label"]), **sizes(config), image_size=config["image_size"],
                  patch_size=config["patch_size"], eps=config["layer_norm_eps"])


CAUSAL = {"gpt2": (gpt2_net, gpt2), "llama": (llama_net, llama)}
BERTS = {"bert_mlm": bert_mlm, "bert_pretraining": bert_pretraining}
SIDE = {"attention_mask": "mask", "position_ids": "positions", "token_type_ids": "token_types"}


def original(name, make, table):
    """The net, its parameters, and what is known of it."""
    config = described(name)
    net = make(config)
    depth = config.get("n_layer") or config["num_hidden_layers"]
    files = {file: read(table(), name, depth, file) for file in ("model", "grads")}
    return net, files["model"], files["grads"], np.load(folder(name) / "io.npz")


def given(io, case):
    """The ids and side inputs of a case, and which entries are real."""
    batch = {ours: jnp.asarray(io[f"{case}/in/{theirs}"]) for theirs, ours in SIDE.items()
             if f"{case}/in/{theirs}" in io}
    x = jnp.asarray(io[f"{case}/in/input_ids"])
    real = io.get(f"{case}/in/attention_mask", np.ones(x.shape)) == 1
    return {"x": x, **batch} | ({"mask": jnp.asarray(real)} if "mask" in batch else {}), real


def outputs(net, params, batch):
    return jax.jit(lambda params, x, **side: net(params, x, **side))(params, **batch)


def slope(net, params, objective, batch):
    """The loss at rest and its gradient."""
    return jax.jit(jax.value_and_grad(lambda params: objective(
        net, params, {}, batch, key=None, train=False)[0]))(params)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_agrees_with_the_original(name):
    net, params, grads, io = original(name, *CAUSAL[name])
    for case in ("plain", "right_pad", "left_pad"):
        batch, real = given(io, case)
        dp.tree.verify(net, params, batch["x"])
        logits = np.asarray(outputs(net, params, batch))
        close(logits[real], io[f"{case}/out64/logits"][real], 1e-5)
        loss, _ = dp.text.next_token()(net, params, {}, batch, key=None, train=False)
        close(loss, io[f"{case}/out64/loss"], 1e-5)
        if case == described(name, "meta")["grad_case"]:
            close(slope(net, params, dp.text.next_token(), batch)[1], grads, 2e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_writes_what_the_original_writes(name):
    net, params, _, io = original(name, *CAUSAL[name])
    prompts = [io[f"generate/prompt{i}/in/input_ids"][0].tolist() for i in (0, 1)]
    for chosen, wanted in ((prompts[:1], "prompt0"), (prompts[1:], "prompt1"), (prompts, "batch")):
        written = dp.text.generate(net, params, chosen, 12).tokens
        assert written.tolist() == io[f"generate/{wanted}/out/sequences"][:, -12:].tolist()


@pytest.mark.parametrize("name", BERTS)
def test_bert_agrees_with_the_original(name):
    net, params, grads, io = original(name, bert_net, BERTS[name])
    whole = net.plan(jnp.ones((1, 1), int)).params  # one original has no pooler
    params = nested({path: jnp.zeros(leaf.shape) for path, leaf in dp.tree.paths(whole).items()}
                    | dp.tree.paths(params))
    both = name == "bert_pretraining"
    scores = f"out64/{'prediction_logits' if both else 'logits'}"
    for case in ("plain", "padded"):
        batch, real = given(io, case)
        tokens, follows = map(np.asarray, outputs(net, params, batch))
        close(tokens[real], io[f"{case}/{scores}"][real], 1e-5)
        if both:
            close(follows, io[f"{case}/out64/seq_relationship_logits"], 1e-5)
    order = io.get("padded/in/next_sentence_label", np.zeros(3, int))
    y = jnp.asarray(io["padded/in/labels"]), jnp.asarray(order)
    loss, found = slope(net, params, dp.text.masked_language(), batch | {"y": y})
    # A head of zeros knows nothing, and no gradient passes it.
    close(loss - (0 if both else np.log(2)), io["padded/out64/loss"], 1e-5)
    close(found, grads, 2e-5)


def test_a_vision_transformer_agrees_with_the_original():
    net, params, grads, io = original("vit", vit_net, vit)
    x = jnp.asarray(io["plain/in/pixel_values"].transpose(0, 2, 3, 1))
    dp.tree.verify(net, params, x)
    close(outputs(net, params, {"x": x}), io["plain/out64/logits"], 1e-5)
    batch = {"x": x, "y": jnp.asarray(io["plain/in/labels"])}
    loss, found = slope(net, params, dp.classification(), batch)
    close(loss, io["plain/out64/loss"], 1e-5)
    close(found, grads, 2e-5)
