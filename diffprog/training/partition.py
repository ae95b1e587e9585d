"""Which parameters of a net are matrices between hidden layers: those that `muon` orthogonalizes.

The last maps are read off the jaxpr of the net: on the way back from an output, the first products
of something that depends on x with something that depends on parameters alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from diffprog.core.computed import Mapped, Patterns
from diffprog.core.errors import LayerError
from diffprog.core.jaxprs import programs
from diffprog.core.layer import Layer, check_layer
from diffprog.core.nets import stacks_at, trainable
from diffprog.core.notation import listed
from diffprog.core.paths import paths, select

__all__ = ["Partition", "muon_partition"]

Axes = optax.contrib.MuonDimensionNumbers
_TITLES = ("path", "shape", "optimizer", "reason")


class Rule(NamedTuple):
    """What happens to one parameter.

    Attributes:
        shape: of the parameter, with the axes of copies.
        optimizer: "muon", "adamw", or "frozen" for none.
        reason: why; with "muon", the matrices.
        axes: with "muon", which axes are the rows and the columns of a matrix; all others number
            the matrices.
        matrix: with "muon", the numbers of rows and columns.
    """

    shape: tuple[int, ...]
    optimizer: str
    reason: str
    axes: Axes | None = None
    matrix: tuple[int, int] = (1, 1)


@dataclasses.dataclass(frozen=True)
class Partition:
    """The optimizer of each parameter in `muon`; prints as a table.

    Attributes:
        rules: path -> its rule: shape, optimizer ("muon", "adamw" or "frozen"), reason, axes.
    """

    rules: dict[str, Rule]

    def map(self, f: Callable[[Rule], Any], tree: Any) -> Any:
        """The tree with ``f(rule)`` in place of each parameter."""
        for path in (found := paths(tree)):
            if path not in self.rules:
                raise LayerError(f"parameters of the net given to muon ({listed(self.rules)})",
                                 path, "pass muon the net that is trained")
        return jax.tree.unflatten(jax.tree.structure(tree), [f(self.rules[at]) for at in found])

    def __str__(self) -> str:
        rows = [(path, _shape(rule.shape), *rule[1:3]) for path, rule in self.rules.items()]
        widths = [max(map(len, column)) for column in zip(_TITLES, *rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip()
                         for row in (_TITLES, *rows))


def muon_partition(net: Layer, x: Any, *, adam: Patterns | None = None, **side: Any) -> Partition:
    """The optimizer of each parameter in `muon`, by path; prints as a table.

    Args:
        net, x, adam, side: as in `muon`.

    Raises:
        LayerError: as in `muon`.

    Example:
        >>> net = dp.serial(dp.embedding(11, 8), dp.repeat(3, dp.residual(dp.linear(8))),
        ...                 dp.linear(11))
        >>> print(dp.training.muon_partition(net, jnp.ones((2, 5), int)))
        path                   shape      optimizer  reason
        embedding_0/embedding  (11, 8)    adamw      embedding
        linear_0/bias          (11,)      adamw      bias
        linear_0/kernel        (8, 11)    adamw      last map
        repeat_0/body/bias     (3, 8)     adamw      bias
        repeat_0/body/kernel   (3, 8, 8)  muon       3 matrices (8, 8)
    """
    check_layer(net, "muon_partition(net, x)")
    params = net.plan(x, **side).params
    leaves, trained = paths(params), paths(trainable(net, params))
    rules = {path: _by_kind(net, path, leaf.shape) if trained[path] else
             Rule(leaf.shape, "frozen", "") for path, leaf in leaves.items()}
    named = select({path: leaves[path] for path in leaves if trained[path]},
                   *((adam,) if isinstance(adam, str) else adam or ()))
    rules |= {path: Rule(leaf.shape, "adamw", "adam=") for path, leaf in named.items()}
    hidden = frozenset(path for path, rule in rules.items() if rule.optimizer == "muon")
    for last in _last_maps(net, params, x, side):
        kernels = hidden.intersection(frozenset().union(*last))
        if len(last) == 1:
            rules |= {path: Rule(rules[path].shape, "adamw", "last map") for path in kernels}
        elif kernels and adam is None:
            raise LayerError("one last map for each output, or adam=, which names them",
                             f"an output behind a sum or a loop ({listed(kernels)})",
                             "pass adam= the paths of the kernels that are no hidden ones, or "
                             "adam=() if all are hidden")
    return Partition(rules)


def _by_kind(net: Layer, path: str, shape: tuple[int, ...]) -> Rule:
    """The rule for a trainable parameter by its name, its shape, and the layer that owns it."""
    copies = stacks_at(net, path)
    *places, rows, columns = (1, 1, *shape[copies:])
    rows *= math.prod(places)
    if not path.endswith("/kernel") and path != "kernel":
        return Rule(shape, "adamw", path.rpartition("/")[2])
    if 1 in (rows, columns):
        return Rule(shape, "adamw", "vector")
    *around, owner = layers_around(net, path)
    if any(isinstance(own, Mapped) for layer in around for own in layer.computed):
        return Rule(shape, "adamw", "map to parameters")
    if owner.settings.get("groups", 1) != 1 or owner.name == "depthwise_conv":
        return Rule(shape, "adamw", "groups of channels")
    if len(shape) - copies > 2 and _is_foreign(owner):
        return Rule(shape, "adamw", "axes of another library")
    axes = Axes(tuple(range(copies, len(shape) - 1)), (len(shape) - 1,))
    count = math.prod(shape[:copies])
    what = f"{count} matrices" if count > 1 else "matrix"
    return Rule(shape, "muon", f"{what} {_shape((rows, columns))}", axes, (rows, columns))


def layers_around(layer: Layer, path: str) -> Iterator[Layer]:
    """The layers around a parameter, the innermost last, without wrappers around that."""
    while layer.wraps:
        yield layer
        layer = layer.wraps.layer
    yield layer
    name, _, rest = path.partition("/")
    if name in layer.children:
        yield from layers_around(layer.children[name], rest)


def _is_foreign(layer: Layer) -> bool:
    """Is it a network of another library, whose kernels may have other axes?"""
    return layer.factory is not None and layer.factory.__module__.startswith("diffprog.interop")


def _shape(shape: tuple[int, ...]) -> str:
    return str(tuple(map(int, shape)))


# The last maps.


class _Source(NamedTuple):
    """What an array depends on: x, or parameters alone, which are then listed; and its last maps.

    A map is the set of the parameters that its matrix is computed from; a loop is one more map.
    """

    of_x: bool = False
    params: frozenset[str] = frozenset()
    maps: frozenset[frozenset[str]] = frozenset()


_LOOPS = ("scan", "while")
_PRODUCTS = ("dot_general", "conv_general_dilated")


def _last_maps(
    net: Layer, params: Any, x: Any, side: dict[str, Any]
) -> list[frozenset[frozenset[str]]]:
    """For each output of a net, the maps between which and the output there is no other."""
    state = net.plan(x, **side).state

    def run(params: Any, state: Any, x: Any, side: dict[str, Any]) -> Any:
        return net.apply(params, state, x, **side)[0]

    program = jax.make_jaxpr(run)(params, state, x, side).jaxpr
    given = [_Source(params=frozenset({path})) for path in paths(params)]
    given += [_Source()] * len(jax.tree.leaves(state))
    given += [_Source(of_x=True)] * (len(program.invars) - len(given))
    return [source.maps for source in _read(program, given)]


def _read(program: Any, given: Sequence[_Source]) -> list[_Source]:
    """The sources of the outputs of a jaxpr."""
    program = getattr(program, "jaxpr", program)
    known = dict(zip(program.invars, given, strict=True))

    def source(var: Any) -> _Source:
        return _Source() if hasattr(var, "val") else known.get(var, _Source())

    for equation in program.eqns:
        found = _step(equation, [source(var) for var in equation.invars])
        known.update(zip(equation.outvars, found, strict=True))
    return [source(var) for var in program.outvars]


def _step(equation: Any, given: Sequence[_Source]) -> list[_Source]:
    """The sources of the outputs of an equation."""
    name, count = equation.primitive.name, len(equation.outvars)
    inner = [*programs(equation)]
    if name == "cond":
        branches = [_read(branch, given[1:]) for branch in inner]
        return [_joined([given[0], *outputs]) for outputs in zip(*branches, strict=True)]
    if name not in _LOOPS and len(inner) == 1 and len(inner[0].invars) == len(given):
        return _read(inner[0], given)
    if name in _PRODUCTS and given[0].of_x != given[1].of_x:
        matrix = given[given[0].of_x]
        if matrix.params:
            return [_Source(of_x=True, maps=frozenset({matrix.params}))]
    joined = _joined(given)
    if inner and joined.of_x:  # a loop, which may end in a product with any of its parameters
        entering = {frozenset({path}) for path in _params(given)}
        joined = joined._replace(maps=joined.maps | entering | {frozenset()})
    return [joined] * count


def _joined(given: Sequence[_Source]) -> _Source:
    """The source of what is computed from several arrays other than by a product."""
    if any(source.of_x for source in given):
        return _Source(of_x=True, maps=frozenset().union(*(source.maps for source in given)))
    return _Source(params=_params(given))


def _params(given: Sequence[_Source]) -> frozenset[str]:
    return frozenset().union(*(source.params for source in given))
