"""Depth written out: the net in which each `repeat` is its copies, one after the other.

A scan over layers copies the cache of each layer when it writes a step into it; written out, XLA
updates caches in place. So what runs one net thousands of times writes it out first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from diffprog.core.computed import WrittenOut
from diffprog.core.layer import Layer

Split = Callable[[Any], Any]


def unrolled(layer: Layer) -> tuple[Layer, Split]:
    """The net with its repeats written out, and what makes its trees of those of `layer`.

    Repeats inside other wrappers, such as `mixed`, stay as they are. A program that reads the
    parameters of a repeat, ``layers.body.params``, sees them stacked in either net.
    """
    if layer.wraps and layer.wraps.order == "depth":
        one, split = unrolled(layer.wraps.layer)
        names = [f"copy_{i}" for i in range(layer.wraps.times)]

        def copies(tree: Any) -> Any:
            return {name: split(jax.tree.map(lambda a, i=i: a[i], tree))
                    for i, name in enumerate(names)} if tree else tree

        written = Layer.serial(**dict.fromkeys(names, one))
        return dataclasses.replace(written, computed=(WrittenOut(),)), copies

    # The trees of what wraps another layer are not those of its children; and what a layer of one's
    # own does with trees is its own affair, unless it says that it hands them on as they come.
    if layer.wraps or layer.stacks or layer.computed or not layer.children or layer.within is None:
        return layer, lambda tree: tree
    parts = {name: unrolled(child) for name, child in layer.children.items()}
    if all(parts[name][0] is child for name, child in layer.children.items()):
        return layer, lambda tree: tree

    def split_each(tree: Any) -> Any:
        # "name@1" is the state of the second call of a child.
        return {name: parts[name.split("@")[0]][1](part) for name, part in tree.items()}

    return layer.rebuilt({name: part[0] for name, part in parts.items()}), split_each
