"""Axis 0 is that of examples: where it goes is found by planning, and what mixes it is named.

A net that takes the axis of examples for height or time trains, and its numbers depend on the cut.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import known
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.nets import Visit, is_window, visits
from diffprog.core.notation import clip, show
from diffprog.core.plans import grown, spec
from diffprog.training.mixing import mixes

_Given = tuple[Any, dict[str, Any]]  # x and side inputs


# Shapes on which nothing was found; they die with the net.
_passed: weakref.WeakKeyDictionary[Layer, set[Any]] = weakref.WeakKeyDictionary()


def parts(x: Any, side: dict[str, Any], own: list[str], count: int) -> _Given:
    """The shapes of as many examples; of the side inputs, `own` are of examples."""

    def part(a: Any) -> Any:
        return jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype)

    x, side = spec((x, side))
    of_examples = {name: side[name] for name in own}
    return jax.tree.map(part, x), side | jax.tree.map(part, of_examples)


def sides_of_examples(
    net: Layer, x: Any, side: dict[str, Any], length: int, *counts: int
) -> tuple[list[str], list[Any]]:
    """Which side inputs are of examples, of which x has `length`; and outputs of other numbers.

    A side input whose first axis is as long as that of x may hold for all examples all the same:
    then the net takes no other one. Raises what the net does, if it takes none of these numbers.
    """
    alike = [name for name, value in side.items()
             if all(jnp.shape(leaf)[:1] == (length,) for leaf in jax.tree.leaves(value))]
    errors = []
    for kept in itertools.chain.from_iterable(
            itertools.combinations(alike, n) for n in range(len(alike) + 1)):
        own = [name for name in alike if name not in kept]
        given = [parts(x, side, own, count) for count in counts]
        try:
            return own, [net.plan(xs, **sides).y for xs, sides in given]
        except (TypeError, ValueError) as error:
            errors.append(error)
    raise errors[0]


def check_examples(net: Layer, x: Any, side: dict[str, Any], *, cut: bool = False) -> None:
    """Raise for a net whose outputs at rest are of several examples, and for channels first.

    What cannot be planned, is of open sizes, or has no axis of examples, is not judged here. Nor is
    a number beside the outputs, such as how evenly experts are used, unless the examples are `cut`
    in parts.
    """
    x, side = spec((x, side))
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1 or lengths <= {(), (0,)} or not all(
            known(size) for leaf in jax.tree.leaves((x, side)) for size in leaf.shape):
        return
    at = (cut, *jax.tree.leaves((x, side)), jax.tree.structure((x, side)))
    passed = _passed.setdefault(net, set())
    if at in passed:
        return
    ((length,),) = lengths
    count = max(length, 2)  # one example alone is mixed with none
    try:
        own, (less, more) = sides_of_examples(net, x, side, length, count, count + 1)
    except Exception:
        return  # where it is called, it says in its own words what is wrong
    few, many = (parts(x, side, own, n) for n in (count, count + 1))
    _check_channels(net, *few)
    grows = [axis >= 0 for axis in jax.tree.leaves(jax.tree.map(grown, less, more))]
    mixed = _mixed(net, *few, jax.tree.map(lambda a: 0, x), count)
    if any(wrong and (of_examples or cut or not any(grows))
           for wrong, of_examples in zip(mixed, grows, strict=True)):
        raise _named(net, few, many, count)
    passed.add(at)


def _mixed(net: Layer, x: Any, side: dict[str, Any], axes: Any, count: int) -> list[bool]:
    """Of each output of a layer, is it of several examples, which lie along these axes of x?

    Nothing is claimed of what comes by side inputs: some hold for all examples.
    """
    plan = net.plan(x, **side)
    others = plan.params, plan.state, side
    none = jax.tree.map(lambda a: -1, others)
    return jax.tree.leaves(mixes(
        lambda x, others: net.apply(*others[:2], x, **others[2])[0], count, (axes, none),
        x, others))


def _named(net: Layer, few: _Given, many: _Given, count: int) -> LayerError:
    """The error of the innermost layer that mixes, the first of them."""
    path, layer, x = "", net, few[0]
    for visit in _mixing(net, few, many, count):
        if path and not visit.path.startswith(f"{path}/"):
            break  # the next one beside it
        path, layer, x = visit.path, visit.layer, visit.x
    return _of(path, layer, LayerError(
        "examples along axis 0, which it does not mix at rest", show(x),
        "give x an axis of examples, and grey images one of channels, x[..., None], or pass "
        "check_axes=False: axis 0 is meant to be mixed"))


def _mixing(net: Layer, few: _Given, many: _Given, count: int) -> Iterator[Visit]:
    """The layers inside that mix examples, each by itself, an outer one before the inner ones."""
    for visit, other in zip(visits(net, *few), visits(net, *many), strict=False):
        try:
            axes = jax.tree.map(grown, spec(visit.x), spec(other.x))
            if any(_mixed(visit.layer, visit.x, visit.side, axes, count)):
                yield visit
        except Exception:
            continue  # it cannot be asked by itself


def _check_channels(net: Layer, x: Any, side: dict[str, Any]) -> None:
    """Raise if a window slides over images of at most 4 rows, as wide as they have channels, or of
    1 or 3 rows with channels as many as an image has columns."""
    first = {a.shape for a in jax.tree.leaves(x) if len(a.shape) == 4 and (
        (a.shape[1] <= 4 and a.shape[1] < a.shape[2] == a.shape[3])
        or (a.shape[1] in (1, 3) and min(a.shape[2:]) >= 8))}
    for visit in visits(net, x, side) if first else ():
        if is_window(visit.layer, transposed=True) and getattr(visit.x, "shape", None) in first:
            raise _of(visit.path, visit.layer, LayerError(
                "images with channels last, (batch, height, width, channels)", show(visit.x),
                "write jnp.moveaxis(x, 1, -1), or pass check_axes=False if axis 1 is the height"))


def _of(path: str, layer: Layer, error: LayerError) -> LayerError:
    error.path, error.layer = path, clip(repr(layer))
    return error
