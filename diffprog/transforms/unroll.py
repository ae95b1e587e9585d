"""Unrolling: each `repeat` of a net replaced by its copies, one after the other.

A scan over layers copies the cache of each layer when it writes a step into it; without the scan
XLA updates caches in place. Generation, which runs one net thousands of times, unrolls it first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from diffprog.core.computed import WrittenOut
from diffprog.core.layer import Layer
from diffprog.wiring.combinators import serial

Split = Callable[[Any], Any]


def unrolled(layer: Layer) -> tuple[Layer, Split]:
    """The net with its repeats unrolled, and a function that converts params and state to its own.

    Repeats inside other wrappers, such as `mixed`, stay. A program that reads the parameters of a
    repeat, ``layers.body.params``, sees them stacked in either net.
    """
    if layer.wraps and layer.wraps.order == "depth":
        return _unrolled_repeat(layer.wraps.times, layer.wraps.layer)
    # The parameters of a wrapper are not those of its children, and a layer of another author may
    # do anything with them unless it has `within`, which says that it passes them on unchanged.
    if layer.wraps or layer.stacks or layer.computed or not layer.children or layer.within is None:
        return layer, _unchanged
    children, splits = {}, {}
    for name, child in layer.children.items():
        children[name], splits[name] = unrolled(child)
    if all(children[name] is child for name, child in layer.children.items()):
        return layer, _unchanged

    def split(tree: Any) -> Any:
        # "name@1" is the state of the second call of a child.
        return {name: splits[name.split("@")[0]](part) for name, part in tree.items()}

    return layer.rebuilt(children), split


def _unrolled_repeat(n: int, layer: Layer) -> tuple[Layer, Split]:
    """n copies in series, named copy_0, copy_1, ..."""
    one, split_one = unrolled(layer)
    names = [f"copy_{i}" for i in range(n)]
    series = serial(**dict.fromkeys(names, one))

    def copy(tree: Any, i: int) -> Any:
        return split_one(jax.tree.map(lambda a: a[i], tree))

    def split(tree: Any) -> Any:
        return {name: copy(tree, i) for i, name in enumerate(names)} if tree else tree

    return dataclasses.replace(series, computed=(WrittenOut(),)), split


def _unchanged(tree: Any) -> Any:
    return tree
