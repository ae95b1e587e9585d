"""Attention and Transformer modules agree with PyTorch: outputs, weights, and all gradients."""

import jax
import numpy as np
import pytest
from attentions import ATTENTION, HEADS, read, run, transformer
from reference import arrays, difference

import diffprog as dp

pytestmark = [pytest.mark.usefixtures("optimized"), pytest.mark.slow]
TOLERANCE = 1e-5


def fused(tree):
    """Biases of queries, keys and values as the one array that they are in PyTorch.

    The gradient of the keys' bias is zero but for rounding, which is no share of itself: what all
    keys have in common changes no weight.
    """
    if not isinstance(tree, dict):
        return tree
    tree = {name: fused(part) for name, part in tree.items()}
    maps = [tree[name] for name in ("query", "key", "value") if name in tree]
    return tree | {"biases": np.concatenate([part.pop("bias") for part in maps])} if maps else tree


def far(case, params):
    """The arrays that differ by more than the tolerance, of those that PyTorch gave."""
    inputs, weights = arrays(case, "in", {}), arrays(case, "cot", {})
    theirs = {"out": arrays(case, "out", {}), "grad_in": arrays(case, "grad_in", {}),
              "grad_param": read(case, "grad_param")}

    def total(params, moving):
        outputs = run(case, params, inputs | moving)
        return sum((outputs[name] * weights[name]).sum() for name in weights), outputs

    moving = {name: inputs[name] for name in theirs["grad_in"]}
    with jax.default_matmul_precision("highest"):
        (slopes, grads), outputs = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, moving)
    ours = dp.tree.paths(fused({"out": outputs, "grad_in": grads, "grad_param": slopes}))
    theirs = dp.tree.paths(fused(theirs))
    assert ours.keys() == theirs.keys()
    found = {path: difference(ours[path], leaf) for path, leaf in theirs.items()}
    return {path: value for path, value in found.items() if not value <= TOLERANCE}


@pytest.mark.parametrize("case", ATTENTION)
def test_outputs_and_gradients_agree(case):
    assert far(case, read(case)) == {}


@pytest.mark.parametrize("case", [case for case in ATTENTION if case.startswith("Transformer")])
def test_layers_of_pytorch_are_compositions_of_layers_here(case):
    inputs = arrays(case, "in", {})
    dp.tree.verify(transformer(case), read(case), inputs["x"], memory=inputs.get("mem"))
    if "mask" in inputs:  # True = blocked
        np.testing.assert_array_equal(inputs["mask"], ~np.tri(5, dtype=bool))


@pytest.mark.parametrize("case", ["MHA_self_causal", "MHA_self_padding", "MHA_self_causal_padding",
                                  "MHA_cross_padding", "TransformerEncoderLayer_post",
                                  "TransformerEncoderLayer_pre"])
def test_masks_by_name_equal_explicit_patterns(case):
    """`causal=True`, `mask` and `memory_mask` in place of explicit patterns."""
    inputs, (wanted, *_) = arrays(case, "in", {}), arrays(case, "out", {}).values()
    blocked = inputs.get("key_padding_mask", inputs.get("kpm"))
    real = None if blocked is None else ~blocked
    x = inputs.get("x", inputs.get("q"))
    if "cross" in case:
        net, side = dp.cross_attention(HEADS), {"memory": inputs["k"], "memory_mask": real}
        real = None
    elif "Transformer" in case:
        net, side = transformer(case), {"mask": real}
    else:
        net, side = dp.self_attention(HEADS, causal="causal" in case), {"mask": real}
    params = read(case)
    dp.tree.verify(net, params, x, **side)
    with jax.default_matmul_precision("highest"):
        y = np.asarray(jax.jit(net.__call__)(params, x, **side))
    real = np.ones(x.shape[:2], bool) if real is None else real
    assert difference(y[real], wanted[real]) <= TOLERANCE


def test_parameters_off_by_a_thousandth_are_detected():
    case = "TransformerDecoderLayer_post"
    spoilt = jax.tree.map(lambda leaf: leaf * np.float32(1.001), read(case))
    assert {"out/y", "grad_in/x", "grad_in/mem"} <= far(case, spoilt).keys()
