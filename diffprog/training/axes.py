"""Axis 0 is the batch axis: planning finds its place in the outputs, and layers that mix it raise.

A net that takes the batch axis for height or time would train, but its outputs would depend on how
the data is cut into batches.
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

_Inputs = tuple[Any, dict[str, Any]]  # x and side inputs


# Shapes that passed the check; they are dropped with the net.
_passed: weakref.WeakKeyDictionary[Layer, set[Any]] = weakref.WeakKeyDictionary()


def parts(x: Any, side: dict[str, Any], own: list[str], count: int) -> _Inputs:
    """The shapes of `count` examples; the side inputs named in `own` have a batch axis."""

    def resized(a: Any) -> Any:
        return jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype)

    x, side = spec((x, side))
    of_examples = {name: side[name] for name in own}
    return jax.tree.map(resized, x), side | jax.tree.map(resized, of_examples)


def example_sides(
    net: Layer, x: Any, side: dict[str, Any], length: int, *counts: int
) -> tuple[list[str], list[Any]]:
    """The side inputs that have a batch axis, and the outputs for each of `counts` examples.

    A side input whose first axis has the `length` of x may still apply to all examples; then the
    net does not accept it at any other length. Raises the error of the net if it accepts none of
    the choices.
    """
    candidates = [name for name, value in side.items()
                  if all(jnp.shape(leaf)[:1] == (length,) for leaf in jax.tree.leaves(value))]
    errors = []
    for common in _subsets(candidates):
        own = [name for name in candidates if name not in common]
        inputs = [parts(x, side, own, count) for count in counts]
        try:
            return own, [net.plan(xs, **sides).y for xs, sides in inputs]
        except (TypeError, ValueError) as error:
            errors.append(error)
    raise errors[0]


def _subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    """All subsets, the smaller ones first."""
    for size in range(len(names) + 1):
        yield from itertools.combinations(names, size)


def check_examples(net: Layer, x: Any, side: dict[str, Any], *, cut: bool = False) -> None:
    """Raise if an output in inference depends on several examples, and for channels first.

    Inputs that cannot be planned, of symbolic sizes, or without a batch axis are not checked.
    Neither is a scalar beside the outputs, such as a load balancing loss of experts, unless the
    examples are `cut` into parts.
    """
    x, side = spec((x, side))
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        return
    if not all(known(size) for leaf in jax.tree.leaves((x, side)) for size in leaf.shape):
        return
    at = (cut, *jax.tree.leaves((x, side)), jax.tree.structure((x, side)))
    passed = _passed.setdefault(net, set())
    if at in passed:
        return
    ((length,),) = lengths
    count = max(length, 2)  # a single example has none to mix with
    try:
        own, (less, more) = example_sides(net, x, side, length, count, count + 1)
    except Exception:
        return  # the call of the net raises a better error
    few, many = (parts(x, side, own, n) for n in (count, count + 1))
    _check_channels(net, *few)
    grows = [axis >= 0 for axis in jax.tree.leaves(jax.tree.map(grown, less, more))]
    mixed = _mixed(net, *few, jax.tree.map(lambda a: 0, x), count)
    for output_mixes, has_batch_axis in zip(mixed, grows, strict=True):
        if output_mixes and (has_batch_axis or cut or not any(grows)):
            raise _mixing_error(net, few, many, count)
    passed.add(at)


def _mixed(net: Layer, x: Any, side: dict[str, Any], axes: Any, count: int) -> list[bool]:
    """For each output of a layer, whether it mixes examples; `axes` are the batch axes of x.

    Side inputs count as free of examples, since some apply to all of them.
    """
    plan = net.plan(x, **side)
    others = plan.params, plan.state, side
    no_axes = jax.tree.map(lambda a: -1, others)

    def output(x: Any, others: Any) -> Any:
        params, state, side = others
        return net.apply(params, state, x, **side)[0]

    return jax.tree.leaves(mixes(output, count, (axes, no_axes), x, others))


def _mixing_error(net: Layer, few: _Inputs, many: _Inputs, count: int) -> LayerError:
    """The error of the first innermost layer that mixes examples."""
    path, layer, x = "", net, few[0]
    for visit in _mixing(net, few, many, count):
        if path and not visit.path.startswith(f"{path}/"):
            break  # not a child of the layer found so far
        path, layer, x = visit.path, visit.layer, visit.x
    return _at(path, layer, LayerError(
        "examples along axis 0, unmixed in inference", show(x),
        "give x a batch axis, and grey images a channel axis, x[..., None], or pass "
        "check_axes=False if axis 0 may be mixed"))


def _mixing(net: Layer, few: _Inputs, many: _Inputs, count: int) -> Iterator[Visit]:
    """The layers that mix examples when called alone, an outer one before its children."""
    for visit, other in zip(visits(net, *few), visits(net, *many), strict=False):
        try:
            axes = jax.tree.map(grown, spec(visit.x), spec(other.x))
            if any(_mixed(visit.layer, visit.x, visit.side, axes, count)):
                yield visit
        except Exception:
            continue  # it cannot be planned alone


def _check_channels(net: Layer, x: Any, side: dict[str, Any]) -> None:
    """Raise if a window slides over images that seem to have channels first.

    These have at most 4 rows and equally many columns and channels, or 1 or 3 rows and at least 8
    columns and channels.
    """
    def channels_first(shape: tuple[int, ...]) -> bool:
        if len(shape) != 4:
            return False
        _, rows, columns, channels = shape
        square = rows <= 4 and rows < columns == channels
        return square or (rows in (1, 3) and min(columns, channels) >= 8)

    suspect = {a.shape for a in jax.tree.leaves(x) if channels_first(a.shape)}
    if not suspect:
        return
    for visit in visits(net, x, side):
        shape = getattr(visit.x, "shape", None)
        if shape in suspect and is_window(visit.layer, transposed=True):
            raise _at(visit.path, visit.layer, LayerError(
                "images with channels last, (batch, height, width, channels)", show(visit.x),
                "write jnp.moveaxis(x, 1, -1), or pass check_axes=False if axis 1 is the height"))


def _at(path: str, layer: Layer, error: LayerError) -> LayerError:
    """The error, raised on behalf of a layer."""
    error.path, error.layer = path, clip(repr(layer))
    return error
