"""The cases of modules.npz: read one, run our counterpart, and measure how far apart they are."""

import ast
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp

FOLDER = pathlib.Path(__file__).parent
CASES = json.loads((FOLDER / "modules.json").read_text())
ARRAYS = np.load(FOLDER / "modules.npz")


class Leaf(NamedTuple):
    """Where a parameter or statistic stands in our trees, and how its axes become ours."""

    tree: str
    path: str
    arrange: Callable[[np.ndarray], np.ndarray] = np.asarray


class Recipe(NamedTuple):
    """How to make our counterpart of a case.

    `make` takes the options of the case; it gives a layer, or a function of the inputs in their
    order in the file. `leaves` takes them too and names every parameter. `axes` says how inputs,
    outputs and their gradients become ours. `train` is for modules that never rest.
    """

    make: Callable[[dict[Any, Any]], Any]
    leaves: Callable[[dict[Any, Any]], Mapping[str, Leaf]] = lambda options: {}
    axes: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {}
    train: bool = False


def arrays(case, kind, axes):
    """The arrays of one kind of a case, such as "in" or "grad_param", by name."""
    start = f"{case}/{kind}/"
    names = [name.removeprefix(start) for name in ARRAYS.files if name.startswith(start)]
    return {name: axes.get(name, np.asarray)(ARRAYS[start + name]) for name in names}


def options(case):
    """The options of a case: those given as such, or those that the module prints.

    Those without a name are numbered 0 and 1; `dims` counts the axes that are neither batch nor
    channels.
    """
    info = CASES[case]
    printed = re.findall(r"(\w+)=(\([^)]*\)|[^,\s)]+)", info["torch"])
    printed += [(0, first) for first in re.findall(r"^\w+\((\([^)]*\)|[\d.]+)[,)]", info["torch"])]
    printed += [(1, second) for second in re.findall(r"^\w+\([\d.]+, ([\d.]+)[,)]", info["torch"])]
    given = info.get("kwargs", {name: value(text) for name, text in printed})
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return given | {"train": info["train"], "dims": ARRAYS[f"{case}/cot/y"].ndim - 2}


def value(text):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def trees(case, leaves, kind):
    """The arrays of one kind as {"params": tree, "state": tree}."""
    result = {"params": {}, "state": {}}
    for name, array in arrays(case, kind, {}).items():
        if name != "num_batches_tracked":
            leaf = leaves[name]
            *folders, last = leaf.path.split("/")
            at = result[leaf.tree]
            for folder in folders:
                at = at.setdefault(folder, {})
            at[last] = leaf.arrange(array)
    return result


def differences(case, recipe, *, change=lambda trees: trees):
    """By name, ``max |ours - theirs| / max |theirs|`` for each array that the case expects.

    `change` may spoil parameters and statistics, to see that something is then far away.
    """
    given = options(case)
    net, leaves, axes = recipe.make(given), recipe.leaves(given), recipe.axes
    inputs, weights = arrays(case, "in", axes), arrays(case, "cot", axes)
    start = change(trees(case, leaves, "param"))
    params, state = start["params"], start["state"]
    wanted = {"out": arrays(case, "out", axes), "grad_in": arrays(case, "grad_in", axes),
              "grad_param": trees(case, leaves, "grad_param")["params"],
              "buffer_after": trees(case, leaves, "buffer_after")["state"]}

    order = list(inputs)  # under jit a dict is sorted

    def together(inputs):
        return tuple(inputs[name] for name in order) if len(order) > 1 else inputs[order[0]]

    if isinstance(net, dp.Layer):
        if not state:  # of a batch norm that takes its own statistics always: any will do
            blank = net.plan(together(inputs)).state
            state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blank)
        dp.tree.verify(net, params, together(inputs), state=state)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, moving, state, inputs):
        inputs = inputs | moving
        if isinstance(net, dp.Layer):
            train = given["train"] or recipe.train
            y, state = net.apply(params, state, together(inputs), train=train)
        else:
            y = net(*(inputs[name] for name in order))
        return (y * weights["y"]).sum(), (y, state)

    moving = {name: inputs[name] for name in wanted["grad_in"]}
    with jax.default_matmul_precision("highest"):  # accelerators round the factors otherwise
        (_, (y, state)), (slopes, grads) = run(params, moving, state, inputs)
    ours = {"out": {"y": y}, "grad_in": grads, "grad_param": slopes,
            "buffer_after": state if wanted["buffer_after"] else {}}
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    ours, wanted = dp.tree.paths(ours), dp.tree.paths(wanted)
    return {path: difference(ours[path], leaf) for path, leaf in wanted.items()}


def difference(ours, theirs):
    """``max |ours - theirs| / max |theirs|``; where theirs is 0, ours must be 0 too."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    most = np.abs(ours - theirs).max()
    return 0.0 if most == 0 else float(most / np.abs(theirs).max())
