"""PyTorch's attention and Transformer modules, and how ours say the same.

Its masks say what is blocked, in `MultiheadAttention` and in the layers made of it; only the plain
function `scaled_dot_product_attention` marks what is attended, as we do. It computes padded queries
like all others, where ours clears them: an `attention_mask` says exactly the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
from reference import CASES, arrays

import diffprog as dp
from diffprog.layers.attention.dot_product import Pattern, dot_product

HEADS, HIDDEN = 3, 17
ATTENTION = [case for case in CASES if case.startswith(("MHA", "sdpa", "Transformer"))]


# Parameters, and in the same way their gradients.

def multihead(found, prefix=""):
    """The fused kernel of three maps, (3 * out, in), as three kernels (in, out)."""
    kernels = np.split(found[f"{prefix}in_proj_weight"], 3)
    biases = np.split(found[f"{prefix}in_proj_bias"], 3)
    return {name: {"kernel": kernel.T, "bias": bias} for name, kernel, bias in zip(
        ("query", "key", "value"), kernels, biases, strict=True)} | {
            "out": linear(found, f"{prefix}out_proj.")}


def linear(found, prefix):
    return {"kernel": found[f"{prefix}weight"].T, "bias": found[f"{prefix}bias"]}


def norm(found, prefix):
    return {"scale": found[f"{prefix}weight"], "bias": found[f"{prefix}bias"]}


def read(case, kind="param"):
    """The parameters of a case in our trees, or the gradients of them."""
    found = arrays(case, kind, {})
    if case.startswith("sdpa"):
        return {}
    if case.startswith("MHA"):
        return multihead(found)
    bodies = {"attend": multihead(found, "self_attn.")}
    if "Decoder" in case:
        bodies["ask"] = multihead(found, "multihead_attn.")
    bodies["feed"] = {"up": linear(found, "linear1."), "down": linear(found, "linear2.")}
    return {name: {"body": body, "norm": norm(found, f"norm{i}.")}
            for i, (name, body) in enumerate(bodies.items(), 1)}


# Modules.

def explicit(inputs):
    """All masks of a call of `MultiheadAttention` as one mask of what is attended, and a bias."""
    seen, bias = np.ones((1, 1, 1, 1), bool), None
    if "key_padding_mask" in inputs:
        seen = seen & ~inputs["key_padding_mask"][:, None, None, :]
    if "attn_mask" in inputs and inputs["attn_mask"].dtype == bool:
        seen = seen & ~inputs["attn_mask"][None, None]
    elif "attn_mask" in inputs:
        bias = inputs["attn_mask"][None, None]
    return {"attention_mask": seen, "attention_bias": bias}


def run_multihead(case, params, inputs):
    """The output, and the weights: what attention gives on values that are one-hot vectors."""
    x, keys = inputs["q"], inputs.get("k")
    side = explicit(inputs)
    if "seq_first" in case:
        x = x.swapaxes(0, 1)
    if keys is None:
        output = dp.self_attention(HEADS)(params, x, **side)
        keys = x
    else:
        output = dp.cross_attention(HEADS)(
            params, x, memory=(keys, inputs.get("v", keys)), **side)
    split = lambda name, x: jnp.stack(jnp.split(  # noqa: E731
        dp.linear(12)(params[name], x), HEADS, -1), 1)
    query, key = split("query", x), split("key", keys)
    ones = jnp.broadcast_to(jnp.eye(keys.shape[1], dtype=x.dtype), (*key.shape[:3], keys.shape[1]))
    mask = jnp.broadcast_to(side["attention_mask"], (1 if side["attention_mask"].shape[0] == 1 else
                                                     len(x), 1, x.shape[1], keys.shape[1]))
    weights = dot_product(query, key, ones, Pattern(mask=mask), bias=side["attention_bias"])
    return {"output": output.swapaxes(0, 1) if "seq_first" in case else output,
            "weights": weights if "perhead" in case else weights.mean(1)}


def run_product(case, params, inputs):
    pattern = Pattern(causal="causal" in case, mask=inputs.get("mask"))
    return {"y": dot_product(inputs["q"], inputs["k"], inputs["v"], pattern,
                             scale=0.3 if "scale" in case else None)}


def transformer(case):
    """The layer that the case is of, as compositions."""
    around = dp.pre_norm if case.endswith("pre") else dp.add_norm
    bend = dp.gelu if case == "TransformerEncoderLayer_pre" else jax.nn.relu  # which are not named
    feed = around(dp.ffn(HIDDEN, bend))
    if "Decoder" in case:
        return dp.serial(attend=around(dp.self_attention(HEADS, causal=True)),
                         ask=around(dp.cross_attention(HEADS)), feed=feed)
    return dp.serial(attend=around(dp.self_attention(HEADS)), feed=feed)


def run_transformer(case, params, inputs):
    if "Decoder" in case:  # whose mask is that of causality
        return {"y": transformer(case)(params, inputs["x"], memory=inputs["mem"])}
    real = ~inputs["kpm"]
    return {"y": transformer(case)(
        params, inputs["x"], attention_mask=real[:, None, None, :])}


def run(case, params, inputs):
    """All that PyTorch returns, by name."""
    kinds = {"MHA": run_multihead, "sdp": run_product, "Tra": run_transformer}
    return kinds[case[:3]](case, params, inputs)
