"""PyTorch's recurrent modules and cells, and how ours say the same.

A module of several layers and directions is one dict here: ``l0``, ``l0_reverse``, ``l1``, ... ->
the parameters of a cell. Initial and final carries are streaming states; the backward direction
with a carry is a forward one on the sequence turned round.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from reference import CASES, arrays

import diffprog as dp

FEATURES = 7


class Case(NamedTuple):
    """A case of the file: the cell, its directions in order, and the arrays."""

    cell: dp.Layer
    ways: list[str]
    params: dict[str, Any]
    inputs: dict[str, np.ndarray]

    @property
    def names(self):
        """The parts of the carry, in PyTorch's order: h, c."""
        return ["hidden", "cell"] if self.cell.name == "lstm" else ["hidden"]


def read(case, kind="param"):
    """A case with its parameters, or with the gradients of them."""
    make = {"LST": dp.lstm, "GRU": dp.gru, "RNN": dp.simple_rnn}[case[:3]]
    found = arrays(case, kind, {})
    ways = [name.removeprefix("weight_ih").removeprefix("_") for name in found
            if name.startswith("weight_ih")]
    inputs = arrays(case, "in", {})
    lengths = inputs.pop("lengths", None)
    if lengths is not None:
        inputs["mask"] = np.arange(inputs["x"].shape[1]) < lengths[:, None]
    arrange = arranged if kind == "param" else arranged_gradients
    params = {way: arrange(found, f"_{way}" if way else "", make is dp.gru) for way in ways}
    return Case(make(FEATURES), ways, params, inputs)


def batch_first(case):
    return "batch_first=True" in CASES[case]["torch"]


def arranged(found, way, gru):
    """PyTorch's two biases are one; of the gru only the candidate's are two."""
    given, held = found[f"bias_ih{way}"], found[f"bias_hh{way}"]
    hidden = {"kernel": found[f"weight_hh{way}"].T}
    if gru:
        hidden["bias"] = held[2 * FEATURES :]
        held = np.concatenate([held[: 2 * FEATURES], np.zeros(FEATURES, held.dtype)])
    return {"input": {"kernel": found[f"weight_ih{way}"].T, "bias": given + held},
            "hidden": hidden}


def arranged_gradients(found, way, gru):
    """What is added has one gradient, so that PyTorch's second biases say nothing new."""
    given, held = found[f"bias_ih{way}"], found[f"bias_hh{way}"]
    same = 2 * FEATURES if gru else None
    np.testing.assert_allclose(held[:same], given[:same], rtol=1e-6)
    hidden = {"kernel": found[f"weight_hh{way}"].T}
    if gru:
        hidden["bias"] = held[2 * FEATURES :]
    return {"input": {"kernel": found[f"weight_ih{way}"].T, "bias": given}, "hidden": hidden}


def run(case, params, inputs):
    """All that PyTorch returns, by name."""
    given = read(case)
    if "Cell" in case:
        start = {name: inputs[name[0]] for name in given.names}
        _, after = given.cell.apply(params[""], start, inputs["x"])
        outputs = {name[0]: after[name] for name in given.names}
        return outputs if len(outputs) > 1 else {"y": outputs["h"]}
    time_first = not batch_first(case)
    x, mask = inputs["x"], given.inputs.get("mask")
    x = x.swapaxes(0, 1) if time_first else x
    finals = {name: [None] * len(given.ways) for name in given.names}
    for layer in sorted({way[:2] for way in given.ways}):
        outputs = []
        for way in (way for way in given.ways if way[:2] == layer):
            start = {name: inputs[f"{name[0]}0"][given.ways.index(way)] if f"{name[0]}0" in inputs
                     else jnp.zeros((x.shape[0], FEATURES), x.dtype) for name in given.names}
            y, after = streamed(given.cell, params[way], start, x, mask, "reverse" in way)
            outputs.append(y)
            for name in given.names:
                finals[name][given.ways.index(way)] = after[name]
        x = jnp.concatenate(outputs, -1)
    return {"output": x.swapaxes(0, 1) if time_first else x} | {
        f"{name[0]}_n": jnp.stack(finals[name]) for name in given.names}


def streamed(cell, params, carry, x, mask, backwards):
    """One direction with an initial carry: its outputs and its final carry."""
    turned = (lambda a: None if a is None else jnp.flip(a, 1)) if backwards else lambda a: a
    y, after = dp.recurrent(cell).apply(params, carry, turned(x), mask=turned(mask))
    return turned(y), after


def layers(case):
    """The same module without initial and final carries, as one layer of ours, and its params."""
    given = read(case)
    both = any("reverse" in way for way in given.ways)
    depth = len(given.ways) // (1 + both)
    if not both:
        net = dp.recurrent(dp.serial(**{f"l{i}": given.cell for i in range(depth)}))
        return net, given.params
    net = dp.serial(**{f"l{i}": dp.recurrent(given.cell, bidirectional=True) for i in range(depth)})
    return net, {f"l{i}": {"forward": given.params[f"l{i}"],
                           "backward": given.params[f"l{i}_reverse"]} for i in range(depth)}


RECURRENT = [case for case in CASES if case.startswith(("LSTM", "GRU", "RNN"))]
